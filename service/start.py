"""Parts of every start: what it ignored, the error that stopped it, freezing what was loaded."""

import gc
import logging
from collections.abc import Mapping

from adapters.errors import AdapterError, UnsupportedBackbone, UnusableBackbone
from service.service_links import service_links
from service.settings import PREFIX

logger = logging.getLogger(__name__)

# Objects that came and have not gone since the last collection of the young ones, which takes two
# milliseconds then; how many of these make one of the middle-aged; and how many of those make one
# of all, so after a million and a half. Python waits longer while that is less than a quarter of
# all objects. Requests that are answered leave nothing to count.
_THRESHOLDS = 20_000, 5, 10


class StartFailed(Exception):
    """The service cannot start; the message is one line that says why."""


def start_error(error: BaseException) -> str:
    """Why a start failed, in one line. Errors that are not expected keep their class name."""
    if isinstance(error, (UnsupportedBackbone, UnusableBackbone)):
        return f"{setting_of(error)}: {error}"
    expected = isinstance(error, (AdapterError, OSError))
    return str(error) if expected else f"{type(error).__name__}: {error}"


def setting_of(error: Exception) -> str:
    """Which setting an error of loading the backbone is about: a device or type that this machine
    or the backbone does not have, or the backbone itself."""
    word = str(error).partition(" ")[0]
    return PREFIX + {"device": "DEVICE", "dtype": "DTYPE"}.get(word, "BACKBONE")


def log_service_links(environ: Mapping[str, str]) -> None:
    """Log, in one line, which variables of Kubernetes were not taken for settings."""
    if links := service_links(environ, PREFIX):
        logger.warning(
            "ignored variables of Kubernetes' service links (enableServiceLinks: false in the "
            "pod's spec leaves them out): %s",
            ", ".join(links),
        )


def freeze_loaded_objects() -> None:
    """Exempt everything loaded so far from garbage collection, and collect less often.

    Otherwise every full collection walks through torch and transformers while all requests wait:
    250 ms, twice a second under load. What comes later grows as well: thousands of adapters are a
    million objects, of which none is garbage, and a walk through these takes 100 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)

"""How many adapters stay on the device: as many as its memory holds, whatever their size."""

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.backbone.model import Backbone
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey
from service.engine.observer import Observer, Tier
from service.local import engine_settings
from service.settings import InvalidSettings, read_settings
from tests.support.engine_harness import EngineHarness
from tests.support.tiny_models import make_adapter

pytestmark = pytest.mark.timeout(60)
MIB = 2**20


class Loads(Observer):
    """Counts what enters and leaves the device."""

    def __init__(self) -> None:
        self.loads = self.evictions = 0

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:  # noqa: ARG002
        self.loads += tier == "active"

    def adapter_evicted(
        self,
        key: AdapterKey,  # noqa: ARG002
        tier: Tier,
        age_seconds: float,  # noqa: ARG002
    ) -> None:
        self.evictions += tier == "active"


@pytest.mark.slow
async def test_small_adapters_are_all_resident_where_few_large_ones_are(
    tmp_path: Path, backbone: Backbone
) -> None:
    harness = EngineHarness(tmp_path, backbone)
    large = make_adapter(backbone, seed=0)
    small = make_adapter(backbone, seed=1, prompt=None)
    for number in range(60):
        harness.add(f"large{number}", large)
        harness.add(f"small{number}", small)
    loads = Loads()
    # Room for six large ones. No more is said of their number than by default.
    nbytes = 6 * sum(tensor.nbytes for tensor in large.tensors.values())
    assert nbytes > 60 * sum(tensor.nbytes for tensor in small.tensors.values())
    engine = LocalEngine(
        lambda: backbone,
        harness.store,
        replace(engine_settings(read_settings({"IDSPAM_DEVICE": "cpu"})), max_active_bytes=nbytes),
        loads,
    )
    await engine.start()
    for _ in range(2):
        for number in range(60):
            await engine.predict(harness.entries((f"small{number}", "free card")))
    assert (loads.loads, loads.evictions) == (60, 0)
    for number in range(60):
        await engine.predict(harness.entries((f"large{number}", "free card")))
    assert loads.loads == 120
    assert loads.evictions > 60
    await engine.stop()


def test_without_settings_memory_is_the_limit() -> None:
    settings = engine_settings(read_settings({"IDSPAM_DEVICE": "cpu"}))
    assert settings.max_active_adapters == 16384
    assert settings.max_active_bytes == 1024 * MIB
    assert settings.active_share is None
    assert settings.max_registered_bytes == 4096 * MIB


@pytest.mark.parametrize(
    ("environ", "active", "registered"),
    [
        ({"MAX_ACTIVE_MIB": "300"}, 300, 1200),
        ({"MAX_ACTIVE_MIB": "300", "MAX_REGISTERED_MIB": "7"}, 300, 7),
        ({"MAX_ACTIVE_MIB": "auto", "MAX_REGISTERED_MIB": "7"}, 1024, 7),
    ],
)
def test_what_is_set_is_the_limit(environ: dict[str, str], active: int, registered: int) -> None:
    full = {"IDSPAM_DEVICE": "cpu"} | {f"IDSPAM_{name}": value for name, value in environ.items()}
    settings = engine_settings(read_settings(full))
    assert settings.max_active_bytes == active * MIB
    assert settings.max_registered_bytes == registered * MIB


@pytest.mark.parametrize("value", ["0", "some", "1.5", str(2**21)])
def test_a_bad_limit_stops_the_start_and_is_named(value: str) -> None:
    with pytest.raises(InvalidSettings, match="IDSPAM_MAX_ACTIVE_MIB"):
        read_settings({"IDSPAM_MAX_ACTIVE_MIB": value})

"""The environment variables of all clients: the commands of `service`, and `train push`."""

import os

# Not IDSPAM_*: those are settings of the service, which refuses to start with an unknown one.
API_KEY_VARIABLE = "ID_SPAM_API_KEY"
CA_VARIABLE = "ID_SPAM_CA"


def api_key(flag: str | None) -> str | None:
    """The key of a `--api-key` flag, or else of the environment."""
    return flag or os.environ.get(API_KEY_VARIABLE) or None


def ca_file(flag: str | None = None) -> str | None:
    """The certificate authorities of a `--ca` flag, or else of the environment."""
    return flag or os.environ.get(CA_VARIABLE) or None

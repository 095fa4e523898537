"""The settings of a replica: the environment of its node, and the `args` of the config file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.access.exposure import has_keys, is_loopback
from service.settings import PREFIX, InvalidSettings, Settings, read_settings, variable
from service.start import StartFailed

# What Ray decides in place of the service.
_OF_RAY = {
    "host": "Ray's proxy listens: set http_options.host",
    "port": "Ray's proxy listens: set http_options.port",
    "workers": "a replica is one process: set num_replicas or autoscaling_config",
    "tls_cert": "Ray's proxy has the connections: set http_options.ssl_certfile",
    "tls_key": "Ray's proxy has the connections: set http_options.ssl_keyfile",
}


def checked(args: Mapping[str, Any]) -> dict[str, str]:
    """The `args` of the config file, all of which are settings; YAML's numbers become text.

    Raises:
        InvalidSettings: naming every argument that is unknown, of Ray's, or has a bad value.
    """
    values = {key: str(value) for key, value in args.items()}
    faults = [f"{key}: no such setting" for key in values if not key.startswith(PREFIX)]
    faults += [
        f"{key}: {value}: put the value in quotes, YAML reads yes, no, on and off as something else"
        for key, value in args.items()
        if not isinstance(value, str | int | float) or isinstance(value, bool)
    ]
    faults += [f"{key}: {_OF_RAY[name]}" for name in _OF_RAY if (key := variable(name)) in values]
    if faults:
        raise InvalidSettings(faults)
    read_settings(values)
    return values


def replica_settings(
    environ: Mapping[str, str], values: Mapping[str, str], *, host: str
) -> Settings:
    """What a replica serves with.

    Args:
        environ: of its process; an argument of the config file wins over it.
        values: as `checked` gives them.
        host: where Ray's proxies listen.

    Raises:
        InvalidSettings: naming every bad value.
        StartFailed: the proxies would let everybody in.
    """
    ignored = {variable(name) for name in _OF_RAY}
    own = {key: value for key, value in environ.items() if key not in ignored}
    settings = read_settings(own | dict(values))
    if not (has_keys(settings) or settings.open or is_loopback(settings.published or host)):
        raise StartFailed(
            f"http_options.host: {host} without keys lets everybody in: set IDSPAM_KEYS_FILE or "
            "IDSPAM_KEYS, or the host 127.0.0.1, or IDSPAM_PUBLISHED=127.0.0.1 in a container "
            "whose port is published there, or IDSPAM_OPEN=yes"
        )
    return replace(settings, host=host, workers=0, standby=False)


def in_folder(settings: Settings, folder: Path) -> Settings:
    """The settings with a folder of a replica's own, and logs that no other replica writes."""

    def own(file: Path | None) -> Path | None:
        # An empty path is in the adapter folder.
        if file is None or file == Path():
            return file
        return file.with_name(f"{file.stem}-{folder.name}{file.suffix}")

    return replace(
        settings,
        adapter_dir=folder,
        audit_log=own(settings.audit_log),
        decision_log=own(settings.decision_log),
    )

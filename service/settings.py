"""The settings of the service: one frozen table, read once from the environment.

Each field of `Settings` is a setting; its environment variable is `IDSPAM_` and the field's name in
capitals.
"""

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

from service.devices import device_list
from service.service_links import is_service_link

PREFIX = "IDSPAM_"
# As in `adapters.format.store`, which is not imported for one expression.
_ADAPTER = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SECRET = ("api_keys", "admin_keys", "keys")
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 16384
DEFAULT_BODY_BYTES_IN_FLIGHT = 512 * 2**20
# Beside the file, a multipart form may have this much.
FORM_BYTES = 64 * 1024
TREE = Path(__file__).resolve().parent.parent
TREE_ZOO = TREE / "adapters" / "zoo"


class InvalidSettings(Exception):
    """Variables of the environment that cannot be used; `faults` has a sentence for each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value.strip()


def _optional(value: str) -> str | None:
    return value.strip() or None


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.strip().lower() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value.strip().lower()

    return parse


def _yes_or_no(value: str) -> bool:
    return _one_of("yes", "no")(value) == "yes"


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        digits = value.strip().replace("_", "")
        # int() accepts signs, spaces and the digits of other scripts too.
        if not (digits.isascii() and digits.isdigit()) or not low <= int(digits[:20]) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(digits)

    return parse


def _none_or(parse: Callable[[str], int]) -> Callable[[str], int]:
    """0 switches it off, whatever its range is."""

    def parse_or_none(value: str) -> int:
        try:
            return 0 if value.strip() == "0" else parse(value)
        except ValueError as error:
            raise ValueError(f"{error}, or 0") from None

    return parse_or_none


def _auto_or(parse: Callable[[str], int]) -> Callable[[str], int | None]:
    return lambda value: None if value.strip().lower() == "auto" else parse(value)


def _seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 3600.0:
        raise ValueError("must be a number of seconds from 0 to 3600")
    return number


def _positive_seconds(value: str) -> float:
    number = _seconds(value)
    if number < 0.1:
        raise ValueError("must be a number of seconds from 0.1 to 3600")
    return number


def _seconds_from(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not low <= number <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return number

    return parse


def _replica(value: str) -> str:
    if value.strip() and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value.strip()):
        raise ValueError("must be a name of 1 to 63 of A-Z a-z 0-9 . _ -, a letter or digit first")
    return value.strip()


def _store(value: str) -> str | None:
    url = value.strip()
    protocol, separator, rest = url.partition("://")
    if separator and not (re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) and rest.strip("/")):
        raise ValueError("must be a folder or a URL: s3://bucket/prefix")
    return url or None


def _weights(value: str) -> Mapping[str, float]:
    weights: dict[str, float] = {}
    for item in value.split(","):
        if not item.strip():
            continue
        name, separator, number = (part.strip() for part in item.partition("="))
        try:
            weight = float(number) if separator else -1.0
        except ValueError:
            weight = -1.0
        if not _ADAPTER.fullmatch(name) or name in weights or not 0.01 <= weight <= 100.0:
            raise ValueError(
                "must be name=weight pairs, separated by commas, each name once and each weight "
                "from 0.01 to 100"
            )
        weights[name] = weight
    return weights


def _folder(value: str) -> Path:
    return Path(_text(value)).expanduser()


def _file(value: str) -> Path | None:
    return Path(value.strip()).expanduser() if value.strip() else None


def _optional_file(value: str) -> Path | None:
    return Path(value.strip()).expanduser() if value.strip() else None


def _audit_log(value: str) -> Path | None:
    """The file; an empty path where the adapter folder decides."""
    match value.strip().lower():
        case "off":
            return None
        case "auto":
            return Path()
        case _:
            return _folder(value)


def _zoo(value: str) -> Path | None:
    match value.strip().lower():
        case "off":
            return None
        case "tree":
            return TREE_ZOO
        case _:
            return _folder(value)


def _url(value: str) -> str | None:
    url = value.strip()
    if url and not re.fullmatch(r"https?://[^\s/]+\S*", url):
        raise ValueError("must be a URL: http://host:4318")
    return url or None


def _published(value: str) -> str:
    address = value.strip()
    try:
        if address not in ("", "localhost"):
            ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        raise ValueError("must be an address: 127.0.0.1") from None
    return address.strip("[]")


def _items(value: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in value.split(",") if item.strip())


def _hosts(value: str) -> tuple[str, ...]:
    names = tuple(name.lower().removesuffix(".") for name in _items(value))
    for name in names:
        if name != "*" and not re.fullmatch(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", name):
            raise ValueError(f"{name[:80]!r}: expected a name, as idspam.example.org")
    return names


def _origins(value: str) -> tuple[str, ...]:
    for origin in _items(value):
        if origin != "*" and not re.fullmatch(r"https?://[a-z0-9._\[\]:-]+", origin):
            raise ValueError(f"{origin[:80]!r}: expected an origin, as https://app.example.org")
    return _items(value)


def _keys(value: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in value.split(",") if key.strip())
    if value.strip() and not keys:
        # "$ONE,$OTHER" with both of them empty. Without keys it would let everybody in.
        raise ValueError("there is no key between the commas; leave it unset if there are none")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ValueError("keys are printable ASCII without spaces, separated by commas")
    return keys


def _root_path(value: str) -> str:
    path = value.strip().rstrip("/")
    if path and (not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path) or "/.." in path):
        raise ValueError("must be a path such as /idspam")
    return path


def _networks(value: str) -> tuple[str, ...]:
    networks = tuple(item.strip() for item in value.split(",") if item.strip())
    for network in networks:
        try:
            ip_network(network)
        except ValueError:
            raise ValueError(
                f"{network!r} is neither an address nor a network such as 10.0.0.0/8"
            ) from None
    return networks


def _setting(parse: Callable[[str], object], default: str, unit: str, help: str) -> Any:
    """A row of the table. The default is text and parsed like a value of the environment."""
    metadata = {"parse": parse, "default": default, "unit": unit, "help": help}
    return field(default_factory=lambda: parse(default), metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of the service. The defaults serve the zoo on any machine."""

    backbone: str = _setting(
        _text,
        "all-MiniLM-L6-v2",
        "name or path",
        "The frozen encoder: a folder, a hub name (`name@revision` pins it) or the default's name",
    )
    device: str = _setting(
        device_list,
        "auto",
        "device or list",
        "`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...; several GPUs of this host "
        "as `cuda:0,cuda:1` or `cuda:all`, with workers ([processes.md](processes.md#devices))",
    )
    dtype: str = _setting(
        _one_of("auto", "float32", "bfloat16", "int8", "float8"),
        "auto",
        "type",
        "`auto` is bfloat16 where the device computes it natively and the parity check "
        "passes, else float32. `int8`: the layers' products, on a CPU with VNNI or AMX. `float8`: "
        "the same on a GPU with FP8 tensor cores",
    )
    host: str = _setting(
        _text,
        "127.0.0.1",
        "address",
        "Where to listen; with `0.0.0.0` or `::` (all interfaces, `::` with IPv6) set keys",
    )
    port: int = _setting(_whole(0, 65535), "8000", "TCP port", "0 takes a free port and prints it")
    root_path: str = _setting(
        _root_path,
        "",
        "path",
        "The prefix under which a proxy shows the service, as `/idspam`; requests may have it",
    )
    trusted_proxies: tuple[str, ...] = _setting(
        _networks,
        "",
        "addresses, networks",
        "Proxies whose `X-Forwarded-For`, `-Proto` and `-Prefix` count, comma-separated",
    )
    workers: int | None = _setting(
        _auto_or(_whole(0, 256)),
        "auto",
        "processes",
        "HTTP processes beside the engine's; 0: a single process. `auto` is that on a CPU, and "
        "three quarters of the cores, at most 12 for each GPU, beside GPUs",
    )
    standby: bool = _setting(
        _yes_or_no,
        "yes",
        "yes or no",
        "With workers: whether a process with the backbone loaded waits to replace a dead engine "
        "in about a second; it takes about 50 MB",
    )
    one_core: bool = _setting(
        _yes_or_no,
        "yes",
        "yes or no",
        "With workers beside a GPU: whether the engine's two threads stay together on one core "
        "while batches are large ([engine.md](engine.md#one-core)). `no` where other programs "
        "fill this host's cores",
    )
    # ruff mistakes the call in a Path's default for shared state; it makes a dataclass field.
    adapter_dir: Path = _setting(  # noqa: RUF009
        _folder, "data/adapters", "folder", "Where uploaded adapters are kept; created if missing"
    )
    adapter_store: str | None = _setting(
        _store,
        "",
        "folder or URL",
        "Where replicas share their adapters ([replicas.md](replicas.md)), as "
        "`s3://bucket/prefix`; if not set, one service owns `IDSPAM_ADAPTER_DIR`",
    )
    replica: str = _setting(
        _replica,
        "",
        "name",
        "With a shared store: this replica's name in answers and logs; if not set, the host's",
    )
    cache_mib: int = _setting(
        _whole(1, 2**24),
        "4096",
        "MiB",
        "With a shared store: how much of it `IDSPAM_ADAPTER_DIR` keeps",
    )
    follow_seconds: float = _setting(
        _seconds_from(0.02, 60),
        "0.5",
        "seconds",
        "With a shared store: how often a replica looks for changes",
    )
    lease_seconds: float = _setting(
        _seconds_from(0.5, 3600),
        "5",
        "seconds",
        "With a shared store: how long a replica answers without having read it, and how long a "
        "change waits for one that is silent; at least four times `IDSPAM_FOLLOW_SECONDS`",
    )
    rollout_seconds: float = _setting(
        _seconds_from(1, 3600),
        "60",
        "seconds",
        "With a shared store: how long all replicas may take to fetch and check a revision",
    )
    stale: Literal["refuse", "serve"] = _setting(
        _one_of("refuse", "serve"),
        "refuse",
        "`refuse` or `serve`",
        "Whether a replica whose lease is over, since it cannot read the shared store, refuses "
        "requests or answers from what it last knew",
    )
    zoo_dir: Path | None = _setting(  # noqa: RUF009
        _zoo,
        "tree",
        "folder",
        "Adapters registered at the start if they fit the backbone: `tree` is this tree's "
        "`adapters/zoo`, `off` is none",
    )
    default_adapter: str | None = _setting(
        _optional, "", "name", "Adapter where a protocol names none: `name` or `name@revision`"
    )
    max_batch_tokens: int | None = _setting(
        _auto_or(_whole(16, 2**22)),
        "auto",
        "tokens",
        "Most tokens of a forward pass, prompts included; `auto` is 2048 on a CPU, 16384 on a GPU",
    )
    max_waiting_tokens: int | None = _setting(
        _auto_or(_whole(16, 2**30)),
        "auto",
        "tokens",
        "Most tokens that may wait for a device, requests beyond get 429; `auto` is 5 seconds of "
        "work at the measured rate",
    )
    adapter_weights: Mapping[str, float] = _setting(
        _weights,
        "",
        "name=weight, comma-separated",
        "Shares of the device while adapters compete for it, as `urgent=2,bulk=0.5`; others have 1",
    )
    max_active_adapters: int = _setting(
        _whole(1, 65536), "16384", "adapters", "Most adapters on the device at once"
    )
    max_active_mib: int | None = _setting(
        _auto_or(_whole(1, 2**20)),
        "auto",
        "MiB",
        "Most memory of the adapters on the device; those in use may exceed it; `auto` is a "
        "quarter of a GPU's memory that is free at the start, 1024 on a CPU",
    )
    max_registered_adapters: int | None = _setting(
        _auto_or(_whole(1, 2**20)),
        "auto",
        "adapters",
        "Most adapters in host memory, for each device; `auto` is four times "
        "`IDSPAM_MAX_ACTIVE_ADAPTERS`",
    )
    max_registered_mib: int | None = _setting(
        _auto_or(_whole(1, 2**24)),
        "auto",
        "MiB",
        "Most memory of the adapters in host memory, for each device; `auto` is four times "
        "`IDSPAM_MAX_ACTIVE_MIB`, or 4096 where that is `auto`",
    )
    images_mib: int = _setting(
        _none_or(_whole(64, 2**24)),
        "16384",
        "MiB",
        "Most disk, in `.images` of `IDSPAM_ADAPTER_DIR`, for adapters as the device wants them, "
        "from which they are loaded quickly ([engine.md](engine.md#images)); 0: none",
    )
    cpu_lanes: int | None = _setting(
        _auto_or(_whole(1, 256)),
        "auto",
        "batches",
        "Batches that run side by side on a CPU, each on its share of the cores; `auto` is one "
        "for each core, at most 4",
    )
    kept_revisions: int = _setting(
        _whole(1, 10_000),
        "10",
        "revisions",
        "How many revisions of an adapter are kept; publishing another one removes the oldest",
    )
    max_upload_bytes: int = _setting(
        _whole(1024, 2**34), str(256 * 2**20), "bytes", "Largest adapter file of an upload"
    )
    max_body_bytes: int = _setting(
        _whole(1024, 2**31), str(8 * 2**20), "bytes", "Largest body of every other request"
    )
    max_body_bytes_in_flight: int | None = _setting(
        _auto_or(_whole(64 * 1024, 2**40)),
        "auto",
        "bytes",
        "Most bytes of all bodies in memory, and as many of uploads on disk; more gets 429. Each "
        "worker has its share; `auto` is 512 MiB, or one largest upload for each worker",
    )
    max_connections: int | None = _setting(
        _auto_or(_whole(1, 2**20)),
        "auto",
        "connections",
        "Most connections of an HTTP process; beyond, those that wait for a request make room, "
        "else 503. `auto` is 4096, or fewer if there are not as many descriptors",
    )
    header_seconds: float = _setting(
        _positive_seconds,
        "10",
        "seconds",
        "How long a connection may take to send its first headers, and the headers of each request",
    )
    stall_seconds: float = _setting(
        _positive_seconds,
        "20",
        "seconds",
        "How often the pace is checked: each such period must move as many bytes of a body or an "
        "answer as `IDSPAM_MIN_BYTES_PER_SECOND` asks for, or all that is left",
    )
    min_bytes_per_second: int = _setting(
        _whole(1, 2**30), "1024", "bytes/s", "The slowest pace of bodies and answers"
    )
    max_answer_bytes: int = _setting(
        _whole(1024, 2**31),
        str(16 * 2**20),
        "bytes",
        "Largest answer of a request; one that may be larger is refused before it is computed",
    )
    max_inputs: int = _setting(_whole(1, 2**20), "1024", "texts", "Most texts in one request")
    max_hidden_words: int = _setting(
        _whole(0, 2**20),
        "512",
        "words",
        "Most words of a request that `explain: occlusion` hides; each costs as much as a text; "
        "0: it is refused",
    )
    default_timeout_ms: int = _setting(
        _whole(1, 3_600_000), "30000", "milliseconds", "Deadline of requests without a `timeout_ms`"
    )
    drain_seconds: float = _setting(
        _seconds, "30", "seconds", "How long requests in flight may take to finish after SIGTERM"
    )
    tls_cert: Path | None = _setting(  # noqa: RUF009
        _file,
        "",
        "file",
        "Certificate with its chain (PEM): the service then speaks HTTPS; read again when renewed",
    )
    tls_key: Path | None = _setting(  # noqa: RUF009
        _file, "", "file", "Private key of that certificate (PEM, without a password)"
    )
    published: str = _setting(
        _published,
        "",
        "address",
        "In a container: the host's address on which its port is published. In place of "
        "`IDSPAM_HOST` it decides whether a service without keys may start",
    )
    open: bool = _setting(
        _yes_or_no,
        "no",
        "yes or no",
        "`yes` lets a service without keys listen where others can reach it",
    )
    allowed_hosts: tuple[str, ...] = _setting(
        _hosts,
        "",
        "names, comma-separated",
        "Without keys, names under which the service may be asked beside addresses and names "
        "without a dot; `*.example.org`, `*`",
    )
    allowed_origins: tuple[str, ...] = _setting(
        _origins,
        "",
        "origins, comma-separated",
        "Web pages that may use the service from a browser, as `https://app.example.org`; `*`",
    )
    keys_file: Path | None = _setting(  # noqa: RUF009
        _file,
        "",
        "file",
        "Keys with scopes, a line of JSON each ([access.md](access.md)); if there are keys of "
        "any kind, all but probes and documentation needs one",
    )
    keys: str = _setting(str, "", "lines of JSON", "The same lines as in `IDSPAM_KEYS_FILE`")
    api_keys: tuple[str, ...] = _setting(
        _keys,
        "",
        "keys, comma-separated",
        "Keys that may predict and read adapters and metrics, but change nothing",
    )
    admin_keys: tuple[str, ...] = _setting(
        _keys, "", "keys, comma-separated", "Keys that may do everything"
    )
    audit_log: Path | None = _setting(  # noqa: RUF009
        _audit_log,
        "auto",
        "file",
        "Who changed adapters and keys; `auto` is `.audit/audit.jsonl` in the adapter folder, "
        "`off` is none; refused requests are in `...-refused.jsonl` beside it",
    )
    decision_log: Path | None = _setting(  # noqa: RUF009
        _optional_file, "", "file", "What was answered, the inputs as hashes; if not set, none"
    )
    decision_log_texts: bool = _setting(
        _yes_or_no, "no", "`yes` or `no`", "Write the texts to the decision log, too"
    )
    decision_log_days: int = _setting(
        _whole(1, 3650), "30", "days", "When decisions are removed, at the latest 25 hours later"
    )
    drift_texts: int = _setting(
        _none_or(_whole(200, 100_000)),
        "4000",
        "texts",
        "Drift compares so many of an adapter's last texts with its training, or down to half as "
        "many ([drift.md](drift.md)); 0: nothing is counted",
    )
    uncertain_texts: int = _setting(
        _whole(0, 10_000),
        "0",
        "texts",
        "How many texts of low confidence are kept in memory for each adapter, to be labelled "
        "([drift.md](drift.md)); 0: none",
    )
    uncertain_mib: int = _setting(
        _whole(1, 1024), "16", "MiB", "Most memory of these texts, of all adapters together"
    )
    uncertain_hours: int = _setting(
        _whole(1, 8760), "24", "hours", "When such a text is removed, seconds later at most"
    )
    record_bytes: int = _setting(
        _whole(4096, 2**34), str(64 * 2**20), "bytes", "When a file of these logs is rotated"
    )
    record_files: int = _setting(
        _whole(0, 10_000),
        "10",
        "files",
        "How many rotated files of each log are kept; smaller ones as long as they have no more "
        "bytes than these",
    )
    log_level: str = _setting(
        _one_of("debug", "info", "warning", "error"), "info", "level", "What is logged, to stderr"
    )
    log_format: Literal["text", "json"] = _setting(
        _one_of("text", "json"), "text", "format", "Text, or a JSON object on each line"
    )
    otlp_endpoint: str | None = _setting(
        _url,
        "",
        "URL",
        "Where OpenTelemetry traces go (OTLP over HTTP), as `http://collector:4318`; if not set, "
        "nothing is traced",
    )

    @property
    def devices(self) -> tuple[str, ...]:
        """Each has an engine of its own. `cuda:all` is one of them until the start expands it."""
        return tuple(self.device.split(","))

    def batch_tokens(self, device: str) -> int:
        """The tokens of one forward pass on a device, at most."""
        default = GPU_BATCH_TOKENS if device.startswith("cuda") else CPU_BATCH_TOKENS
        return self.max_batch_tokens or default

    @property
    def body_bytes_share(self) -> int:
        """The bytes of bodies in flight in one HTTP process, at most."""
        processes = self.workers or 1
        total = self.max_body_bytes_in_flight or max(
            DEFAULT_BODY_BYTES_IN_FLIGHT, processes * self.largest_body
        )
        return total // processes

    @property
    def largest_body(self) -> int:
        """The largest body of any request, in bytes."""
        return max(self.max_upload_bytes, self.max_body_bytes) + FORM_BYTES

    @property
    def max_values(self) -> int:
        """Of a JSON body: ten for every input, and never fewer than 131,072."""
        return max(2**17, 10 * self.max_inputs)

    @property
    def scheme(self) -> str:
        """Of the service's URL."""
        return "https" if self.tls_cert else "http"

    @property
    def max_message_bytes(self) -> int:
        """The largest message between processes: a body of short texts as tokens."""
        return 16 * self.max_body_bytes + 2**20

    def __repr__(self) -> str:
        """Without the keys: settings end up in logs and in failing tests."""
        values = (
            f"{setting.name}={'...' if setting.name in SECRET else getattr(self, setting.name)!r}"
            for setting in fields(self)
        )
        return f"Settings({', '.join(values)})"


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings of an environment; a variable that is not set has its default.

    Variables that Kubernetes has set are ignored (`service.service_links`).

    Raises:
        InvalidSettings: bad values and unknown `IDSPAM_*` variables, all of them named.
    """
    known = {variable(setting.name): setting for setting in fields(Settings)}
    values: dict[str, Any] = {}
    faults = []
    for key in sorted(key for key in environ if key.startswith(PREFIX)):
        if is_service_link(key, environ[key]):
            continue
        if key not in known:
            faults.append(f"{key}: no such setting{_advice(key, list(known))}")
            continue
        try:
            values[known[key].name] = known[key].metadata["parse"](environ[key])
        except ValueError as error:
            shown = "" if known[key].name in SECRET else f"{environ[key]!r}: "
            faults.append(f"{key}: {shown}{error}")
    if not faults:
        settings = Settings(**values)
        faults = list(contradictions(settings))
    if faults:
        raise InvalidSettings(faults)
    return settings


def contradictions(settings: Settings) -> Iterator[str]:
    """Values that are good alone but not together."""
    if settings.body_bytes_share < settings.largest_body:
        yield (
            f"{variable('max_body_bytes_in_flight')}: {settings.max_body_bytes_in_flight}: must be "
            f"{settings.largest_body} for each worker, the largest body or upload that is allowed"
        )
    if len(settings.devices) > 1 and settings.workers == 0:
        yield (
            f"{variable('workers')}: 0: must be 1 or more, or auto, with the "
            f"{len(settings.devices)} devices of {variable('device')}"
        )
    if settings.adapter_store is None:
        return
    if len(settings.devices) > 1:
        yield (
            f"{variable('device')}: {settings.device}: must be one device with "
            f"{variable('adapter_store')}: start a replica for each device"
        )
    if settings.lease_seconds < 4 * settings.follow_seconds:
        yield (
            f"{variable('lease_seconds')}: {settings.lease_seconds:g}: must be at least four times "
            f"{variable('follow_seconds')}, {4 * settings.follow_seconds:g}"
        )
    if Path(settings.adapter_store).expanduser().absolute() == settings.adapter_dir.absolute():
        yield (
            f"{variable('adapter_store')}: {settings.adapter_store}: must be another folder than "
            f"{variable('adapter_dir')}, which is each replica's own"
        )


def variable(name: str) -> str:
    """The environment variable of a field of `Settings`."""
    return PREFIX + name.upper()


def settings_table() -> str:
    """The table of settings in docs/settings.md."""
    lines = ["| Variable | Unit | Default | What it does |", "|---|---|---|---|"]
    for setting in fields(Settings):
        row = setting.metadata
        default = f"`{row['default']}`" if row["default"] else "none"
        lines.append(f"| `{variable(setting.name)}` | {row['unit']} | {default} | {row['help']} |")
    return "\n".join(lines) + "\n"


def _advice(key: str, known: list[str]) -> str:
    # A client's key, most likely.
    if key in ("IDSPAM_API_KEY", "IDSPAM_KEY"):
        return "; the service reads IDSPAM_API_KEYS, its clients read ID_SPAM_API_KEY"
    if key in ("IDSPAM_URL", "IDSPAM_CA"):
        return f"; clients read ID_SPAM_{key.removeprefix(PREFIX)}"
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""

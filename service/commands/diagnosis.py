"""The checks of `doctor`: what a service with this environment needs, and what mends it.

Each check is a function that takes the settings and yields findings. It imports what it needs when
it runs, so that a missing package is a finding and not a traceback.
"""

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from cli.hints import command_line
from service.auto_workers import workers_of
from service.devices import devices_of
from service.settings import Settings
from service.start import setting_of

State: TypeAlias = Literal["ok", "warning", "wrong"]

_MIB = 2**20
# Of the distributions that serving imports.
_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "huggingface-hub"),
    *("fastapi", "uvicorn", "httptools", "uvloop", "msgspec", "orjson", "pyzmq", "pydantic"),
    *("prometheus-client", "opentelemetry-api", "python-multipart", "rich", "httpx"),
)
_LEAST_FREE_MIB, _LEAST_MEMORY_MIB, _WORKER_MIB = 512, 1024, 150
# A descriptor for each of a few hundred connections, and for files.
_LEAST_DESCRIPTORS = 1024
_HTTP_SECONDS = 3.0
# Types that need hardware of their own, and what it does.
_NARROW = {
    "int8": "the processor multiplies bytes",
    "float8": "the GPU has FP8 tensor cores",
}


class Finding(msgspec.Struct, frozen=True):
    """check: what was looked at. remedy: what to do about it; "" if nothing."""

    check: str
    state: State
    message: str
    remedy: str = ""


Check: TypeAlias = Callable[[Settings], Iterator[Finding]]


def python_and_packages(_: Settings) -> Iterator[Finding]:
    found = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036  # whatever Python was typed
        yield Finding("python", "wrong", f"{found}; 3.11 or newer is needed", "make setup")
    else:
        yield Finding("python", "ok", f"{found} at {sys.executable}")
    missing = [name for name in _PACKAGES if _version(name) is None]
    if missing:
        yield Finding(
            "packages",
            "wrong",
            f"not installed for this Python: {', '.join(missing)}",
            "make setup, and then .venv/bin/python in place of this Python",
        )
        return
    versions = (f"{name} {_version(name)}" for name in ("torch", "transformers", "fastapi"))
    yield Finding("packages", "ok", f"{', '.join(versions)} and {len(_PACKAGES) - 3} more")


def device(settings: Settings) -> Iterator[Finding]:
    """The build of torch, the device, and whether bfloat16 is native there."""
    import torch

    from adapters.backbone.loading import check_type, computes_bfloat16, resolve_device
    from adapters.errors import AdapterError

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    has_gpu = Path("/proc/driver/nvidia/version").exists()
    if has_gpu and not torch.cuda.is_available():
        why = "this build of torch has no CUDA" if not torch.version.cuda else "CUDA does not start"
        remedy = "TORCH=cuda make setup" if not torch.version.cuda else "nvidia-smi says more"
        yield Finding(
            "torch", "warning", f"{torch.__version__}, {built}; a GPU is there, but {why}", remedy
        )
    else:
        yield Finding("torch", "ok", f"{torch.__version__}, {built}")
    try:
        targets = [resolve_device(name) for name in devices_of(settings.device)]
    except (AdapterError, ValueError) as error:
        yield Finding("device", "wrong", f"IDSPAM_DEVICE: {error}", "IDSPAM_DEVICE=auto")
        return
    kinds = set()
    for target in targets:
        name = _processor() if target.type == "cpu" else torch.cuda.get_device_name(target)
        cores = len(os.sched_getaffinity(0))
        of = f", {cores} core{'s' * (cores > 1)}" if target.type == "cpu" else ""
        yield Finding("device", "ok", f"{target} ({name}{of})")
        kinds.add(name)
    if len(kinds) > 1:
        yield Finding(
            "devices",
            "warning",
            "of different models: the bits of an answer may depend on which one gives it",
            "IDSPAM_DEVICE with devices of one model",
        )
    target = targets[0]
    if settings.dtype in _NARROW:
        try:
            check_type(settings.dtype, target)
        except AdapterError as error:
            yield Finding("dtype", "wrong", f"IDSPAM_DTYPE: {error}", "IDSPAM_DTYPE=auto")
        else:
            yield Finding("dtype", "ok", f"{settings.dtype}; {_NARROW[settings.dtype]}")
        return
    native = computes_bfloat16(target)
    if settings.dtype == "bfloat16" and not native:
        yield Finding(
            "dtype",
            "warning",
            "bfloat16, which this device emulates: slower than float32",
            "IDSPAM_DTYPE=auto",
        )
        return
    kind = "computes" if native else "does not compute"
    chosen = settings.dtype
    if chosen == "auto":
        chosen = "auto, bfloat16 if its answers agree" if native else "auto, so float32"
    yield Finding("dtype", "ok", f"{chosen}; the device {kind} bfloat16 natively")


def processors(_: Settings) -> Iterator[Finding]:
    """Threads beyond a container's share of the processors only wait for each other."""
    quota = _cpu_quota()
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if quota is not None and quota < cores and not threads:
        whole = max(1, int(quota))
        yield Finding(
            "processors",
            "warning",
            f"{cores} are visible, and this container may use {quota:g} of them",
            f"OMP_NUM_THREADS={whole}",
        )
    else:
        shown = f", OMP_NUM_THREADS={threads}" if threads else ""
        yield Finding("processors", "ok", f"{cores}{shown}")


def backbone(settings: Settings) -> Iterator[Finding]:
    """Whether it is there and can be loaded: it is loaded, as a service does."""
    from adapters.backbone.loading import load_backbone
    from adapters.errors import AdapterError

    started = time.perf_counter()
    try:
        first = devices_of(settings.device)[0]
        loaded = load_backbone(settings.backbone, device=first, dtype=settings.dtype)
    except (AdapterError, OSError, ValueError) as error:
        if setting_of(error) == "IDSPAM_DTYPE":
            yield Finding("backbone", "wrong", f"IDSPAM_DTYPE: {error}", "IDSPAM_DTYPE=auto")
            return
        yield Finding(
            "backbone",
            "wrong",
            f"IDSPAM_BACKBONE={settings.backbone}: {error}",
            "a folder with the model's files, or a name on the hub and a way to reach it: docs/"
            "operate.md",
        )
        return
    seconds = time.perf_counter() - started
    kind = loaded.computes
    yield Finding(
        "backbone",
        "ok",
        f"{loaded.identity.name}: {loaded.layers} layers of width {loaded.hidden_size}, in {kind}, "
        f"loaded in {seconds:.1f} s",
    )


def adapter_folder(settings: Settings) -> Iterator[Finding]:
    """Whether it can be written, who uses it, and how much room it has."""
    from adapters.errors import AdapterError
    from adapters.format.store import AdapterStore

    folder = settings.adapter_dir
    shown = f"IDSPAM_ADAPTER_DIR={folder}"
    if fault := _unwritable(folder):
        remedy = f"a folder that this user ({_user()}) may write"
        yield Finding("adapter folder", "wrong", f"{shown}: {fault}", remedy)
        return
    if not folder.is_dir():
        yield Finding("adapter folder", "ok", f"{folder.absolute()}: the first start makes it")
    else:
        try:
            names = AdapterStore(folder, kept=settings.kept_revisions).names()
        except (AdapterError, OSError) as error:
            yield Finding("adapter folder", "wrong", f"{shown}: {error}")
            return
        holder = _holder(folder)
        used = f", used by the service of process {holder}" if holder else ""
        number = len(names)
        adapters = f"{number} adapter{'s' * (number != 1)}"
        yield Finding("adapter folder", "ok", f"{folder.absolute()}: {adapters}{used}")
    free = shutil.disk_usage(_existing(folder)).free / _MIB
    state: State = "ok" if free >= _LEAST_FREE_MIB else "warning"
    remedy = "" if state == "ok" else "uploads fail (507) when it is full: make room"
    yield Finding("disk", state, f"{free:,.0f} MiB free for adapters", remedy)


def zoo(settings: Settings) -> Iterator[Finding]:
    folder = settings.zoo_dir
    if folder is None:
        yield Finding("zoo", "ok", "off")
    elif not folder.is_dir():
        yield Finding(
            "zoo", "warning", f"IDSPAM_ZOO_DIR={folder}: no such folder", "IDSPAM_ZOO_DIR=off"
        )
    else:
        yield Finding("zoo", "ok", f"{len(list(folder.glob('*.safetensors')))} files in {folder}")


def shared_store(settings: Settings) -> Iterator[Finding]:
    """Whether the store of replicas answers, and takes an object."""
    if settings.adapter_store is None:
        return
    from adapters.errors import AdapterError
    from adapters.shared.objects import ObjectStore

    shown = f"IDSPAM_ADAPTER_STORE={settings.adapter_store}"
    try:
        store = ObjectStore(settings.adapter_store, timeout=max(1.0, settings.lease_seconds))
        with store.probe() as key:
            began = time.perf_counter()
            store.create(key, b"probe")
            there = store.get(key) == b"probe"
            seconds = time.perf_counter() - began
    except (AdapterError, ValueError, OSError) as error:
        yield Finding(
            "shared store",
            "wrong",
            f"{shown}: {error}",
            "its address, its credentials and a way to reach it: docs/replicas.md",
        )
        return
    if not there:
        yield Finding("shared store", "wrong", f"{shown}: does not give back what was just written")
        return
    slow = seconds > settings.lease_seconds / 4
    yield Finding(
        "shared store",
        "warning" if slow else "ok",
        f"{settings.adapter_store}: writes and reads an object in {seconds * 1000:.0f} ms",
        f"IDSPAM_LEASE_SECONDS={8 * seconds:.0f}" if slow else "",
    )


def address(settings: Settings) -> Iterator[Finding]:
    """Whether the port is free, and who has it."""
    from service.access.exposure import Exposed, refuse_exposed
    from service.http.server import address_text, listen

    where = address_text(settings.host, settings.port)
    try:
        listen(settings.host, settings.port).close()
    except OSError as error:
        answer = _answer_of(settings)
        if answer is not None:
            yield Finding("address", "ok", f"{where}: a service runs there: {answer}")
        else:
            yield Finding(
                "address",
                "wrong",
                f"cannot listen on {where}: {error.strerror or error}",
                "end what uses it, or IDSPAM_PORT with another port",
            )
    else:
        yield Finding("address", "ok", f"{where} is free")
    try:
        refuse_exposed(settings)
    except Exposed as error:
        yield Finding("access", "wrong", str(error))


def keys(settings: Settings) -> Iterator[Finding]:
    from service.access.exposure import access_of
    from service.access.key_file import BadKeys
    from service.access.keyring import keyring_of

    try:
        ring = keyring_of(settings)
    except BadKeys as error:
        remedy = command_line("service", "keys", "list") if settings.keys_file else ""
        yield Finding("keys", "wrong", str(error), remedy)
        return
    for fault in ring.unusable():
        yield Finding("keys", "warning", fault, "revoke it, and create another")
    match access_of(settings):
        case "keys" if not len(ring):
            yield Finding(
                "keys",
                "wrong",
                "keys are required and there are none: every request is refused",
                command_line("service", "keys", "create", "admin", "--scopes", "all"),
            )
        case "keys":
            yield Finding("keys", "ok", f"{len(ring)}")
        case "loopback":
            yield Finding("keys", "ok", "none; only this machine can ask")
        case "open":
            yield Finding(
                "keys", "warning", "none; everybody who reaches this service may do everything"
            )


def certificate(settings: Settings) -> Iterator[Finding]:
    from service.access.tls import BadCertificate, certificate_of

    try:
        found = certificate_of(settings)
        if found is None:
            return
        found.check()
    except BadCertificate as error:
        yield Finding("certificate", "wrong", str(error))
        return
    yield Finding("certificate", "ok", str(found.cert))


def records(settings: Settings) -> Iterator[Finding]:
    from service.records.audit import check_audit_log
    from service.records.decisions import check_decision_log

    if not settings.adapter_dir.is_dir() and settings.audit_log == Path():
        # Beside the adapters; what makes their folder makes its own.
        return
    for name, check in (("audit log", check_audit_log), ("decision log", check_decision_log)):
        setting = f"IDSPAM_{name.replace(' ', '_').upper()}"
        try:
            check(settings)
        except OSError as error:
            why = f"{setting}: cannot be written: {error.strerror or error}"
            yield Finding(name, "wrong", why, f"a place that this user ({_user()}) may write")
        else:
            if getattr(settings, name.replace(" ", "_")) is not None:
                yield Finding(name, "ok", "can be written")


def proxies(settings: Settings) -> Iterator[Finding]:
    """Through which proxy the hub is asked, and commands ask a service."""
    import httpx

    from service.client.environment import service_url
    from service.client.errors import InvalidCall
    from service.client.proxies import proxy_of

    places = {"the hub": os.environ.get("HF_ENDPOINT") or "https://huggingface.co"}
    # A free port is known once the service has taken it.
    if settings.port:
        places["the service"] = service_url()
    if settings.otlp_endpoint:
        places["traces"] = settings.otlp_endpoint
    used = []
    for what, url in places.items():
        try:
            proxy = proxy_of(httpx.URL(url))
        except (InvalidCall, httpx.InvalidURL) as error:
            yield Finding("proxies", "wrong", f"{what}: {error}")
            continue
        if proxy is not None:
            used.append(f"{what} {proxy}")
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    shown = "; ".join(used) or "none"
    if offline not in ("", "0"):
        shown += f"; HF_HUB_OFFLINE={offline}: the hub is never asked"
    yield Finding("proxies", "ok", shown)


def clock(_: Settings) -> Iterator[Finding]:
    """Keys, certificates and leases depend on it. This program's own files are older than now."""
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    now = time.time()
    if newest > now + 60:
        days = (newest - now) / 86400
        yield Finding(
            "clock",
            "wrong",
            f"{_utc(now)}, {days:,.1f} days before files of this program were written",
            "set the time of this machine",
        )
    else:
        yield Finding("clock", "ok", _utc(now))


def descriptors(settings: Settings) -> Iterator[Finding]:
    import resource

    from service.http.connections import limits_of
    from service.start import StartFailed

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = most == resource.RLIM_INFINITY
    try:
        limits = limits_of(settings)
    except StartFailed as error:
        yield Finding("open files", "wrong", str(error), "ulimit -n 8192, before the start")
        return
    shown = "no limit" if unlimited else f"{most:,}"
    low = not unlimited and most < _LEAST_DESCRIPTORS
    yield Finding(
        "open files",
        "warning" if low else "ok",
        f"{shown}, so {limits.connections:,} connections in a process",
        "ulimit -n 8192, before the start" if low else "",
    )


def memory(settings: Settings) -> Iterator[Finding]:
    free = _free_memory()
    if free is None:
        return
    try:
        workers = workers_of(settings.workers, settings.device)
    except ValueError:
        # The device is a finding of its own.
        workers = 0
    needed = _LEAST_MEMORY_MIB + workers * _WORKER_MIB
    state: State = "ok" if free >= needed else "warning"
    remedy = "" if state == "ok" else f"about {needed:,} MiB for a small backbone; fewer workers"
    yield Finding("memory", state, f"{free:,.0f} MiB available", remedy)


# In their order. The name is printed if a check itself fails.
CHECKS: Mapping[str, Check] = {
    "packages": python_and_packages,
    "processors": processors,
    "memory": memory,
    "open files": descriptors,
    "clock": clock,
    "adapter folder": adapter_folder,
    "zoo": zoo,
    "shared store": shared_store,
    "keys": keys,
    "certificate": certificate,
    "records": records,
    "address": address,
    "proxies": proxies,
    "device": device,
    "backbone": backbone,
}


def findings(check: str, settings: Settings) -> Iterator[Finding]:
    """What a check finds; a check that cannot run is a finding too."""
    try:
        yield from CHECKS[check](settings)
    except ImportError as error:
        yield Finding(check, "wrong", f"cannot be looked at: {error}", "make setup")
    except Exception as error:
        yield Finding(check, "wrong", f"cannot be looked at: {type(error).__name__}: {error}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())


def _unwritable(folder: Path) -> str | None:
    """Why nothing could be written there; None if it could be. Leaves nothing."""
    place = _existing(folder)
    if not place.is_dir():
        return f"{place} is not a folder"
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".probe-"):
            return None
    except OSError as error:
        return f"{place}: {error.strerror or error}"


def _holder(folder: Path) -> str:
    """The process of the service that uses a folder; "" if none does."""
    import fcntl

    try:
        with (folder / ".service.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "?"
    except OSError:
        pass
    return ""


def _answer_of(settings: Settings) -> str | None:
    """What a service at the settings' address says of itself; None if none answers."""
    from service.client import Client, ClientError
    from service.client.environment import ca_file, service_url

    environ = {"IDSPAM_PORT": str(settings.port), "IDSPAM_HOST": settings.host}
    environ |= {"IDSPAM_TLS_CERT": str(settings.tls_cert)} if settings.tls_cert else {}
    try:
        with Client(service_url(None, environ), ca=ca_file(), seconds=_HTTP_SECONDS) as client:
            health = client.ready()
    except ClientError:
        return None
    return "ready" if health.ok else f"not ready: {health.reason}"


def _cpu_quota() -> float | None:
    """The processors that a container may use at a time, in cgroup v2; None: all."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _free_memory() -> float | None:
    """MiB that can be used without swapping, within a container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
        free = values["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) / _MIB
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) / _MIB
        return min(free, limit - used)
    except (OSError, ValueError):
        return free


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))

"""A service without keys is for this machine alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from service.access.exposure import Exposed, access_of, is_loopback, refuse_exposed
from service.settings import InvalidSettings, read_settings
from tests.support.key_files import write_keys
from tests.support.service_process import TREE


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_loopback_needs_no_keys(host: str) -> None:
    settings = read_settings({"IDSPAM_HOST": host})
    refuse_exposed(settings)
    assert access_of(settings) == "loopback"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "no-such.invalid"])
def test_any_other_address_needs_keys_or_consent(host: str) -> None:
    environ = {"IDSPAM_HOST": host}
    with pytest.raises(Exposed) as caught:
        refuse_exposed(read_settings(environ))
    line = str(caught.value)
    assert line.startswith(f"IDSPAM_HOST={host} without keys lets everybody in: ")
    for way in ("IDSPAM_KEYS_FILE", "IDSPAM_HOST=127.0.0.1", "IDSPAM_PUBLISHED", "IDSPAM_OPEN=yes"):
        assert way in line
    for more, access in (
        ({"IDSPAM_OPEN": "yes"}, "open"),
        ({"IDSPAM_API_KEYS": "x"}, "keys"),
        ({"IDSPAM_ADMIN_KEYS": "x"}, "keys"),
        ({"IDSPAM_KEYS_FILE": "/x"}, "keys"),
        ({"IDSPAM_PUBLISHED": "127.0.0.1"}, "loopback"),
    ):
        settings = read_settings(environ | more)
        refuse_exposed(settings)
        assert access_of(settings) == access


def test_a_port_that_is_published_elsewhere_needs_keys_too() -> None:
    environ = {"IDSPAM_HOST": "0.0.0.0", "IDSPAM_PUBLISHED": "0.0.0.0"}
    with pytest.raises(Exposed, match=r"IDSPAM_PUBLISHED=0\.0\.0\.0 without keys"):
        refuse_exposed(read_settings(environ))


def test_a_name_is_loopback_only_if_all_its_addresses_are() -> None:
    assert is_loopback("localhost")
    assert not is_loopback("no-such.invalid")
    assert not is_loopback("")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("IDSPAM_OPEN", "1"),
        ("IDSPAM_OPEN", ""),
        ("IDSPAM_PUBLISHED", "example.org"),
        ("IDSPAM_ALLOWED_HOSTS", "http://x"),
        ("IDSPAM_ALLOWED_HOSTS", "x:80"),
        ("IDSPAM_ALLOWED_ORIGINS", "x.example"),
        ("IDSPAM_ALLOWED_ORIGINS", "https://x.example/"),
    ],
)
def test_a_bad_value_names_its_key(key: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=f"^{key}: "):
        read_settings({key: value})


def started(tmp_path: Path, **settings: str) -> "subprocess.CompletedProcess[str]":
    """A service whose start must fail."""
    environ = {"IDSPAM_PORT": "0", "IDSPAM_ADAPTER_DIR": str(tmp_path / "adapters"), "PATH": ""}
    environ |= {f"IDSPAM_{key}": value for key, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        cwd=TREE,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_start_fails_in_one_line(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "keys.jsonl"
    write_keys(path, ci={})
    path.chmod(0o644)
    for settings, said in (
        ({"HOST": "0.0.0.0"}, "IDSPAM_HOST=0.0.0.0 without keys lets everybody in"),
        ({"KEYS_FILE": str(path)}, f"{path}: others can read or change it (mode 0644)"),
        ({"KEYS": "{"}, "IDSPAM_KEYS: line 1: "),
    ):
        done = started(tmp_path, WORKERS=workers, **settings)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"service: {said}")
        assert done.stderr.count("\n") == 1

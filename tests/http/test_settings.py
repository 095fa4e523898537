"""The settings: one table, read from the environment, refused by name, documented as they are."""

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from adapters.backbone.loading import DEFAULT_BACKBONE
from service.local import engine_settings
from service.service_links import service_links
from service.settings import (
    CPU_BATCH_TOKENS,
    InvalidSettings,
    Settings,
    read_settings,
    settings_table,
    variable,
)

TREE = Path(__file__).resolve().parents[2]


def test_nothing_set_is_the_default_backbone_on_the_loopback_interface() -> None:
    settings = read_settings({"PATH": "/bin", "IDSPAMX": "1"})
    assert settings == Settings()
    assert settings.backbone == DEFAULT_BACKBONE
    assert (settings.host, settings.port, settings.dtype) == ("127.0.0.1", 8000, "auto")
    assert settings.adapter_dir == Path("data/adapters")
    assert settings.zoo_dir == TREE / "adapters" / "zoo"
    assert settings.api_keys == settings.admin_keys == ()


def test_settings_cannot_be_changed_once_read() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]  # what the test is about


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("IDSPAM_PORT", "80x"),
        ("IDSPAM_PORT", "65536"),
        ("IDSPAM_PORT", "-1"),
        ("IDSPAM_PORT", ""),
        ("IDSPAM_PORT", "٣"),
        ("IDSPAM_PORT", "9" * 5000),
        ("IDSPAM_DTYPE", "float16"),
        ("IDSPAM_BACKBONE", " "),
        ("IDSPAM_HOST", ""),
        ("IDSPAM_MAX_BATCH_TOKENS", "none"),
        ("IDSPAM_MAX_BATCH_TOKENS", "0"),
        ("IDSPAM_MAX_WAITING_TOKENS", "1e6"),
        ("IDSPAM_MAX_ACTIVE_ADAPTERS", "0"),
        ("IDSPAM_DRAIN_SECONDS", "nan"),
        ("IDSPAM_DRAIN_SECONDS", "-1"),
        ("IDSPAM_DRAIN_SECONDS", "soon"),
        ("IDSPAM_ADAPTER_DIR", ""),
        ("IDSPAM_WORKERS", "-1"),
        ("IDSPAM_WORKERS", "automatic"),
        ("IDSPAM_LOG_LEVEL", "loud"),
        ("IDSPAM_API_KEYS", "two words"),
        ("IDSPAM_ADAPTER_WEIGHTS", "a"),
        ("IDSPAM_ADAPTER_WEIGHTS", "a=0"),
        ("IDSPAM_ADAPTER_WEIGHTS", "a=nan"),
        ("IDSPAM_ADAPTER_WEIGHTS", "a=1,a=2"),
        ("IDSPAM_ADAPTER_WEIGHTS", "Not A Name=1"),
    ],
)
def test_a_bad_value_is_refused_naming_its_key(key: str, value: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_settings({key: value})
    (fault,) = caught.value.faults
    assert fault.startswith(f"{key}: ")


def test_adapter_weights_are_read_by_name() -> None:
    settings = read_settings({"IDSPAM_ADAPTER_WEIGHTS": " a=2, b.c = 0.5,"})
    assert settings.adapter_weights == {"a": 2.0, "b.c": 0.5}
    assert read_settings({}).adapter_weights == {}
    assert read_settings({}).max_waiting_tokens is None


def test_every_bad_value_and_unknown_name_is_told_at_once() -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_settings({"IDSPAM_PORT": "x", "IDSPAM_BACKBONES": "b", "IDSPAM_QQQ": "1"})
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "IDSPAM_BACKBONES",
        "IDSPAM_PORT",
        "IDSPAM_QQQ",
    ]
    assert "did you mean IDSPAM_BACKBONE?" in caught.value.faults[0]


def test_a_clients_key_under_the_services_prefix_is_refused_naming_both_variables() -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_settings({"IDSPAM_API_KEY": "hush"})
    (fault,) = caught.value.faults
    assert fault.startswith("IDSPAM_API_KEY: no such setting")
    assert "service reads IDSPAM_API_KEYS" in fault
    assert "clients read ID_SPAM_API_KEY" in fault
    assert "hush" not in fault


# What Kubernetes sets for the services `idspam` and `idspam-foo` of a namespace.
SERVICE_LINKS = {
    "IDSPAM_PORT": "tcp://10.0.0.1:8000",
    "IDSPAM_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "IDSPAM_PORT_8000_TCP_ADDR": "10.0.0.1",
    "IDSPAM_PORT_8000_TCP_PORT": "8000",
    "IDSPAM_PORT_8000_TCP_PROTO": "tcp",
    "IDSPAM_SERVICE_HOST": "10.0.0.1",
    "IDSPAM_SERVICE_PORT": "8000",
    "IDSPAM_SERVICE_PORT_HTTP": "8000",
    "IDSPAM_FOO_PORT": "udp://[fd00::7]:53",
    "IDSPAM_FOO_PORT_53_UDP": "udp://[fd00::7]:53",
    "IDSPAM_FOO_PORT_53_UDP_ADDR": "fd00::7",
    "IDSPAM_FOO_SERVICE_HOST": "fd00::7",
    "IDSPAM_FOO_SERVICE_PORT": "53",
}


def test_service_links_of_kubernetes_are_no_settings() -> None:
    assert read_settings(SERVICE_LINKS) == Settings()
    environ = SERVICE_LINKS | {"PATH": "/bin", "FOO_SERVICE_HOST": "10.0.0.1"}
    assert service_links(environ, "IDSPAM_") == sorted(SERVICE_LINKS)
    settings = read_settings(SERVICE_LINKS | {"IDSPAM_PORT": "8001"})
    assert settings.port == 8001


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("IDSPAM_PORT", "tcp"),
        ("IDSPAM_PORT", "tcp://10.0.0.1"),
        ("IDSPAM_PORT", "tcp://:8000"),
        ("IDSPAM_PORT", "tcp://10.0.0.1:80000"),
        ("IDSPAM_PORT", "tcp://[10.0.0.1:8000"),
        ("IDSPAM_PORT", "http://10.0.0.1:8000"),
        ("IDSPAM_SERVICE_HOST", "0.0.0.0"),
        ("IDSPAM_SERVICE_HOST", "localhost"),
        ("IDSPAM_SERVICE_PORT", "eight"),
        ("IDSPAM_SERVICE_PORT", "0"),
        ("IDSPAM_HOST_ADDR", "10.0.0.1"),
        ("IDSPAM_PROT", "8000"),
        ("IDSPAM_PORT_8000_TCP_PROTO", "http"),
    ],
)
def test_a_typo_is_not_taken_for_a_service_link(key: str, value: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_settings({key: value})
    assert caught.value.faults[0].startswith(f"{key}: ")


def test_the_variables_of_clients_are_ignored() -> None:
    environ = {"ID_SPAM_API_KEY": "hush", "ID_SPAM_URL": "http://elsewhere:8000"}
    assert read_settings(environ) == Settings()


def test_keys_are_neither_shown_in_errors_nor_in_logs() -> None:
    settings = read_settings({"IDSPAM_API_KEYS": "a1,b2 ,, ", "IDSPAM_ADMIN_KEYS": "c3"})
    assert (settings.api_keys, settings.admin_keys) == (("a1", "b2"), ("c3",))
    assert not any(key in repr(settings) for key in ("a1", "b2", "c3"))
    with pytest.raises(InvalidSettings) as caught:
        read_settings({"IDSPAM_API_KEYS": "hush hush"})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["IDSPAM_API_KEYS", "IDSPAM_ADMIN_KEYS"])
def test_commas_without_keys_are_refused(name: str) -> None:
    """As `"$ONE,$OTHER"` is if neither is set: taken for no keys, everybody could ask."""
    assert read_settings({name: ""}) == Settings()
    for value in (",", " , ,"):
        with pytest.raises(InvalidSettings, match=f"^{name}: there is no key"):
            read_settings({name: value})


def test_what_can_be_switched_off_or_left_to_the_device() -> None:
    assert read_settings({"IDSPAM_ZOO_DIR": "off"}).zoo_dir is None
    automatic = read_settings({"IDSPAM_DEVICE": "cpu", "IDSPAM_MAX_BATCH_TOKENS": "auto"})
    assert engine_settings(automatic).max_batch_tokens == CPU_BATCH_TOKENS
    chosen = read_settings({"IDSPAM_DEVICE": "cpu", "IDSPAM_MAX_BATCH_TOKENS": "4_096"})
    assert engine_settings(chosen).max_batch_tokens == 4096


def test_the_table_has_a_row_for_every_setting() -> None:
    rows = settings_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [variable(item.name) for item in fields(Settings)]
    assert all(row.count("|") == 5 for row in rows)


def test_the_page_has_the_table_as_it_is() -> None:
    page = (TREE / "docs" / "settings.md").read_text()
    table = re.search(r"<!-- settings -->\n(.*?)<!-- /settings -->", page, re.DOTALL)
    assert table, "docs/settings.md has no <!-- settings --> ... <!-- /settings -->"
    assert table[1].strip() == settings_table().strip(), "run: python -m service settings"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("IDSPAM_PORT", "x", "'x': must be a whole number from 0 to 65535"),
        ("IDSPAM_ZOO_DIR", "/no/zoo", "/no/zoo: no such folder; `off` is none"),
        (
            "IDSPAM_API_KEYS",
            ",",
            "there is no key between the commas; leave it unset if there are none",
        ),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_line_and_status_2(
    name: str, value: str, says: str, tmp_path: Path
) -> None:
    environ = {name: value, "PATH": "", "IDSPAM_ADAPTER_DIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        cwd=TREE,
        env=environ,
        capture_output=True,
        timeout=30,
    )
    assert ended.returncode == 2
    assert ended.stdout == b""
    assert ended.stderr.decode() == f"service: {name}: {says}\n"


def test_the_settings_command_prints_the_table() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "service", "settings"],
        cwd=TREE,
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert ended.stdout.decode() == settings_table()

"""The settings of a replica on Ray: what the config file may say, and what Ray decides."""

from pathlib import Path

import pytest
import yaml

from deploy.ray.arguments import checked, in_folder, replica_settings
from service.settings import InvalidSettings
from service.start import StartFailed
from tests.support.service_process import TREE

CONFIG = TREE / "deploy" / "ray" / "serve.yaml"


def test_arguments_are_settings_and_numbers_become_text() -> None:
    assert checked({"IDSPAM_MAX_INPUTS": 8, "IDSPAM_ZOO_DIR": "off"}) == {
        "IDSPAM_MAX_INPUTS": "8",
        "IDSPAM_ZOO_DIR": "off",
    }


def test_the_shipped_file_has_good_settings() -> None:
    (application,) = yaml.safe_load(CONFIG.read_text())["applications"]
    assert checked(application["args"])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"IDSPAM_DTYPE": "float64"}, "IDSPAM_DTYPE"),
        ({"IDSPAM_DTYP": "float32"}, "did you mean IDSPAM_DTYPE"),
        ({"backbone": "x"}, "backbone: no such setting"),
        ({"IDSPAM_PORT": 8000}, "http_options.port"),
        ({"IDSPAM_HOST": "::"}, "http_options.host"),
        ({"IDSPAM_WORKERS": 2}, "num_replicas"),
        ({"IDSPAM_TLS_CERT": "x.pem"}, "ssl_certfile"),
        # In YAML `off` is a boolean.
        (yaml.safe_load("IDSPAM_ZOO_DIR: off"), "IDSPAM_ZOO_DIR: False: put the value in quotes"),
        ({"IDSPAM_KEYS": ["a"]}, "quotes"),
        ({"IDSPAM_KEYS": None}, "quotes"),
    ],
)
def test_a_bad_argument_is_named(args: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidSettings, match=named):
        checked(args)


def test_the_environment_of_a_node_counts_but_not_what_ray_decides() -> None:
    environ = {"IDSPAM_WORKERS": "2", "IDSPAM_PORT": "1", "IDSPAM_MAX_INPUTS": "8", "HOME": "/x"}
    settings = replica_settings(environ, {"IDSPAM_MAX_INPUTS": "9"}, host="127.0.0.1")
    assert (settings.workers, settings.max_inputs) == (0, 9)
    with pytest.raises(InvalidSettings, match="IDSPAM_MAX_INPUTS"):
        replica_settings({"IDSPAM_MAX_INPUTS": "none"}, {}, host="127.0.0.1")


def test_a_proxy_that_others_reach_needs_keys() -> None:
    with pytest.raises(StartFailed, match=r"http_options.host: 0.0.0.0 without keys"):
        replica_settings({}, {}, host="0.0.0.0")
    for values in (
        {"IDSPAM_ADMIN_KEYS": "secret"},
        {"IDSPAM_OPEN": "yes"},
        {"IDSPAM_PUBLISHED": "127.0.0.1"},
    ):
        assert replica_settings({}, values, host="0.0.0.0").host == "0.0.0.0"


def test_replicas_share_no_folder_and_no_log(tmp_path: Path) -> None:
    values = {
        "IDSPAM_ADAPTER_DIR": str(tmp_path),
        "IDSPAM_DECISION_LOG": str(tmp_path / "log" / "decisions.jsonl"),
    }
    settings = replica_settings({}, values, host="127.0.0.1")
    own = in_folder(settings, tmp_path / "replica-3")
    assert own.adapter_dir == tmp_path / "replica-3"
    assert own.decision_log == tmp_path / "log" / "decisions-replica-3.jsonl"
    # `auto`: in the adapter folder.
    assert own.audit_log == settings.audit_log

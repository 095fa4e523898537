"""`settings --in-force`: every setting, its value, where it comes from, and no secret."""

import json
import subprocess
from dataclasses import fields
from typing import Any

from service.settings import Settings, variable
from tests.support.typed_commands import refused, typed

SECRETS = {
    "IDSPAM_API_KEYS": "hush-1,hush-2",
    "IDSPAM_ADMIN_KEYS": "hush-3",
    "HF_TOKEN": "hush-4",
    "HTTPS_PROXY": "http://me:hush-5@proxy:3128",
    "IDSPAM_OTLP_ENDPOINT": "http://me:hush-6@collector:4318",
}


def printed(*words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    more: dict[str, Any] = {**environ}
    return typed("settings", "--in-force", *words, **more)


def test_what_was_set_comes_first_and_secrets_are_hidden() -> None:
    done = printed(IDSPAM_WORKERS=" 2 ", **SECRETS)
    assert (done.returncode, done.stderr) == (0, "")
    heading, *lines = done.stdout.splitlines()
    assert heading.split() == ["setting", "value", "from"]
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    assert shown["IDSPAM_WORKERS"] == ["2", "environment"]
    assert shown["IDSPAM_PORT"] == ["8000", "default"]
    assert shown["IDSPAM_API_KEYS"] == ["(hidden)", "environment"]
    assert shown["IDSPAM_OTLP_ENDPOINT"] == ["http://...@collector:4318", "environment"]
    assert "hush" not in done.stdout
    sources = [line.split()[-1] for line in lines]
    assert sources == sorted(sources, reverse=True)
    assert {variable(setting.name) for setting in fields(Settings)} <= shown.keys()


def test_json_has_all_of_it() -> None:
    done = printed("--json", IDSPAM_PORT="8123", **SECRETS)
    rows = json.loads(done.stdout)
    assert {"variable": "IDSPAM_PORT", "value": "8123", "source": "environment"} in rows
    assert "hush" not in done.stdout


def test_a_service_link_is_not_in_force() -> None:
    done = typed("settings", "--in-force", IDSPAM_PORT="tcp://10.0.0.1:8000")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("IDSPAM_PORT ")]
    assert line.split() == ["IDSPAM_PORT", "8000", "default"]


def test_what_would_stop_the_start_is_said_instead() -> None:
    line = refused("settings", "--in-force", IDSPAM_PORT="x", IDSPAM_WORKER="2")
    assert "IDSPAM_PORT: 'x': must be a whole number" in line
    assert "IDSPAM_WORKER: no such setting; did you mean IDSPAM_WORKERS?" in line

"""What a machine without Triton, and a process without torch, can import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEED_TRITON = {
    "adapters.layers.float8",
    "adapters.layers.fused",
    "adapters.layers.fused_vectors",
    "adapters.layers.triton_float8",
    "adapters.layers.triton_layer",
    "adapters.layers.triton_vectors",
    "adapters.slots.forward",
    "adapters.slots.graphs",
    "adapters.slots.kernels",
    "adapters.slots.triton_rows",
    "adapters.slots.triton_tokens",
    "adapters.slots.triton_tuning",
    "adapters.slots.tuning",
}
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import adapters
for module in pkgutil.walk_packages(adapters.__path__, "adapters."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert "triton" in str(error), error
        print(module.name)
"""


def output_of(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_machine_without_triton_imports_everything_but_its_kernels() -> None:
    assert set(output_of(IMPORT_ALL).split()) == NEED_TRITON


@pytest.mark.slow
def test_a_machine_without_triton_has_every_family() -> None:
    output_of(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import adapters.backbone.families\n"
        "assert 'adapters.layers.fused' not in sys.modules\n"
        "assert 'bert' in adapters.backbone.families.FAMILIES\n"
    )


def test_the_store_and_the_tokenizer_load_no_torch() -> None:
    output_of(
        "import sys\n"
        "import adapters.format.spec, adapters.format.store, adapters.tokenizer\n"
        "assert 'torch' not in sys.modules\n"
    )

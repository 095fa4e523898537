"""What the supervisor shows of several engines' states."""

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.ipc.engine_states import EngineStates
from service.observability.metrics import Metrics


class Shown:
    """The states of two engines, and the metrics that they become."""

    def __init__(self) -> None:
        self.metrics = Metrics(CollectorRegistry(), routes=[], error_types=[])
        self.states = EngineStates(self.metrics)
        for number, engine in enumerate(("engine", "engine-1")):
            self.states.set_process(engine, 100 + number)
            self.start(engine, f"cuda:{number}")

    def start(self, engine: str, device: str) -> None:
        built = {"version": "1", "backbone": "b", "device": device, "dtype": "bfloat16"}
        self.states.report(engine, "started", None, built)

    def series(self, name: str) -> dict[tuple[str, ...], float]:
        """By the values of the labels."""
        text = self.metrics.exposition([name]).decode()
        return {
            tuple(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        }

    def value(self, name: str, *labels: str) -> float:
        return self.series(name)[labels]

    def devices(self) -> set[str]:
        # Labels are sorted by name: backbone, device, ...
        return {labels[1] for labels in self.series("idspam_build_info")}


@pytest.fixture
def shown() -> Shown:
    return Shown()


def report(shown: Shown, engine: str, scale: int) -> None:
    for method in ("waiting_tokens", "waiting_limit"):
        shown.states.report(engine, method, None, {"tokens": 10 * scale})
    pace = {"tokens_per_second": 100.0 * scale, "estimated_wait": 0.5 * scale}
    shown.states.report(engine, "pace", None, pace)
    tier = {"tier": "active", "adapters": 3 * scale, "bytes_held": 1000 * scale}
    shown.states.report(engine, "tier_size", "active", tier)


def test_several_engines_are_shown_as_one_and_apart(shown: Shown) -> None:
    report(shown, "engine", 1)
    report(shown, "engine-1", 2)
    assert shown.value("idspam_waiting_tokens") == 30
    assert shown.series("idspam_engine_waiting_tokens") == {("engine",): 10, ("engine-1",): 20}
    assert shown.value("idspam_waiting_tokens_limit") == 30
    assert shown.value("idspam_device_tokens_per_second") == 300
    assert shown.value("idspam_estimated_wait_seconds") == 0.5
    assert shown.value("idspam_tier_adapters", "active") == 6
    assert shown.value("idspam_tier_bytes", "active") == 3000
    assert shown.devices() == {"cuda:0", "cuda:1"}


def test_an_engine_that_has_ended_leaves_those_of_the_others(shown: Shown) -> None:
    report(shown, "engine", 1)
    report(shown, "engine-1", 2)
    shown.states.set_process("engine-1", None)
    assert shown.states.engine_of(101) is None
    assert shown.value("idspam_waiting_tokens") == 10
    assert shown.series("idspam_engine_waiting_tokens") == {("engine",): 10, ("engine-1",): 0}
    assert shown.value("idspam_device_tokens_per_second") == 100
    assert shown.value("idspam_tier_bytes", "active") == 1000
    assert shown.devices() == {"cuda:0"}
    shown.states.set_process("engine-1", 102)
    shown.start("engine-1", "cuda:1")
    assert shown.states.engine_of(102) == "engine-1"
    assert shown.devices() == {"cuda:0", "cuda:1"}
    for engine in ("engine", "engine-1"):
        shown.states.set_process(engine, None)
    assert shown.value("idspam_waiting_tokens") == 0
    assert shown.value("idspam_tier_bytes", "active") == 0
    assert shown.devices() == set()


def test_the_first_engine_takes_its_drift_with_it(shown: Shown) -> None:
    shown.metrics.adapter_published("a", ["x", "y"])
    drifted = {"adapter": "a", "texts": 200, "shifts": [("length", 0.3, 2)]}
    shown.states.report("engine", "drifted", "a", drifted)
    assert shown.value("idspam_adapter_drift_texts", "a") == 200
    shown.states.set_process("engine-1", None)
    assert shown.value("idspam_adapter_drift_texts", "a") == 200
    shown.states.set_process("engine-1", 103)
    shown.states.set_process("engine", None)
    assert shown.series("idspam_adapter_drift_texts") == {}

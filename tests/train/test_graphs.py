"""Steps that are padded to buckets and run again from one array: all of it but CUDA's graphs.

What needs a device is in tests/gpu/test_training.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.families import backbone_from, model_of, tokenizer_of
from tests.support.label_sets import label_sets
from tests.support.padded_methods import good_or_bad
from tests.support.training import Interrupt, PlainRecorder, RecordingProgress
from train.config.settings import CacheMode, FitSettings
from train.data.dataset import Dataset
from train.fit.fit import Training, set_up
from train.loop.buckets import LEAST, MOST, Buckets
from train.loop.graphs import Recorder, Run, StepInputs, recorder_for
from train.loop.loop import Loop
from train.loop.staging import Measured, Staging
from train.methods import METHODS, smop
from train.metrics import Metric

CPU = torch.device("cpu")
TRAIN = good_or_bad(25, seed=1)
SETTINGS = FitSettings(
    device="cpu",
    epochs=3,
    batch_size=8,
    learning_rate=6e-3,
    dropout=0.0,
    hidden_dropout=0.0,
    seed=5,
)
ADAPTERS = [
    name
    for name, method in METHODS.items()
    if method.not_an_adapter is None and not method.changes_backbone
]
# float32: sums of a batch in another order, carried on by 12 steps.
RTOL, ATOL = 1e-3, 2e-4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads wait for each other longer than such small products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


texts = st.lists(st.integers(1, 400), min_size=1, max_size=40)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(lengths=texts, room=st.integers(0, 40), beyond=st.integers(0, 300))
def test_fillers_make_a_step_exactly_as_large_as_its_bucket(
    lengths: list[int], room: int, beyond: int
) -> None:
    longest = max(lengths) + beyond
    padding = Buckets(batch_size=len(lengths) + room, longest=longest).padding(lengths)
    if longest < 2:
        assert padding is None
        return
    assert padding is not None
    bucket = padding.bucket
    filled = [*lengths, *padding.fillers]
    assert (len(filled), sum(filled)) == (bucket.rows, bucket.tokens)
    assert len(filled) > len(lengths) + room
    # No filler is longer than what the backbone has been seen to read.
    assert min(padding.fillers) >= 1
    assert max(filled) <= bucket.longest <= longest
    assert bucket.longest <= 256 or max(lengths) > 256


def test_most_steps_share_a_few_buckets_and_are_padded_little() -> None:
    random = torch.Generator().manual_seed(0)
    buckets = Buckets(batch_size=32, longest=256)
    found, text, padded = set(), 0, 0
    for _ in range(500):
        drawn = torch.empty(32).log_normal_(3.5, 0.6, generator=random)
        lengths = drawn.long().clamp(3, 256).tolist()
        padding = buckets.padding(lengths)
        assert padding is not None
        found.add(padding.bucket)
        text += sum(lengths)
        padded += padding.bucket.tokens
    assert len(found) <= 5
    assert padded < 1.35 * text


def test_steps_beyond_the_largest_bucket_have_none() -> None:
    buckets = Buckets(batch_size=64, longest=1024)
    assert buckets.padding([1024] * 64) is None
    largest = buckets.padding([500] * 64)
    assert largest is not None
    assert LEAST <= largest.bucket.tokens <= MOST


def prepared(method: str, folder: Path, *, data: Dataset = TRAIN, **values: Any) -> Training:
    return set_up(
        method,
        {"train": data},
        replace(SETTINGS, **values),
        backbone_from(model_of("bert"), tokenizer_of("bert")),
        selection="",
        metric=Metric.MICRO_F1 if data.multi_label else Metric.ACCURACY,
        checkpoint_file=folder / "state",
        progress=RecordingProgress(),
    )


def loop_of(training: Training, state: Path, recorder: Recorder | None) -> Loop:
    return Loop(
        training.method,
        training.recipe,
        train=training.splits["train"],
        validation=None,
        checkpoint_file=state,
        run="run",
        recorder=recorder,
    )


def trained(
    training: Training, start: dict[str, Tensor], folder: Path, recorder: Recorder | None
) -> tuple[list[float], dict[str, Tensor], RecordingProgress]:
    """The losses of all epochs and the weights at the end, from these weights at the start."""
    training.method.restore(start)
    loop = loop_of(training, folder / "state", recorder)
    progress = RecordingProgress()
    loop.fit(progress)
    return [epoch.loss for epoch in loop.checkpoint.history], training.method.snapshot(), progress


def assert_same_training(training: Training, folder: Path) -> None:
    start, recorder = training.method.snapshot(), PlainRecorder()
    losses, weights, _ = trained(training, start, folder, None)
    padded_losses, padded_weights, progress = trained(training, start, folder, recorder)
    assert padded_losses == pytest.approx(losses, rel=1e-4)
    for name, tensor in weights.items():
        assert not torch.equal(tensor, start[name]), name
        torch.testing.assert_close(padded_weights[name], tensor, rtol=RTOL, atol=ATOL)
    assert progress.notes == []
    # Of three epochs of four steps, without the first ones of each bucket.
    assert recorder.recorded >= 1
    assert recorder.replayed > 3
    training.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ADAPTERS)
def test_padded_steps_train_like_plain_ones(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smop, "NOISE", 0.0)
    assert_same_training(prepared(method, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [CacheMode.MEMORY, CacheMode.DISK, CacheMode.OFF])
def test_padded_steps_find_the_lower_layers_states_wherever_they_are(
    cache: CacheMode, tmp_path: Path
) -> None:
    assert_same_training(prepared("idspam", tmp_path, cache=cache), tmp_path)


def test_padded_steps_learn_sets_of_labels(tmp_path: Path) -> None:
    data = label_sets(25, seed=1)
    assert_same_training(prepared("idspam+vectors", tmp_path, data=data), tmp_path)


class _Unable(PlainRecorder):
    """Can record nothing."""

    def record(self, run: Run, inputs: StepInputs) -> Run:
        super().record(run, inputs)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_a_step_that_cannot_be_recorded_is_run_as_it_is_and_said_once(tmp_path: Path) -> None:
    training = prepared("idspam+vectors", tmp_path)
    start = training.method.snapshot()
    losses, weights, _ = trained(training, start, tmp_path, None)
    unable = _Unable()
    padded_losses, padded_weights, progress = trained(training, start, tmp_path, unable)
    (note,) = progress.notes
    assert note.startswith("CUDA graphs cannot be captured here (operation not permitted): ")
    assert padded_losses == pytest.approx(losses, rel=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(padded_weights[name], tensor, rtol=RTOL, atol=ATOL)
    assert unable.recorded == 1
    training.close()


def test_a_resumed_run_with_recorded_steps_has_the_bits_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    training = prepared("idspam+vectors", tmp_path, dropout=0.1, hidden_dropout=0.1)
    start = training.method.snapshot()
    losses, weights, _ = trained(training, start, tmp_path, PlainRecorder())

    training.method.restore(start)
    with pytest.raises(KeyboardInterrupt):
        loop_of(training, tmp_path / "cut", PlainRecorder()).fit(Interrupt(6))
    resumed = loop_of(training, tmp_path / "cut", PlainRecorder())
    resumed.resume()
    resumed.fit(RecordingProgress())
    assert [epoch.loss for epoch in resumed.checkpoint.history] == losses
    for name, tensor in training.method.snapshot().items():
        assert torch.equal(tensor, weights[name]), name
    training.close()


def test_staged_arrays_are_in_the_same_places_for_every_step() -> None:
    first = (torch.arange(3), torch.tensor([True, False]), torch.ones(2, 2, dtype=torch.bfloat16))
    measured = Measured(CPU)
    for values in first:
        assert torch.equal(measured.put(values), values)
    staging = Staging(CPU, measured.nbytes)
    places = [staging.put(values) for values in first]
    staging.seal()
    for number in range(2):
        staging.begin()
        step = [values + number if values.dtype != torch.bool else ~values for values in first]
        again = [staging.put(values) for values in step]
        assert [one.data_ptr() for one in again] == [one.data_ptr() for one in places]
        staging.copy()
        assert all(torch.equal(one, other) for one, other in zip(places, step, strict=True))


def test_a_step_whose_arrays_have_other_sizes_is_refused() -> None:
    staging = Staging(CPU, 64)
    staging.put(torch.arange(3))
    staging.seal()
    staging.begin()
    with pytest.raises(AssertionError, match="array 0"):
        staging.put(torch.arange(2))
    staging.begin()
    staging.put(torch.arange(3))
    with pytest.raises(AssertionError, match="more arrays"):
        staging.put(torch.arange(3))


def test_a_cpu_records_nothing(tmp_path: Path) -> None:
    training = prepared("idspam", tmp_path)
    assert recorder_for(training.method, training.recipe, None) is None
    training.close()

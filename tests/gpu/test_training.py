"""Training on a CUDA device: gradients through frozen layers; the generator over padded rows; steps
as CUDA graphs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone
from adapters.format.spec import VectorTuning
from adapters.layers import frozen, fused_vectors
from adapters.packed.layout import Layout
from adapters.packed.prompt import token_weights, weighted_sums
from adapters.packed.tuning import UniformTuning, tuning_weights
from tests.support.label_sets import label_sets
from tests.support.tiny_models import make_backbone, save_backbone
from tests.support.training import RecordingProgress, dataset
from train.config.settings import CacheMode, FitSettings
from train.data.dataset import Dataset
from train.fit.fit import Training, set_up
from train.loop.graphs import CudaRecorder, Recorder, Run, StepInputs, recorder_for
from train.loop.loop import Loop
from train.methods import METHODS
from train.metrics import Metric

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = np.array([3, 5, 5, 9, 17, 17, 40])


def _through(
    backbone: Backbone, states: Tensor, upstream: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    inputs = states.clone().requires_grad_()
    hidden = backbone.run_layers(inputs, 0, 2, layout)
    starts = torch.from_numpy(layout.starts).to(states.device)
    outputs = backbone.read(hidden, starts, layout)
    outputs.backward(upstream)
    assert inputs.grad is not None
    return outputs.detach().float(), inputs.grad.float()


def test_gradients_through_frozen_layers_are_those_of_the_plain_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 rounds to 8 bits, and sums have another order: 3 % of the largest value."""
    backbone = make_backbone(hidden_size=64).to(device="cuda", dtype=torch.bfloat16)
    layout = Layout(LENGTHS, torch.device("cuda"))
    random = torch.Generator(device="cuda").manual_seed(0)
    states, upstream = (
        torch.randn(size, 64, device="cuda", dtype=torch.bfloat16, generator=random)
        for size in (int(LENGTHS.sum()), len(LENGTHS))
    )
    ours = _through(backbone, states, upstream, layout)
    monkeypatch.setattr(frozen, "usable", lambda _: False)
    plain = _through(backbone, states, upstream, layout)
    for actual, expected in zip(ours, plain, strict=True):
        assert expected.abs().max() > 0
        assert float((actual - expected).abs().max() / expected.abs().max()) < 0.03


def _vector_gradients(backbone: Backbone, tuning: VectorTuning) -> dict[str, Tensor]:
    """Of the input and of all vectors, through every layer."""
    layout = Layout(LENGTHS, torch.device("cuda"))
    random = torch.Generator().manual_seed(0)
    leaves = {
        name: (torch.randn(shape, generator=random) * 0.3).cuda().requires_grad_()
        for name, shape in tuning.shapes(64).items()
    }
    states = torch.randn(layout.tokens, 64, generator=random).to("cuda", torch.bfloat16)
    changes = UniformTuning(tuning_weights(tuning, dict(leaves)))
    leaves["states"] = states.requires_grad_()
    hidden = backbone.run_layers(states, 0, 2, layout, changes)
    starts = torch.from_numpy(layout.starts).cuda()
    output = backbone.read(hidden, starts, layout, changes)
    output.backward(torch.randn(output.shape, generator=random).to("cuda", torch.bfloat16))
    return {name: leaf.grad.float() for name, leaf in leaves.items() if leaf.grad is not None}


def test_fused_vectors_have_the_gradients_of_pytorchs_own_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They round once where PyTorch's round after every step: 3 % apart after three layers."""
    backbone = make_backbone(hidden_size=64).to(device="cuda", dtype=torch.bfloat16)
    tuning = VectorTuning(layers=(0, 3), intermediate_size=128, activated=True)
    assert fused_vectors.usable(backbone.device, torch.bfloat16)
    fused = _vector_gradients(backbone, tuning)
    monkeypatch.setattr(fused_vectors, "usable", lambda *_: False)
    separate = _vector_gradients(backbone, tuning)
    assert set(separate) == {"states", *tuning.shapes(64)}
    for name, expected in separate.items():
        assert float((fused[name] - expected).norm() / expected.norm()) < 0.06, name


def test_padded_token_weights_are_those_by_run() -> None:
    """Equal to the CPU's within 1e-4: float32, with products in TF32 at most."""
    random = torch.Generator().manual_seed(0)
    tokens = int(LENGTHS.sum())
    queries, keys, states = (torch.randn(tokens, 16, generator=random) for _ in range(3))
    here, there = Layout(LENGTHS), Layout(LENGTHS, torch.device("cuda"))
    expected = token_weights(queries, keys, here)
    actual = token_weights(queries.cuda(), keys.cuda(), there)
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-3)
    sums = weighted_sums(states.cuda(), actual, there)
    torch.testing.assert_close(
        sums.cpu(), weighted_sums(states, expected, here), atol=1e-3, rtol=1e-3
    )


ROWS, EPOCHS, BATCH = 90, 6, 16
ADAPTERS = [name for name, kind in METHODS.items() if kind.not_an_adapter is None]


class Unrecorded(CudaRecorder):
    """Runs every step as it is, on the stream of those that are recorded."""

    def record(self, run: Run, inputs: StepInputs) -> Run:  # noqa: ARG002  # inherited
        return run


class Counted(CudaRecorder):
    """Counts captures and replays."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda", torch.cuda.current_device()))
        self.captured = self.replayed = 0

    def record(self, run: Run, inputs: StepInputs) -> Run:
        replay = super().record(run, inputs)
        self.captured += 1

        def counted(inputs: StepInputs) -> Tensor:
            self.replayed += 1
            return replay(inputs)

        return counted


class Broken(CudaRecorder):
    """Its steps read something from the device, which no capture allows."""

    def record(self, run: Run, inputs: StepInputs) -> Run:
        def reading(inputs: StepInputs) -> Tensor:
            figures = run(inputs)
            return figures * figures.sum().item()

        return super().record(reading, inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"), hidden_size=64, layers=3)


def prepared(
    method: str,
    folder: Path,
    state: Path,
    *,
    data: Dataset | None = None,
    dtype: str = "bfloat16",
    **values: Any,
) -> Training:
    settings = FitSettings(
        device="cuda", epochs=EPOCHS, batch_size=BATCH, seed=5, learning_rate=3e-3
    )
    data = data or dataset(ROWS, seed=1)
    return set_up(
        method,
        {"train": data},
        replace(settings, **values),
        load_backbone(str(folder), device="cuda", dtype=dtype),
        selection="",
        metric=Metric.MICRO_F1 if data.multi_label else Metric.ACCURACY,
        checkpoint_file=state,
        progress=RecordingProgress(),
    )


def trained(
    training: Training, start: dict[str, Tensor], state: Path, recorder: Recorder | None
) -> tuple[list[float], dict[str, Tensor], list[str]]:
    """The losses of all epochs, the weights at the end and the notes."""
    training.method.restore(start)
    loop = Loop(
        training.method,
        training.recipe,
        train=training.splits["train"],
        validation=None,
        checkpoint_file=state,
        run="run",
        recorder=recorder,
    )
    progress = RecordingProgress()
    loop.fit(progress)
    losses = [epoch.loss for epoch in loop.checkpoint.history]
    return losses, training.method.snapshot(), progress.notes


def distance(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, as a share of how far it has moved."""
    return max(
        float((one[name] - other[name]).norm() / (other[name] - start[name]).norm())
        for name in start
    )


def assert_replayed_like_run(training: Training, state: Path) -> None:
    start, counted = training.method.snapshot(), Counted()
    device = training.method.backbone.device
    run = trained(training, start, state, Unrecorded(device))
    replayed = trained(training, start, state, counted)
    assert counted.captured > 1
    # Of six epochs of six steps, without the first ones of each bucket.
    assert counted.replayed > 18
    assert replayed[0] == pytest.approx(run[0], rel=2e-3)
    assert distance(replayed[1], run[1], start) < 0.02
    assert replayed[2] == []


@pytest.mark.parametrize("method", ADAPTERS)
def test_replayed_steps_train_like_those_that_run(
    method: str, folder: Path, tmp_path: Path
) -> None:
    """With dropout: the same seeds and the same sizes drop the same. What is left are sums in
    another order, of atomic additions."""
    training = prepared(method, folder, tmp_path / "state")
    assert_replayed_like_run(training, tmp_path / "state")
    training.close()


@pytest.mark.parametrize("cache", [CacheMode.DISK, CacheMode.OFF])
def test_replayed_steps_find_the_lower_layers_states_wherever_they_are(
    cache: CacheMode, folder: Path, tmp_path: Path
) -> None:
    training = prepared("idspam", folder, tmp_path / "state", cache=cache)
    assert_replayed_like_run(training, tmp_path / "state")
    training.close()


def test_replayed_steps_learn_sets_of_labels(folder: Path, tmp_path: Path) -> None:
    data = label_sets(ROWS, seed=1)
    training = prepared("idspam+vectors", folder, tmp_path / "state", data=data)
    assert_replayed_like_run(training, tmp_path / "state")
    training.close()


@pytest.mark.parametrize("method", ["idspam", "idspam+vectors", "vectors", "lora", "head-only"])
def test_graphs_train_like_plain_steps(method: str, folder: Path, tmp_path: Path) -> None:
    """Without dropout: padding would draw others. Products of other sizes round otherwise."""
    training = prepared(method, folder, tmp_path / "state", dropout=0.0, hidden_dropout=0.0)
    start = training.method.snapshot()
    plain = trained(training, start, tmp_path / "state", None)
    graphs = trained(training, start, tmp_path / "state", Counted())
    assert graphs[0] == pytest.approx(plain[0], rel=0.02)
    assert distance(graphs[1], plain[1], start) < 0.2
    training.close()


def test_a_step_that_cannot_be_captured_is_launched_kernel_by_kernel(
    folder: Path, tmp_path: Path
) -> None:
    training = prepared("idspam+vectors", folder, tmp_path / "state")
    start = training.method.snapshot()
    device = training.method.backbone.device
    losses, _, notes = trained(training, start, tmp_path / "state", Broken(device))
    (note,) = notes
    assert "CUDA graphs cannot be captured here" in note
    assert losses[-1] < losses[0]
    # The device is as good as before.
    assert_replayed_like_run(training, tmp_path / "state")
    training.close()


def test_runs_that_no_graph_suits_have_no_recorder(folder: Path, tmp_path: Path) -> None:
    training = prepared("idspam", folder, tmp_path / "state")
    method, recipe = training.method, training.recipe
    assert isinstance(recorder_for(method, recipe, None), CudaRecorder)
    assert recorder_for(method, replace(recipe, micro_batch=BATCH // 2), None) is None
    training.close()
    idpg = prepared("idpg", folder, tmp_path / "state")
    assert recorder_for(idpg.method, idpg.recipe, None) is None
    idpg.close()
    wide = prepared("idspam", folder, tmp_path / "state", dtype="float32")
    assert recorder_for(wide.method, wide.recipe, None) is None
    wide.close()

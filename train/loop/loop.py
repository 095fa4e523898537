"""The training loop: epochs of packed batches for one method; the best weights are kept."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters.format.files import all_finite
from adapters.heap import trim_heap
from train.config.recipe import Recipe
from train.errors import TrainingError
from train.loop.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.loop.distributed import ProcessGroup
from train.loop.encoded_splits import Split
from train.loop.graphs import PaddedStep, PaddedSteps, Recorder
from train.loop.optimizer import Optimizer
from train.loop.progress import EpochReport, Progress
from train.loop.trunk_cache import TrunkCache
from train.methods.method import Method
from train.metrics import Metric, MultiLabelMetrics

EVALUATION_TOKENS = {"cpu": 8192, "cuda": 65536}
# Steps between two reads of the losses from the device; a GPU idles during each read.
CHECK_STEPS = {"cpu": 1, "cuda": 32}
# Steps between two trims of the heap, which take some milliseconds. A GPU's tensors are not there.
TRIM_STEPS = {"cpu": 32, "cuda": 1024}
# A killed run loses at most SAVE_SECONDS of work. The end of an epoch is saved as well, if saving
# takes at most SAVE_SHARE of the time.
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Of every validation row: labels that were given rightly, and labels that it has or was given.

    With one label a text these are 1 or 0, and 2. micro-F1 is twice the one sum over the other.
    """

    hits: list[int]
    occurs: list[int]


class Loop:
    """Trains `method` on `train`; `validation`, if given, decides which epoch is the best.

    Args:
        checkpoint_file: where checkpoints are written; `run` identifies data and settings in them.
        recorder: for steps that run again without Python (`train.loop.graphs`).
    """

    def __init__(
        self,
        method: Method,
        recipe: Recipe,
        *,
        train: Split,
        validation: Split | None,
        checkpoint_file: Path,
        run: str,
        group: ProcessGroup | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._method = method
        self._objective = method.objective
        self.recipe = recipe
        self._train = train
        self._validation = validation
        self._file = checkpoint_file
        self._run = run
        self._group = group or ProcessGroup()
        self._device = method.backbone.device
        self._check_steps = CHECK_STEPS.get(self._device.type, 1)
        self._trim_steps = TRIM_STEPS.get(self._device.type, 32)
        self._optimizer = Optimizer(method, recipe)
        self._tensors = self._optimizer.tensors
        self._padded: PaddedSteps | None = None
        if recorder is not None:
            self._padded = PaddedSteps(
                method, self._optimizer, train, batch_size=recipe.batch_size, recorder=recorder
            )
        self._steps = math.ceil(len(train.cache) / recipe.batch_size)
        self._best = method.snapshot()
        self._updating = False
        # Loss and hits of the steps since the last check, [2] each, still on the device.
        self._unread: list[Tensor] = []
        # When the last checkpoint was complete, and how long it took to write.
        self._saved_at, self._save_seconds = time.perf_counter(), 0.0
        self.checkpoint = Checkpoint()

    def resume(self) -> None:
        """Continue from the saved checkpoint.

        Raises:
            ResumeError: there is none, or it is another run's.
        """
        self.checkpoint, self._best = load_checkpoint(
            self._file, run=self._run, weights=self._tensors, optimizer=self._optimizer.adamw
        )

    def fit(self, progress: Progress) -> None:
        """Train all epochs, or until patience runs out; the method ends with the best weights.

        An interrupt (Ctrl-C) writes a checkpoint and is raised again.

        Raises:
            TrainingError: the loss is not finite; the message names the step. The last good
                checkpoint stays: the first one is written before the first step.
        """
        with self._group.deferred_interrupts():
            try:
                if self.checkpoint == Checkpoint():
                    self.save()
                while self.checkpoint.epoch < self.recipe.epochs and not self._is_out_of_patience():
                    self._epoch(progress)
                    self._group.raise_if_interrupted()
            except KeyboardInterrupt:
                # During an update weights and counters disagree: keep the last checkpoint.
                if not self._updating:
                    self.save()
                raise
        if self._validation is not None:
            self._method.restore(self._best)

    def save(self) -> None:
        """Write a checkpoint, unless a weight is not finite: then the last one stays.

        Raises:
            TrainingError: the loss is not finite.
        """
        self._check()
        started = time.perf_counter()
        if self._group.rank == 0 and all_finite(*self._tensors.values()):
            save_checkpoint(
                self._file,
                self.checkpoint,
                run=self._run,
                weights=self._tensors,
                best=self._best,
                optimizer=self._optimizer.adamw,
            )
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - started

    def answer_with(self, method: Method) -> None:
        """From now on `logits` are another method's."""
        self._method = method

    @torch.no_grad()
    def logits(self, split: Split) -> Tensor:
        """Logits of every example, float32 [examples, labels] on the CPU."""
        self._method.eval()
        logits = torch.zeros(len(split.cache), len(self._method.labels))
        chunks = list(split.cache.chunks(EVALUATION_TOKENS.get(self._device.type, 8192)))
        for number in self._group.shard(range(len(chunks))):
            chunk_logits, index = self._forward(split.cache, chunks[number])
            logits[index] = chunk_logits.cpu()
        return self._group.all_reduce(logits)

    def validation_counts(self) -> RowCounts:
        """How the present weights answer the validation rows."""
        assert self._validation is not None, "only what is compared is counted"
        true = self._validation.classes
        predicted = self._objective.predict(self.logits(self._validation))
        if true.dim() == 1:
            return RowCounts((predicted == true).int().tolist(), [2] * len(true))
        has = true > 0
        return RowCounts(
            (predicted & has).sum(dim=1).tolist(),
            (has.int() + predicted.int()).sum(dim=1).tolist(),
        )

    def _is_out_of_patience(self) -> bool:
        return (
            self._validation is not None
            and self.checkpoint.epoch - self.checkpoint.best_epoch >= self.recipe.patience
        )

    def _epoch(self, progress: Progress) -> None:
        checkpoint, running = self.checkpoint, self.checkpoint.running
        texts = len(self._train.cache)
        started = time.perf_counter()
        before = running["seconds"]
        progress.begin(
            f"epoch {checkpoint.epoch + 1}/{self.recipe.epochs}",
            texts=texts - checkpoint.step * self.recipe.batch_size,
            later=(self.recipe.epochs - checkpoint.epoch - 1) * texts,
        )
        self._method.train()
        for indices in self._batches(checkpoint.epoch, checkpoint.step):
            if (padded := self._step(indices)) is not None:
                self._record(padded, progress)
            if len(self._unread) >= self._check_steps:
                self._check()
            if checkpoint.step % self._trim_steps == 0:
                trim_heap()
            now = time.perf_counter()
            running["seconds"] = before + now - started
            done = max(running["texts"], 1)
            progress.advance(
                len(indices), loss=running["loss"] / done, accuracy=running["hits"] / done
            )
            # Only right after a check: all processes have then seen the same losses.
            if not self._unread:
                self._group.raise_if_interrupted()
                if now - self._saved_at > SAVE_SECONDS:
                    self.save()
        self._check()
        running["seconds"] = before + time.perf_counter() - started
        report = self._validate(running)
        # An interrupt here has the epoch end once more, and its report replaces this one.
        checkpoint.history[checkpoint.epoch :] = [report]
        checkpoint.epoch, checkpoint.step = checkpoint.epoch + 1, 0
        checkpoint.seconds += report.seconds
        checkpoint.running = dict.fromkeys(running, 0.0)
        if time.perf_counter() - self._saved_at > min(
            SAVE_SECONDS, self._save_seconds / SAVE_SHARE
        ):
            self.save()
        progress.epoch_done(report)

    def _batches(self, epoch: int, skip: int) -> Iterator[list[int]]:
        random = np.random.default_rng([self.recipe.seed, epoch])
        order = random.permutation(len(self._train.cache))
        size = self.recipe.batch_size
        for step in range(skip, self._steps):
            yield order[step * size : (step + 1) * size].tolist()

    def _step(self, indices: list[int]) -> PaddedStep | None:
        """One step on these rows; returns it if it ran padded."""
        number = self.checkpoint.epoch * self._steps + self.checkpoint.step
        _seed(self._device, hash((self.recipe.seed, number, self._group.rank)) & 0x7FFF_FFFF)
        share = self._rate(number)
        padded = None if self._padded is None else self._padded.prepare(indices, share)
        if padded is None or self._padded is None:
            loss_and_hits = self._gradients(indices)
            self._optimizer.set_rates(self._optimizer.rates_at(share))
            self._updating = True
            self._optimizer.step()
        else:
            self._updating = True
            loss_and_hits = self._padded.run(padded)
        self._unread.append(self._group.all_reduce(loss_and_hits))
        self.checkpoint.running["texts"] += len(indices)
        self.checkpoint.step += 1
        self._updating = False
        return padded

    def _record(self, padded: PaddedStep, progress: Progress) -> None:
        assert self._padded is not None
        if (reason := self._padded.record(padded)) is not None:
            progress.note(
                f"CUDA graphs cannot be captured here ({reason}): every step is launched kernel by "
                "kernel, which is slower"
            )

    def _gradients(self, indices: list[int]) -> Tensor:
        """Set the gradients of these rows' mean loss; returns their summed loss and hits, [2]."""
        self._optimizer.zero_grad()
        loss_and_hits = torch.zeros(2, device=self._device)
        shard, size = self._group.shard(indices), self.recipe.micro_batch
        for first in range(0, len(shard), size):
            loss_and_hits += self._backward(shard[first : first + size], batch_size=len(indices))
        self._group.all_reduce_gradients(self._tensors.values())
        return loss_and_hits

    def _backward(self, indices: list[int], *, batch_size: int) -> Tensor:
        """Add these texts' gradients of the mean loss; returns their summed loss and hits, [2]."""
        logits, index = self._forward(self._train.cache, indices)
        true = self._train.classes[index].to(logits.device, non_blocking=True)
        loss = self._objective.loss(logits, true)
        (loss / batch_size).backward()
        return torch.stack([loss.detach(), self._objective.hits(logits, true)])

    def _check(self) -> None:
        """Read the losses of the last steps and add them to the running sums.

        Raises:
            TrainingError: a loss is not finite.
        """
        if not self._unread:
            return
        figures = torch.stack(self._unread).tolist()
        first = self.checkpoint.step - len(figures)
        self._unread.clear()
        for step, (loss, hits) in enumerate(figures, start=first + 1):
            if not math.isfinite(loss):
                kept = f"the last good state is in {self._file}; " if self._file.exists() else ""
                raise TrainingError(
                    f"the loss is {loss} at step {step} of epoch {self.checkpoint.epoch + 1}: "
                    f"stopped; {kept}a lower --lr usually helps"
                )
            self.checkpoint.running["loss"] += loss
            self.checkpoint.running["hits"] += hits

    def _rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        total = self._steps * self.recipe.epochs
        warmup = max(1, round(self.recipe.warmup_ratio * total))
        return min((step + 1) / warmup, (total - step) / max(1, total - warmup))

    def _forward(self, cache: TrunkCache, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Logits of some examples, and the examples' indices in the order of the logits."""
        batch = cache.pack(indices)
        logits: Tensor = self._method(batch, cache.trunk(indices, batch))
        return logits, torch.tensor(indices)[torch.from_numpy(batch.order)]

    def _validate(self, running: Mapping[str, float]) -> EpochReport:
        """Measure the epoch on the validation rows; keep its weights if they are the best."""
        started = time.perf_counter()
        epoch, metrics = self.checkpoint.epoch + 1, None
        if self._validation is None:
            self.checkpoint.best_epoch = epoch
        else:
            logits, true = self.logits(self._validation), self._validation.classes
            predicted = self._objective.predict(logits)
            metrics = self._objective.measure(predicted, true, labels=logits.shape[1])
            loss = float(self._objective.loss(logits, true)) / len(true)
            score = (self.recipe.metric.of(metrics), -loss)
            if score > self.checkpoint.best_score:
                # In this order: a run that is interrupted here must not take an older epoch's
                # weights for the best ones.
                self._best = self._method.snapshot()
                self.checkpoint.best_score, self.checkpoint.best_epoch = score, epoch
        return EpochReport(
            epoch=epoch,
            loss=running["loss"] / running["texts"],
            accuracy=Metric.ACCURACY.of(metrics) if metrics else None,
            macro_f1=metrics.macro_f1 if metrics else None,
            micro_f1=metrics.micro_f1 if isinstance(metrics, MultiLabelMetrics) else None,
            seconds=running["seconds"] + time.perf_counter() - started,
            texts_per_second=running["texts"] / max(running["seconds"], 1e-9),
        )


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for the CPU and this device alone: seeding every kind of device takes
    longer than packing a batch."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)

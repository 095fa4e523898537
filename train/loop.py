"""The training loop: one adapter's parameters, epochs of packed batches, the best weights kept.
Knows no files but the state of an interrupted run.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adapters.backbone import Backbone
from adapters.head import logits
from train.cache import TrunkCache
from train.errors import TrainingError
from train.metrics import measure
from train.module import AdapterModule
from train.progress import Progress
from train.report import EpochReport
from train.state import RunState, load_state, save_state

# AdamW as the paper has it.
BETAS = (0.9, 0.98)
EPSILON = 1e-6
CLIP_NORM = 1.0
EVALUATION_TOKENS = 8192
# A kill loses at most this much work.
SAVE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the loop needs of the settings, nothing left open."""

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    dropout: float
    patience: int
    seed: int


@dataclass(frozen=True, slots=True)
class Split:
    """Cached examples and their classes, int64 [examples]."""

    cache: TrunkCache
    classes: Tensor


class Loop:
    """Trains `module` on `train`, judged on `validation`.

    Args:
        state_file: where the run's state is kept; `run` identifies it.
    """

    def __init__(
        self,
        backbone: Backbone,
        module: AdapterModule,
        recipe: Recipe,
        *,
        train: Split,
        validation: Split | None,
        state_file: Path,
        run: str,
    ) -> None:
        self._backbone = backbone
        self._module = module
        self._recipe = recipe
        self._train = train
        self._validation = validation
        self._file = state_file
        self._run = run
        self._optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=recipe.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=recipe.weight_decay,
        )
        self._steps = math.ceil(len(train.cache) / recipe.batch_size)
        self._best = module.snapshot()
        self._updating = False
        self.state = RunState()

    def resume(self) -> None:
        """Go on where the saved state stands.

        Raises:
            ResumeError: there is none, or it is another run's.
        """
        self.state, self._best = load_state(
            self._file, run=self._run, weights=self._module.tensors, optimizer=self._optimizer
        )

    def fit(self, progress: Progress) -> None:
        """Train to the end or until the patience is used up; the module ends with the best weights.

        An interruption (Ctrl-C) saves the state and goes on upwards.

        Raises:
            TrainingError: the loss is not finite; the message says at which step. The last state
                that was saved before stays.
        """
        try:
            while self.state.epoch < self._recipe.epochs and not self._is_out_of_patience():
                self._epoch(progress)
        except KeyboardInterrupt:
            # Amid an update weights and counters disagree; what was saved last is sound.
            if not self._updating:
                self.save()
            raise
        if self._validation is not None:
            self._module.restore(self._best)

    def save(self) -> None:
        """Keep the state for `resume`."""
        save_state(
            self._file,
            self.state,
            run=self._run,
            weights=self._module.tensors,
            best=self._best,
            optimizer=self._optimizer,
        )

    def logits(self, split: Split) -> Tensor:
        """Logits of every example, float32 [examples, labels] on the CPU."""
        found = torch.empty(len(split.cache), len(self._module.spec.labels))
        with torch.no_grad():
            for chosen in split.cache.chunks(EVALUATION_TOKENS):
                made, index = self._forward(split.cache, chosen)
                found[index] = made.float().cpu()
        return found

    def _is_out_of_patience(self) -> bool:
        return (
            self._validation is not None
            and self.state.epoch - self.state.best_epoch >= self._recipe.patience
        )

    def _epoch(self, progress: Progress) -> None:
        state, running = self.state, self.state.running
        texts = len(self._train.cache)
        started = saved = time.perf_counter()
        before = running["seconds"]
        progress.begin(
            f"epoch {state.epoch + 1}/{self._recipe.epochs}",
            texts=texts - int(running["texts"]),
            later=(self._recipe.epochs - state.epoch - 1) * texts,
        )
        for chosen in self._batches(state.epoch, state.step):
            self._step(chosen)
            now = time.perf_counter()
            running["seconds"] = before + now - started
            done = running["texts"]
            progress.advance(
                len(chosen), loss=running["loss"] / done, accuracy=running["hits"] / done
            )
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = time.perf_counter()
        report = self._judge(running)
        state.history.append(report)
        state.epoch, state.step = state.epoch + 1, 0
        state.seconds += report.seconds
        state.running = dict.fromkeys(running, 0.0)
        self.save()
        progress.epoch_done(report)

    def _batches(self, epoch: int, skip: int) -> Iterator[list[int]]:
        random = np.random.default_rng([self._recipe.seed, epoch])
        order = random.permutation(len(self._train.cache))
        size = self._recipe.batch_size
        for step in range(skip, self._steps):
            yield order[step * size : (step + 1) * size].tolist()

    def _step(self, chosen: list[int]) -> None:
        number = self.state.epoch * self._steps + self.state.step
        torch.manual_seed(hash((self._recipe.seed, number)) & 0x7FFF_FFFF)
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * self._rate(number)
        made, index = self._forward(self._train.cache, chosen, dropout=self._recipe.dropout)
        true = self._train.classes[index].to(made.device)
        loss = functional.cross_entropy(made, true)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {self.state.step + 1} of epoch "
                f"{self.state.epoch + 1}: stopped; a lower --lr usually helps"
            )
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), CLIP_NORM)
        self._updating = True
        self._optimizer.step()
        running = self.state.running
        running["loss"] += value * len(chosen)
        running["hits"] += int((made.argmax(dim=-1) == true).sum())
        running["texts"] += len(chosen)
        self.state.step += 1
        self._updating = False

    def _rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        total = self._steps * self._recipe.epochs
        warmup = max(1, round(self._recipe.warmup_ratio * total))
        return min((step + 1) / warmup, (total - step) / max(1, total - warmup))

    def _forward(
        self, cache: TrunkCache, chosen: list[int], *, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Logits of some examples, and the examples' indices in the logits' order."""
        batch = cache.pack(chosen)
        answers = self._backbone.forward(
            batch, {0: self._module.generator}, trunk=cache.trunk(chosen, batch)
        )
        states = functional.dropout(answers.states.float(), dropout) if dropout else answers.states
        index = torch.tensor(chosen)[torch.from_numpy(batch.order)]
        return logits(states, self._module.head), index

    def _judge(self, running: Mapping[str, float]) -> EpochReport:
        """Measure the epoch on the validation rows; keep the weights if they are the best yet."""
        started = time.perf_counter()
        number, metrics = self.state.epoch + 1, None
        if self._validation is None:
            self.state.best_epoch = number
        else:
            made = self.logits(self._validation)
            metrics = measure(made.argmax(dim=-1), self._validation.classes, labels=made.shape[1])
            loss = float(functional.cross_entropy(made, self._validation.classes))
            score = (metrics.accuracy, -loss)
            if score > self.state.best_score:
                self.state.best_score, self.state.best_epoch = score, number
                self._best = self._module.snapshot()
        return EpochReport(
            epoch=number,
            loss=running["loss"] / running["texts"],
            accuracy=metrics.accuracy if metrics else None,
            macro_f1=metrics.macro_f1 if metrics else None,
            seconds=running["seconds"] + time.perf_counter() - started,
            texts_per_second=running["texts"] / max(running["seconds"], 1e-9),
        )

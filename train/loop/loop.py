"""The training loop: one method's parameters, epochs of packed batches, the best weights kept.
Knows no files but the state of an interrupted run.
"""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adapters.format.files import all_finite
from train.config.recipe import Recipe
from train.errors import TrainingError
from train.loop.checkpoint import RunState, load_state, save_state
from train.loop.distributed import Alone, Team
from train.loop.encoded_splits import Split
from train.loop.memory import give_back
from train.loop.progress import EpochReport, Progress
from train.loop.trunk_cache import TrunkCache
from train.methods.method import Method
from train.metrics import measure

# AdamW as the paper has it.
BETAS = (0.9, 0.98)
EPSILON = 1e-6
CLIP_NORM = 1.0
EVALUATION_TOKENS = {"cpu": 8192, "cuda": 65536}
# Steps after which the device's losses are read and checked. A GPU waits for the host each time.
CHECK_STEPS = {"cpu": 1, "cuda": 32}
# Steps after which freed memory is given back: some milliseconds each time.
GIVE_BACK_STEPS = 32
# A kill loses at most this much work; epochs are saved, too, where that takes at most this share of
# the time.
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.05


class Loop:
    """Trains `method` on `train`, judged on `validation`.

    Args:
        state_file: where the run's state is kept; `run` identifies it.
    """

    def __init__(
        self,
        method: Method,
        recipe: Recipe,
        *,
        train: Split,
        validation: Split | None,
        state_file: Path,
        run: str,
        team: Team | None = None,
    ) -> None:
        self._method = method
        self._recipe = recipe
        self._train = train
        self._validation = validation
        self._file = state_file
        self._run = run
        self._team: Team = team or Alone()
        self._device = method.backbone.device
        # Looking a module's parameters up takes as long as a small product.
        self._tensors = method.tensors
        self._check_steps = CHECK_STEPS.get(self._device.type, 1)
        self._optimizer = torch.optim.AdamW(
            method.groups(recipe.learning_rate),
            lr=recipe.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._steps = math.ceil(len(train.cache) / recipe.batch_size)
        self._best = method.snapshot()
        self._updating = False
        # Loss and hits of the steps since the last check, [2] each, where they were computed.
        self._unread: list[Tensor] = []
        # When the last save ended, and how long it took.
        self._saved, self._saving = time.perf_counter(), 0.0
        self.state = RunState()

    def resume(self) -> None:
        """Go on where the saved state stands.

        Raises:
            ResumeError: there is none, or it is another run's.
        """
        self.state, self._best = load_state(
            self._file, run=self._run, weights=self._tensors, optimizer=self._optimizer
        )

    def fit(self, progress: Progress) -> None:
        """Train to the end or until the patience is used up; the method ends with the best weights.

        An interruption (Ctrl-C) saves the state and goes on upwards.

        Raises:
            TrainingError: the loss is not finite; the message says at which step. The last state
                that was saved before stays: there is one from the start on.
        """
        with self._team.holding_interrupts():
            try:
                if self.state == RunState():
                    self.save()
                while self.state.epoch < self._recipe.epochs and not self._is_out_of_patience():
                    self._epoch(progress)
                    self._team.stop_if_interrupted()
            except KeyboardInterrupt:
                # Amid an update weights and counters disagree; what was saved last is sound.
                if not self._updating:
                    self.save()
                raise
        if self._validation is not None:
            self._method.restore(self._best)

    def save(self) -> None:
        """Keep the state for `resume`, unless weights are not finite: then the one before stays.

        Raises:
            TrainingError: the loss is not finite, so there is nothing to keep.
        """
        self._check()
        started = time.perf_counter()
        if self._team.rank == 0 and all_finite(*self._tensors.values()):
            save_state(
                self._file,
                self.state,
                run=self._run,
                weights=self._tensors,
                best=self._best,
                optimizer=self._optimizer,
            )
        self._saved = time.perf_counter()
        self._saving = self._saved - started

    @torch.no_grad()
    def logits(self, split: Split) -> Tensor:
        """Logits of every example, float32 [examples, labels] on the CPU."""
        self._method.eval()
        found = torch.zeros(len(split.cache), self._method.labels)
        chunks = list(split.cache.chunks(EVALUATION_TOKENS.get(self._device.type, 8192)))
        for number in self._team.share(range(len(chunks))):
            made, index = self._forward(split.cache, chunks[number])
            found[index] = made.cpu()
        return self._team.total(found)

    def _is_out_of_patience(self) -> bool:
        return (
            self._validation is not None
            and self.state.epoch - self.state.best_epoch >= self._recipe.patience
        )

    def _epoch(self, progress: Progress) -> None:
        state, running = self.state, self.state.running
        texts = len(self._train.cache)
        started = time.perf_counter()
        before = running["seconds"]
        progress.begin(
            f"epoch {state.epoch + 1}/{self._recipe.epochs}",
            texts=texts - state.step * self._recipe.batch_size,
            later=(self._recipe.epochs - state.epoch - 1) * texts,
        )
        self._method.train()
        for chosen in self._batches(state.epoch, state.step):
            self._step(chosen)
            if len(self._unread) >= self._check_steps:
                self._check()
            if state.step % GIVE_BACK_STEPS == 0:
                give_back()
            now = time.perf_counter()
            running["seconds"] = before + now - started
            done = max(running["texts"], 1)
            progress.advance(
                len(chosen), loss=running["loss"] / done, accuracy=running["hits"] / done
            )
            # Where all processes have checked: one that found a fault alone would leave the others.
            if not self._unread:
                self._team.stop_if_interrupted()
                if now - self._saved > SAVE_SECONDS:
                    self.save()
        self._check()
        running["seconds"] = before + time.perf_counter() - started
        report = self._judge(running)
        state.history.append(report)
        state.epoch, state.step = state.epoch + 1, 0
        state.seconds += report.seconds
        state.running = dict.fromkeys(running, 0.0)
        if time.perf_counter() - self._saved > min(SAVE_SECONDS, self._saving / SAVE_SHARE):
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
        seed = hash((self._recipe.seed, number, self._team.rank)) & 0x7FFF_FFFF
        _seed(self._device, seed)
        rate = self._recipe.learning_rate * self._rate(number)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self._optimizer.zero_grad()
        figures = torch.zeros(2, device=self._device)
        mine, size = self._team.share(chosen), self._recipe.micro_batch
        for first in range(0, len(mine), size):
            figures += self._gradients(mine[first : first + size], of=len(chosen))
        self._team.add_gradients(self._tensors.values())
        torch.nn.utils.clip_grad_norm_(self._tensors.values(), CLIP_NORM)
        self._updating = True
        self._optimizer.step()
        self._unread.append(self._team.total(figures))
        self.state.running["texts"] += len(chosen)
        self.state.step += 1
        self._updating = False

    def _gradients(self, chosen: list[int], *, of: int) -> Tensor:
        """Add some texts' share in the mean loss of `of` texts; their summed loss and hits, [2]."""
        made, index = self._forward(self._train.cache, chosen)
        true = self._train.classes[index].to(made.device, non_blocking=True)
        loss = functional.cross_entropy(made, true, reduction="sum")
        (loss / of).backward()
        return torch.stack([loss.detach(), (made.argmax(dim=-1) == true).sum()])

    def _check(self) -> None:
        """Add what the last steps gave to the running figures.

        Raises:
            TrainingError: a loss is not finite.
        """
        if not self._unread:
            return
        found = torch.stack(self._unread).tolist()
        first = self.state.step - len(found)
        self._unread.clear()
        for step, (loss, hits) in enumerate(found, start=first + 1):
            if not math.isfinite(loss):
                kept = f"the last good state is in {self._file}; " if self._file.exists() else ""
                raise TrainingError(
                    f"the loss is {loss} at step {step} of epoch {self.state.epoch + 1}: "
                    f"stopped; {kept}a lower --lr usually helps"
                )
            self.state.running["loss"] += loss
            self.state.running["hits"] += hits

    def _rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        total = self._steps * self._recipe.epochs
        warmup = max(1, round(self._recipe.warmup_ratio * total))
        return min((step + 1) / warmup, (total - step) / max(1, total - warmup))

    def _forward(self, cache: TrunkCache, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Logits of some examples, and the examples' indices in the logits' order."""
        batch = cache.pack(chosen)
        made: Tensor = self._method(batch, cache.trunk(chosen, batch))
        return made, torch.tensor(chosen)[torch.from_numpy(batch.order)]

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
            score = (self._recipe.metric.of(metrics), -loss)
            if score > self.state.best_score:
                self.state.best_score, self.state.best_epoch = score, number
                self._best = self._method.snapshot()
        return EpochReport(
            epoch=number,
            loss=running["loss"] / running["texts"],
            accuracy=metrics.accuracy if metrics else None,
            macro_f1=metrics.macro_f1 if metrics else None,
            seconds=running["seconds"] + time.perf_counter() - started,
            texts_per_second=running["texts"] / max(running["seconds"], 1e-9),
        )


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for the CPU and this device: asking every kind of device there might be
    takes longer than packing a batch."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)

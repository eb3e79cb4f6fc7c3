"""The training loop: steps, logs, validation, checkpoints, and a clean stop.

Everything random is a function of the recipe's seed and the step, so that a run that was killed
and resumed ends with the same weights as one that was not (on CPU, with the same threads).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from reflexarc.contract import NormalizationStatistics
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.checkpoint import save_checkpoint
from reflexarc.policy.interface import Policy
from reflexarc.policy.processing import Processor
from reflexarc.training.config import Recipe
from reflexarc.training.metrics import Interval, refuse_not_finite
from reflexarc.training.objective import Objective
from reflexarc.training.optimization import AveragedWeights, make_optimizer
from reflexarc.training.outcome import Outcome
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.samples import BatchOrder, BatchSource, derived_seed, seeded_generator
from reflexarc.training.schedule import learning_rate_factor
from reflexarc.training.training_state import (
    Progress,
    load_training_state,
    training_tensors,
    write_training_state,
)
from reflexarc.training.validation import validate


class Trainer:
    """Trains one policy by one recipe into one run folder.

    Args:
        recipe: decides everything.
        policy, objective: on their device already.
        train, held_out: batches; without ``held_out`` nothing is validated.
        processor, statistics: of the checkpoint.
        provenance: what every checkpoint says beside position and metrics.
        run: where to write.
        progress_bar: whether to draw one.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        objective: Objective,
        train: BatchSource,
        held_out: BatchSource | None,
        processor: Processor,
        statistics: NormalizationStatistics,
        provenance: Mapping[str, Any],
        run: RunFolder,
        *,
        progress_bar: bool = True,
    ) -> None:
        self.recipe, self.loop = recipe, recipe.training
        self.policy, self.objective = policy, objective
        self.train_source, self.held_out = train, held_out
        self.processor, self.statistics = processor, statistics
        self.provenance, self.run = provenance, run
        self.modules = nn.ModuleDict({"policy": policy, "objective": objective})
        self.optimizer = make_optimizer(self.modules, recipe.optimizer)
        decay = self.loop.ema_decay
        self.averaged = None if decay is None else AveragedWeights(policy, decay)
        self.order = BatchOrder(len(train), self.loop.batch_size, self.loop.seed)
        self.total_steps = self.loop.steps or (self.loop.epochs or 0) * self.order.steps_per_epoch
        self.progress = Progress(statistics.dataset_fingerprint)
        self._interval = Interval()
        self._stop: signal.Signals | None = None
        self._show = progress_bar

    def resume(self) -> bool:
        """Continue where ``last`` stands; False when there is no checkpoint yet.

        Raises ConfigError when that run saw other demonstrations.
        """
        last = self.run.pointed("last")
        if last is None:
            return False
        now = self.progress.dataset_fingerprint
        self.progress = load_training_state(last, self.modules, self.optimizer, self.averaged)
        if self.progress.dataset_fingerprint != now:
            raise ConfigError(
                f"{self.run.path} was trained on other demonstrations (fingerprint "
                f"{self.progress.dataset_fingerprint[:12]}, not {now[:12]}), so it cannot be "
                "resumed with these. Give the same --data, or --fresh",
                field="data.paths",
            )
        if self.progress.best_step is not None:
            # A kill may have come between the two pointers.
            self.run.point("best", self.run.checkpoint(self.progress.best_step))
        self.run.discard_old_checkpoints()
        self.run.forget_metrics_after(self.progress.step)
        return True

    def train(self) -> Outcome:
        """Run to the end, or until SIGINT or SIGTERM, which save ``last`` first.

        Raises TrainingDivergedError naming the step when a loss or gradient is not finite.
        """
        began, step_began_with = time.monotonic(), self.progress.seconds
        first = self.progress.step
        seen = 0
        with self._signals(), self._bar() as bar:
            for step in range(first, self.total_steps):
                seen += self._step(step)
                self.progress.step = step + 1
                self.progress.seconds = step_began_with + time.monotonic() - began
                bar.update(1)
                if self._after_step(bar):
                    break
        elapsed = time.monotonic() - began
        return self._outcome(self.progress.step - first, seen / elapsed if seen else 0.0)

    def _step(self, step: int) -> int:
        """One optimiser step; returns the number of samples."""
        batch = self.train_source.batch(self.order.indices(step))
        generator = seeded_generator(self.loop.seed, "draws", step)
        draws = self.objective.draw(batch, generator)
        device = self.policy.device
        batch, draws = batch.to(device), {n: t.to(device) for n, t in draws.items()}
        factor = learning_rate_factor(self.recipe.schedule, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.learning_rate * factor
        self.modules.train()
        torch.manual_seed(derived_seed(self.loop.seed, "dropout", step))
        with self._autocast():
            losses = self.objective(self.policy, batch, draws)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        clip = self.recipe.optimizer.gradient_clip
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), clip or math.inf)
        self.optimizer.step()
        self.objective.after_optimizer_step(self.policy, step, self.total_steps)
        if self.averaged is not None:
            self.averaged.update(step + 1)
        self._interval.add({**losses, "gradient_norm": norm}, batch.size)
        return batch.size

    def _after_step(self, bar: tqdm[Any]) -> bool:
        """Log, validate and save what is due; True when the run was asked to stop."""
        # Read once: a signal may come at any moment, and a stop must have been saved.
        stops = self._stop is not None
        step, ends = self.progress.step, self.progress.step == self.total_steps
        validates = ends or self._due(self.loop.validate_every)
        saves = ends or stops or self._due(self.loop.checkpoint_every)
        if validates or saves or step % self.loop.log_every == 0:
            self._log(bar)
        improved = validates and self.held_out is not None and self._validate(self.held_out)
        if saves or improved:
            self._save(best=improved)
        return stops

    def _due(self, every: int) -> bool:
        unit = 1 if self.loop.epochs is None else self.order.steps_per_epoch
        return self.progress.step % (every * unit) == 0

    def _log(self, bar: tqdm[Any]) -> None:
        """Write one line of metrics; the place where a loss that is not finite is found."""
        if not self._interval.steps:
            return
        means, speed = self._interval.close(self.progress.step)
        self.progress.training = means
        self.run.append_metrics(
            {
                "kind": "train",
                "step": self.progress.step,
                "epoch": self.progress.step / self.order.steps_per_epoch,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "samples_per_second": speed,
                **means,
            }
        )
        shown = {name: f"{value:.4f}" for name, value in means.items() if name != "gradient_norm"}
        bar.set_postfix({**shown, "samples/s": f"{speed:.0f}"}, refresh=False)

    def _validate(self, held_out: BatchSource) -> bool:
        """Validate the weights that would be served; True when they are the best so far."""
        with self._served_weights():
            metrics = validate(
                self.policy,
                self.objective,
                held_out,
                self.processor,
                batch_size=self.loop.batch_size,
                seed=self.loop.seed,
                sampling_steps=self.loop.sampling_steps,
            )
        step, name = self.progress.step, self.recipe.best_metric
        refuse_not_finite(metrics, f"in the validation after step {step}")
        self.progress.validation = metrics
        epoch = step / self.order.steps_per_epoch
        self.run.append_metrics({"kind": "validation", "step": step, "epoch": epoch, **metrics})
        self._interval.restart_clock()
        best = self.progress.best_metric
        if best is not None and metrics[name] >= best:
            return False
        self.progress.best_metric, self.progress.best_step = metrics[name], step
        return True

    def _save(self, *, best: bool) -> None:
        folder = self.run.checkpoint(self.progress.step)
        position = {
            "step": self.progress.step,
            "epoch": self.progress.step / self.order.steps_per_epoch,
            "training": self.progress.training,
            "validation": self.progress.validation,
            "best_metric": {
                "name": self.recipe.best_metric,
                "value": self.progress.best_metric,
                "step": self.progress.best_step,
            },
            "averaged_weights": self.averaged is not None,
        }
        tensors = training_tensors(self.modules, self.optimizer, self.averaged)
        with self._served_weights():
            save_checkpoint(
                folder,
                self.policy,
                self.statistics,
                {**self.provenance, **position},
                write_also=lambda unfinished: write_training_state(
                    unfinished, tensors, self.progress
                ),
            )
        self.run.point("last", folder)
        if best:
            self.run.point("best", folder)
        self.run.discard_old_checkpoints()
        self._interval.restart_clock()

    def _served_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self.averaged is None else self.averaged.applied()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.loop.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.policy.device.type, dtype=torch.bfloat16)

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            desc=self.recipe.name,
            unit="step",
            disable=not self._show,
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Within the block SIGINT and SIGTERM ask for a stop after the current step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask_to_stop(number: int, frame: FrameType | None) -> None:
            self._stop = signal.Signals(number)

        before: list[tuple[signal.Signals, Callable[..., Any] | int | None]] = [
            (number, signal.signal(number, ask_to_stop))
            for number in (signal.SIGINT, signal.SIGTERM)
        ]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def _outcome(self, steps_run: int, samples_per_second: float) -> Outcome:
        return Outcome(
            progress=self.progress,
            steps_run=steps_run,
            total_steps=self.total_steps,
            steps_per_epoch=self.order.steps_per_epoch,
            samples_per_second=samples_per_second,
            last=self.run.pointed("last"),
            best=self.run.pointed("best"),
            stopped_by=self._stop if self.progress.step < self.total_steps else None,
        )

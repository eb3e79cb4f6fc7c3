"""The training loop: steps, logs, validation, checkpoints, and a clean stop.

Everything random is a function of the recipe's seed and the step, so that a run that was killed
and resumed ends with the same weights as one that was not (on CPU, with the same threads).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from reflexarc.contract import NormalizationStatistics
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import Policy
from reflexarc.policy.processing import Processor
from reflexarc.training.config import Recipe
from reflexarc.training.distributed.engine import Engine, TrainedModules
from reflexarc.training.freezing import set_training_mode
from reflexarc.training.kept_checkpoints import KeptCheckpoints
from reflexarc.training.metrics import Interval, refuse_not_finite
from reflexarc.training.objective import Objective
from reflexarc.training.outcome import Outcome
from reflexarc.training.reporting import Reporters, RunReporter
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.samples import BatchSource
from reflexarc.training.saving import naming_a_full_disk, save_training_checkpoint
from reflexarc.training.starting_weights import check_same_language, kept_origin
from reflexarc.training.step_clock import memory_values
from reflexarc.training.stopping import StopRequest
from reflexarc.training.training_state import Progress, load_training_state, training_tensors
from reflexarc.training.training_step import TrainingStep
from reflexarc.training.validation import validate


class Trainer:
    """Trains one policy by one recipe into one run folder.

    Args:
        recipe: decides everything.
        policy, objective: on their device already, what the recipe freezes frozen, the
            objective attached.
        train, held_out: batches; without ``held_out`` nothing is validated.
        processor, statistics: of the checkpoint.
        provenance: what every checkpoint says beside position and metrics.
        run: where to write.
        progress_bar: whether to draw one.
        engine: the processes that share the run; one alone by default.
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
        engine: Engine | None = None,
    ) -> None:
        self.recipe, self.loop = recipe, recipe.training
        self.policy, self.objective, self.held_out = policy, objective, held_out
        self.processor, self.statistics = processor, statistics
        self.provenance, self.run = provenance, run
        self.engine = engine or Engine(policy.device)
        self.modules = TrainedModules(policy, objective)
        self.stepper = TrainingStep(recipe, self.modules, train, self.engine)
        self.order, self.total_steps = self.stepper.order, self.stepper.total_steps
        self.kept = KeptCheckpoints(
            run,
            best=self.loop.keep_best,
            every=self.loop.keep_every and self.loop.keep_every * self._unit,
            writes=self.engine.is_first,
        )
        self.progress = Progress(statistics.dataset_fingerprint)
        self._interval = Interval()
        self._stop = StopRequest()
        self._reporter: RunReporter = Reporters()
        self._show = progress_bar and self.engine.is_first

    def resume(self) -> bool:
        """Continue where ``last`` stands; False when there is no checkpoint yet.

        Raises ConfigError when that run saw other demonstrations or began with other weights.
        """
        last = self.run.pointed("last")
        if last is None:
            return False
        now = self.progress.dataset_fingerprint
        step = self.stepper
        self.progress = load_training_state(
            last, self.modules, step.optimizer, step.averaged, self.engine
        )
        if self.progress.dataset_fingerprint != now:
            raise ConfigError(
                f"{self.run.path} was trained on other demonstrations (fingerprint "
                f"{self.progress.dataset_fingerprint[:12]}, not {now[:12]}), so it cannot be "
                "resumed with these. Give the same --data, or --fresh",
                field="data.paths",
            )
        check_same_language(last, self.policy)
        origin = kept_origin(last, self.provenance.get("init_from"))
        self.provenance = {**self.provenance, "init_from": origin}
        step.precision.load_state(self.progress.scaler)
        self._interval.restore(self.progress.interval, self.engine.device)
        at, metric = self.progress.best_step, self.progress.best_metric
        best = None if at is None or metric is None else (at, metric)
        self.kept.resume(self.progress.step, best)
        return True

    def train(self, reporter: RunReporter | None = None) -> Outcome:
        """Run to the end, or until SIGINT, SIGTERM or SIGUSR1, which save ``last`` first.

        ``reporter`` is told what is measured; whoever made it closes it.

        Raises TrainingDivergedError naming the step when a loss or gradient is not finite, and
        DiskFullError when the run's folder takes no more.
        """
        self._reporter = reporter or Reporters()
        began, step_began_with = time.monotonic(), self.progress.seconds
        first = self.progress.step
        seen = 0
        self._training_mode()
        self._restart_clocks()
        with (
            naming_a_full_disk(self.run),
            self._stop.listening(),
            self.stepper.loader,
            self._bar() as bar,
        ):
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
        values, samples = self.stepper.run(step)
        self._interval.add(values, samples)
        return samples

    def _training_mode(self) -> None:
        set_training_mode(self.policy, self.objective, self.recipe.freeze)

    def _after_step(self, bar: tqdm[Any]) -> bool:
        """Log, validate and save what is due; True when the run was asked to stop."""
        # Read once: a signal may come at any moment, and a stop must have been saved. All
        # processes stop after the same step, whichever of them was told to.
        stops = self._stop.agreed(self.engine)
        step, ends = self.progress.step, self.progress.step == self.total_steps
        validates = ends or self._due(self.loop.validate_every)
        saves = ends or self._due(self.loop.checkpoint_every)
        if validates or saves or step % self.loop.log_every == 0:
            self._log(bar)
        metric = self._validate(self.held_out) if validates and self.held_out else None
        if saves or stops or self.kept.wants(step, metric):
            self._save(metric)
        return stops

    @property
    def _unit(self) -> int:
        """Optimiser steps in what ``validate_every`` and the like count."""
        return 1 if self.loop.epochs is None else self.order.steps_per_epoch

    def _due(self, every: int) -> bool:
        return self.progress.step % (every * self._unit) == 0

    def _log(self, bar: tqdm[Any]) -> None:
        """Report the interval; the place where a loss that is not finite is found."""
        steps = len(self._interval.steps)
        if not steps:
            return
        step = self.progress.step
        means, speed = self._interval.close(step)
        self.progress.training = means
        self._reporter.train(
            step,
            step / self.order.steps_per_epoch,
            {
                "learning_rate": self.stepper.learning_rate(step - 1),
                "samples_per_second": speed,
                **means,
                **self.stepper.precision.values(),
                **self.stepper.clock.close(steps),
                **memory_values(self.engine.device),
            },
        )
        shown = {n: f"{value:.4f}" for n, value in means.items() if "gradient_norm" not in n}
        bar.set_postfix({**shown, "samples/s": f"{speed:.0f}"}, refresh=False)

    def _validate(self, held_out: BatchSource) -> float:
        """Validate the weights that would be served; returns the metric that chooses ``best``."""
        with self.engine.served(self.modules, self.stepper.averaged) as served:
            metrics = validate(
                served,
                held_out,
                self.processor,
                batch_size=self.loop.batch_size,
                seed=self.loop.seed,
                sampling_steps=self.loop.sampling_steps,
                engine=self.engine,
            )
        self._training_mode()
        step, name = self.progress.step, self.recipe.best_metric
        refuse_not_finite(metrics, f"in the validation after step {step}")
        self.progress.validation = metrics
        self._reporter.validation(step, step / self.order.steps_per_epoch, metrics)
        self._restart_clocks()
        best = self.progress.best_metric
        if best is None or metrics[name] < best:
            self.progress.best_metric, self.progress.best_step = metrics[name], step
        return metrics[name]

    def _save(self, metric: float | None) -> None:
        """Save ``last``; ``metric`` is what validation gave at this step, None without one."""
        step = self.stepper
        interval = self._interval.rows(self.progress.step)
        self.progress = replace(self.progress, interval=interval, scaler=step.precision.state())
        tensors = training_tensors(self.modules, step.optimizer, step.averaged, self.engine)
        with self.engine.served(self.modules, step.averaged) as served:
            if self.engine.is_first:
                save_training_checkpoint(
                    self.run.checkpoint(self.progress.step),
                    served,
                    self.statistics,
                    {**self.provenance, **self._position()},
                    tensors,
                    self.progress,
                )
        self.kept.add(self.progress.step, metric)
        self._restart_clocks()

    def _position(self) -> dict[str, Any]:
        """What a checkpoint says of where in its run it was made."""
        return {
            "step": self.progress.step,
            "epoch": self.progress.step / self.order.steps_per_epoch,
            "training": self.progress.training,
            "validation": self.progress.validation,
            "best_metric": {
                "name": self.recipe.best_metric,
                "value": self.progress.best_metric,
                "step": self.progress.best_step,
            },
            "averaged_weights": self.stepper.averaged is not None,
        }

    def _restart_clocks(self) -> None:
        """Leave out what validation or a checkpoint took."""
        self._interval.restart_clock()
        self.stepper.clock.skip()

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            desc=self.recipe.name,
            unit="step",
            disable=not self._show,
        )

    def _outcome(self, steps_run: int, samples_per_second: float) -> Outcome:
        return Outcome(
            progress=self.progress,
            steps_run=steps_run,
            total_steps=self.total_steps,
            steps_per_epoch=self.order.steps_per_epoch,
            samples_per_second=samples_per_second,
            last=self.run.pointed("last"),
            best=self.run.pointed("best"),
            stopped_by=self._stop.by if self.progress.step < self.total_steps else None,
        )

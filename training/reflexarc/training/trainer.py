"""The training loop: steps, logs, validation, checkpoints, and a clean stop.

Everything random is a function of the recipe's seed and the step, so that a run that was killed
and resumed ends with the same weights as one that was not (on CPU, with the same threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from reflexarc.contract import NormalizationStatistics
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import Policy
from reflexarc.policy.processing import Processor
from reflexarc.training.config import Recipe
from reflexarc.training.freezing import set_training_mode
from reflexarc.training.metrics import Interval, refuse_not_finite
from reflexarc.training.objective import Objective
from reflexarc.training.optimization import AveragedWeights, make_optimizer, trained_parameters
from reflexarc.training.outcome import Outcome
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.samples import BatchOrder, BatchSource, derived_seed, seeded_generator
from reflexarc.training.saving import save_training_checkpoint
from reflexarc.training.schedule import learning_rate_factor
from reflexarc.training.starting_weights import kept_origin
from reflexarc.training.stopping import StopRequest
from reflexarc.training.training_state import Progress, load_training_state, training_tensors
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
        scales = {f"policy.{path}": f for path, f in recipe.learning_rate_scale.items()}
        self.optimizer = make_optimizer(self.modules, recipe.optimizer, scales)
        self._trained = list(trained_parameters(self.modules).values())
        decay = self.loop.ema_decay
        self.averaged = None if decay is None else AveragedWeights(policy, decay)
        self.order = BatchOrder(len(train), self.loop.batch_size, self.loop.seed)
        self.total_steps = self.loop.steps or (self.loop.epochs or 0) * self.order.steps_per_epoch
        self.progress = Progress(statistics.dataset_fingerprint)
        self._interval = Interval()
        self._stop = StopRequest()
        self._show = progress_bar

    def resume(self) -> bool:
        """Continue where ``last`` stands; False when there is no checkpoint yet.

        Raises ConfigError when that run saw other demonstrations or began with other weights.
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
        origin = kept_origin(last, self.provenance.get("init_from"))
        self.provenance = {**self.provenance, "init_from": origin}
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
        self._training_mode()
        with self._stop.listening(), self._bar() as bar:
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
        factor = self._factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.learning_rate * factor * group["scale"]
        torch.manual_seed(derived_seed(self.loop.seed, "dropout", step))
        with self._autocast():
            losses = self.objective(self.policy, batch, draws)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        clip = self.recipe.optimizer.gradient_clip
        norm = nn.utils.clip_grad_norm_(self._trained, clip or math.inf)
        self.optimizer.step()
        self.objective.after_optimizer_step(self.policy, step, self.total_steps)
        if self.averaged is not None:
            self.averaged.update(step + 1)
        self._interval.add({**losses, "gradient_norm": norm}, batch.size)
        return batch.size

    def _factor(self, step: int) -> float:
        return learning_rate_factor(self.recipe.schedule, step, self.total_steps)

    def _training_mode(self) -> None:
        set_training_mode(self.policy, self.objective, self.recipe.freeze)

    def _after_step(self, bar: tqdm[Any]) -> bool:
        """Log, validate and save what is due; True when the run was asked to stop."""
        # Read once: a signal may come at any moment, and a stop must have been saved.
        stops = self._stop.by is not None
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
                "learning_rate": self.recipe.optimizer.learning_rate
                * self._factor(self.progress.step - 1),
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
        self._training_mode()
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
            save_training_checkpoint(
                folder,
                self.policy,
                self.objective,
                self.statistics,
                {**self.provenance, **position},
                tensors,
                self.progress,
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

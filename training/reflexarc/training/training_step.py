"""One optimiser step: batch, draws, losses, gradients, weights, averages."""

from __future__ import annotations

import torch
from torch import Tensor

from reflexarc.training.activation_checkpointing import checkpoint_activations
from reflexarc.training.config import Recipe
from reflexarc.training.distributed.engine import Engine, TrainedModules
from reflexarc.training.loader import BatchLoader
from reflexarc.training.objective import Batch, Draws, Losses
from reflexarc.training.optimization import AveragedWeights, make_optimizer
from reflexarc.training.precision import Precision
from reflexarc.training.samples import BatchSource, seeded_generator
from reflexarc.training.schedule import learning_rate_factor
from reflexarc.training.seeding import seed_generators
from reflexarc.training.shares import Share, drawn_rows, in_size_of, shares_of, without_loss
from reflexarc.training.step_clock import StepClock


class TrainingStep:
    """Makes the steps of one run, each a function of its number and of the weights before it.

    Args:
        recipe: decides everything.
        modules: on their device already, what the recipe freezes frozen.
        source: samples to train on.
        engine: the processes that share each step.
    """

    def __init__(
        self, recipe: Recipe, modules: TrainedModules, source: BatchSource, engine: Engine
    ) -> None:
        self.recipe, self.loop = recipe, recipe.training
        self.modules, self.engine = modules, engine
        self.order = source.order(self.loop.batch_size, self.loop.seed)
        # It remembers one epoch, and threads may read in the next one already.
        self._order_ahead = source.order(self.loop.batch_size, self.loop.seed)
        self.total_steps = self.loop.steps or (self.loop.epochs or 0) * self.order.steps_per_epoch
        if self.loop.activation_checkpointing:
            checkpoint_activations(modules.policy)
        forward = engine.wrap(modules, modules.policy.blocks())
        scales = {f"policy.{path}": f for path, f in recipe.learning_rate_scale.items()}
        self.optimizer = make_optimizer(modules, recipe.optimizer, scales)
        decay = self.loop.ema_decay
        self.averaged = None if decay is None else AveragedWeights(modules.policy, decay)
        self.precision = Precision(self.loop.precision, engine.device)
        self.clock = StepClock(engine.device)
        self._weights = engine.weight_update(
            modules, forward, self.optimizer, self.precision, recipe.optimizer.gradient_clip
        )
        self.loader = BatchLoader(
            source,
            self._wanted,
            workers=self.loop.loader_workers,
            total_steps=self.total_steps,
        )

    def run(self, step: int) -> tuple[dict[str, Tensor], int]:
        """Make step ``step``, from 0; returns losses and gradient norms, and samples seen."""
        self.clock.mark("other")
        rows = len(self.order.indices(step))
        shares = self._shares(rows)
        batches, draws, weights = self._data(step, rows, shares)
        self._set_learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        passes = []
        for number, (share, weight) in enumerate(zip(shares, weights, strict=True)):
            batch = batches[number].to(self.engine.device)
            mine = draws if len(share.rows) == rows else drawn_rows(draws, share)
            drawn = {name: values.to(self.engine.device) for name, values in mine.items()}
            self.clock.mark("data")
            seed_generators(self.loop.seed, step, part=number, rank=self.engine.rank)
            with self.engine.passing(last=number == len(shares) - 1):
                losses = self._weights.losses(batch, drawn)
                self.clock.mark("forward")
                total = losses["total"]
                self._weights.backward(total if len(shares) == 1 else total * weight)
            self.clock.mark("backward")
            passes.append(losses)
        norms = self._update(step)
        self.clock.mark("optimizer")
        return {**_weighted(passes, weights), **norms}, rows

    def learning_rate(self, step: int) -> float:
        """Of modules without a factor of their own, at step ``step`` from 0."""
        factor = learning_rate_factor(self.recipe.schedule, step, self.total_steps)
        return self.recipe.optimizer.learning_rate * factor

    def _update(self, step: int) -> dict[str, Tensor]:
        """From gradients to the next weights; returns the gradients' norms."""
        norms = self._weights.step()
        policy, objective = self.modules.policy, self.modules.objective
        objective.after_optimizer_step(policy, step, self.total_steps)
        if self.averaged is not None:
            self.averaged.update(step + 1)
        return norms

    def _set_learning_rate(self, step: int) -> None:
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def _shares(self, rows: int) -> list[Share]:
        engine = self.engine
        return shares_of(rows, passes=self.loop.accumulate, rank=engine.rank, world=engine.world)

    def _wanted(self, step: int) -> list[Tensor]:
        indices = self._order_ahead.indices(step)
        return [indices[share.rows] for share in self._shares(len(indices))]

    def _data(
        self, step: int, rows: int, shares: list[Share]
    ) -> tuple[list[Batch], Draws, list[float]]:
        """The batch of each pass, the draws of the whole step, and the weight of each pass."""
        batches = [
            without_loss(batch) if share.stands_in else batch
            for share, batch in zip(shares, self.loader.batches(step), strict=True)
        ]
        everything = batches[0] if batches[0].size == rows else in_size_of(batches[0], rows)
        generator = seeded_generator(self.loop.seed, "draws", step)
        draws = self.modules.objective.draw(everything, generator)
        return batches, draws, self._pass_weights(batches)

    def _pass_weights(self, batches: list[Batch]) -> list[float]:
        """The share of each pass in the terms that the losses of the step are means over."""
        if len(batches) == 1:
            return [1.0]
        mine = [self.modules.objective.weight(batch) for batch in batches]
        terms = [sum(of_pass) for of_pass in zip(*self.engine.collected(mine), strict=True)]
        total = sum(terms)
        return [t / total if total else 1 / len(terms) for t in terms]


def _weighted(passes: list[Losses], weights: list[float]) -> Losses:
    """Losses of a step from those of its passes."""
    if len(passes) == 1:
        return passes[0]
    by_name = {name: torch.stack([one[name].detach() for one in passes]) for name in passes[0]}
    return {name: (values * values.new_tensor(weights)).sum(0) for name, values in by_name.items()}

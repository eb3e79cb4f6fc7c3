"""Validation on held-out episodes: the losses under fixed draws, and the error of real chunks."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from reflexarc.policy.interface import Policy
from reflexarc.policy.processing import Processor
from reflexarc.training.distributed.engine import Engine, TrainedModules
from reflexarc.training.objective import Batch
from reflexarc.training.samples import BatchSource, seeded_generator


@torch.no_grad()
def validate(
    modules: TrainedModules,
    source: BatchSource,
    processor: Processor,
    *,
    batch_size: int,
    seed: int,
    sampling_steps: int | None = None,
    engine: Engine | None = None,
) -> dict[str, float]:
    """Means over what the held-out batches hold, each batch with the objective's ``weight``.

    What the objective's ``summarize`` derives from them comes with them.

    The losses are those of training; where the action heads are trained there come with them
    ``action_mae`` and ``action_mse`` of sampled chunks over the continuous dimensions, in the
    units of the robot's action, and ``gripper_accuracy``. Draws and noise are the same in every
    call. The processes of an ``engine`` share the batches; each returns the same.
    """
    modules.eval()
    engine = engine or Engine(modules.policy.device)
    mine = {}
    for index, start in enumerate(range(0, len(source), batch_size)):
        if index % engine.world == engine.rank:
            rows = torch.arange(start, min(start + batch_size, len(source)))
            generator = seeded_generator(seed, "validation", index)
            mine[index] = _of_batch(
                modules, source.batch(rows), processor, generator, sampling_steps
            )
    found = {index: one for part in engine.collected(mine) for index, one in part.items()}
    sums: dict[str, float] = defaultdict(float)
    weight = 0.0
    for index in sorted(found):  # in this order, whoever computed them
        values, terms = found[index]
        for name, value in values.items():
            sums[name] += value * terms
        weight += terms
    means = {name: value / max(weight, 1.0) for name, value in sums.items()}
    return modules.objective.summarize(means)


def _of_batch(
    modules: TrainedModules,
    batch: Batch,
    processor: Processor,
    generator: torch.Generator,
    sampling_steps: int | None,
) -> tuple[dict[str, float], float]:
    """Losses and errors of one batch, and the terms that they are means over."""
    policy, objective = modules.policy, modules.objective
    draws = {n: t.to(policy.device) for n, t in objective.draw(batch, generator).items()}
    batch = batch.to(policy.device)
    losses = {name: float(value) for name, value in modules(batch, draws).items()}
    errors = (
        _chunk_errors(policy, batch, processor, generator, sampling_steps)
        if objective.trains_actions
        else {}
    )
    return {**losses, **errors}, objective.weight(batch)


def _chunk_errors(
    policy: Policy,
    batch: Batch,
    processor: Processor,
    generator: torch.Generator,
    sampling_steps: int | None,
) -> dict[str, float]:
    """Errors of one sampled chunk a row against the recorded one, over valid steps."""
    sampling = policy.sampling
    noise: Tensor | None = None
    if sampling.noise_shape is not None:
        noise = torch.randn(batch.size, *sampling.noise_shape, generator=generator)
        noise = noise.to(policy.device)
    context = policy.encode(batch.task, batch.window, batch.valid)
    steps = sampling_steps or sampling.default_steps
    sampled = policy.sample_actions(context, noise, steps=steps)
    predicted = torch.from_numpy(processor.actions_to_robot(sampled))
    recorded = torch.from_numpy(processor.actions_to_robot(batch.actions))
    mask = batch.action_mask.cpu()
    difference = (predicted - recorded)[mask]
    gripper = processor.contract.action.gripper
    if gripper is None:
        continuous, accuracy = difference, {}
    else:
        kept = [i for i in range(difference.shape[-1]) if i != gripper.index]
        continuous = difference[:, kept]
        middle = (gripper.open + gripper.closed) / 2
        agrees = (predicted[mask] > middle) == (recorded[mask] > middle)
        accuracy = {"gripper_accuracy": float(agrees[:, gripper.index].float().mean())}
    return {
        "action_mae": float(continuous.abs().mean()),
        "action_mse": float(continuous.square().mean()),
        **accuracy,
    }

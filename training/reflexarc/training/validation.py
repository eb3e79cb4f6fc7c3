"""Validation on held-out episodes: the losses under fixed draws, and the error of real chunks."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from reflexarc.policy.interface import Policy
from reflexarc.policy.processing import Processor
from reflexarc.training.objective import Batch, Objective
from reflexarc.training.samples import BatchSource, seeded_generator


@torch.no_grad()
def validate(
    policy: Policy,
    objective: Objective,
    source: BatchSource,
    processor: Processor,
    *,
    batch_size: int,
    seed: int,
    sampling_steps: int | None = None,
) -> dict[str, float]:
    """Means over what the held-out batches hold, each batch with the objective's ``weight``.

    What the objective's ``summarize`` derives from them comes with them.

    The losses are those of training; where the action heads are trained there come with them
    ``action_mae`` and ``action_mse`` of sampled chunks over the continuous dimensions, in the
    units of the robot's action, and ``gripper_accuracy``. Draws and noise are the same in every
    call.
    """
    policy.eval()
    objective.eval()
    sums: dict[str, float] = defaultdict(float)
    weight = 0.0
    for index, start in enumerate(range(0, len(source), batch_size)):
        rows = torch.arange(start, min(start + batch_size, len(source)))
        batch = source.batch(rows)
        generator = seeded_generator(seed, "validation", index)
        draws = {n: t.to(policy.device) for n, t in objective.draw(batch, generator).items()}
        batch = batch.to(policy.device)
        losses = {n: float(value) for n, value in objective(policy, batch, draws).items()}
        errors = (
            _chunk_errors(policy, batch, processor, generator, sampling_steps)
            if objective.trains_actions
            else {}
        )
        terms = objective.weight(batch)
        for name, value in {**losses, **errors}.items():
            sums[name] += value * terms
        weight += terms
    return objective.summarize({name: value / max(weight, 1.0) for name, value in sums.items()})


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

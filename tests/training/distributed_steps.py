"""Training steps of one rank: ``python distributed_steps.py RANK WORLD FOLDER``.

Run by test_distributed.py, once alone and once with two processes. Each rank takes its rows of
the same global batches, wraps policy and objective as one module whose forward is the objective,
and writes what came out to ``FOLDER/<objective>_<rank>_of_<world>.safetensors``.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_statevla import ACTION_DIMENSION, Z_DIMENSION, random_source, tiny_statevla
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reflexarc.policy.layers.keypoints import KeypointsConfig
from reflexarc.policy.statevla.model import StateVLA
from reflexarc.training.config import OptimizerConfig
from reflexarc.training.config_objectives import (
    FlowMatchingConfig,
    MaskedJEPAConfig,
    TemporalJEPAConfig,
)
from reflexarc.training.objective import Batch, Draws, Losses, Objective
from reflexarc.training.objectives.flow_matching import FlowMatchingObjective
from reflexarc.training.objectives.masked_jepa import MaskedJEPAObjective
from reflexarc.training.objectives.temporal_jepa import TemporalJEPAObjective
from reflexarc.training.optimization import make_optimizer
from reflexarc.training.samples import BatchSource

STEPS, FUTURE = 3, 2
KEYPOINTS = KeypointsConfig(number=4, hidden=8, tokens=2)
# The second rank has fewer rows, and of those fewer that are real.
ROWS_OF_RANK = {1: [(0, 12)], 2: [(0, 7), (7, 12)]}
FUTURE_IS_REAL = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 1], dtype=torch.bool)
REAL_STEPS = torch.tensor([5, 5, 5, 4, 5, 5, 2, 1, 1, 1, 3, 1])


class OneForward(nn.Module):
    """What DistributedDataParallel must wrap: everything that is trained, in one forward."""

    def __init__(self, policy: StateVLA, objective: Objective) -> None:
        super().__init__()
        self.policy, self.objective = policy, objective

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        losses: Losses = self.objective(self.policy, batch, draws)
        return losses


def build(name: str) -> OneForward:
    # With keypoints a hidden instruction changes the images' tokens too.
    policy = tiny_statevla(KEYPOINTS if name == "masked_jepa" else None)
    if name == "flow_matching":
        return OneForward(policy, FlowMatchingObjective(FlowMatchingConfig(), gripper_index=6))
    if name == "masked_jepa":
        config = MaskedJEPAConfig(
            ema_start=0.5, predictor_layers=1, predictor_width=16, state_noise=0.02
        )
        masked = MaskedJEPAObjective(config, layout=policy.token_layout, gripper_index=6)
        masked.attach(policy)
        return OneForward(policy, masked)
    objective = TemporalJEPAObjective(
        TemporalJEPAConfig(horizon=FUTURE, ema_start=0.5, predictor_hidden=32, state_noise=0.02),
        z_dimension=Z_DIMENSION,
        action_dimension=ACTION_DIMENSION,
    )
    nn.init.normal_(objective.predictor.delta.weight, std=0.1)
    objective.attach(policy)
    # This stage does not train the heads; DistributedDataParallel would wait for them.
    policy.flow.requires_grad_(False)
    assert policy.gripper is not None
    policy.gripper.requires_grad_(False)
    return OneForward(policy, objective)


def global_samples(policy: StateVLA, step: int) -> BatchSource:
    return random_source(
        policy,
        seed=100 + step,
        real_steps=REAL_STEPS,
        future_is_real=FUTURE_IS_REAL,
        ahead=FUTURE,
    )


def train(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Losses of every step, gradients of the first, weights and target after each."""
    module = build(name)
    optimizer = make_optimizer(module, OptimizerConfig(learning_rate=1e-3))
    wrapped: nn.Module = DistributedDataParallel(module) if world > 1 else module
    mine = torch.arange(*ROWS_OF_RANK[world][rank])
    seen: dict[str, Tensor] = {}
    for step in range(STEPS):
        samples = global_samples(module.policy, step)
        everything = samples.batch(torch.arange(len(samples)))
        draws = module.objective.draw(everything, torch.Generator().manual_seed(step))
        module.train()
        losses: Losses = wrapped(
            samples.batch(mine), {key: rows[mine] for key, rows in draws.items()}
        )
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        seen |= {f"loss/{step}/{key}": value.detach() for key, value in losses.items()}
        if step == 0:
            seen |= {
                f"gradient/{key}": parameter.grad.clone()
                for key, parameter in module.named_parameters()
                if parameter.grad is not None
            }
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        module.objective.after_optimizer_step(module.policy, step, STEPS)
        seen |= {f"weight/{step}/{key}": v.clone() for key, v in module.state_dict().items()}
    with torch.no_grad():  # nothing is exchanged: a rank may validate alone
        if rank == 0:
            module.eval()(everything, draws)
    return {key: value.contiguous() for key, value in seen.items()}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=600),
        )
    for name in ("flow_matching", "temporal_jepa", "masked_jepa"):
        save_file(train(name, rank, world), folder / f"{name}_{rank}_of_{world}.safetensors")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

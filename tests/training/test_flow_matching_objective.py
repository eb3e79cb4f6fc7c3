"""The flow-matching objective against a policy whose velocity is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from reflexarc.policy.interface import Tensors
from reflexarc.training.config_objectives import FlowMatchingConfig
from reflexarc.training.objective import Batch
from reflexarc.training.objectives.flow_matching import FlowMatchingObjective

ROWS, HORIZON = 6, 5


class OraclePolicy(nn.Module):
    """Knows the action that its context holds, so that its velocity is exact: (x_t - a) / t."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))
        self.seen_state: Tensor | None = None

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        self.seen_state = window["state"]
        return {"action": task["action"]}

    def velocity(self, context: Tensors, x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t - context["action"][..., :6]) / t[:, None, None] + self.offset

    def gripper_logits(self, context: Tensors) -> Tensor:
        return 20 * context["action"][..., 6]


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(ROWS, HORIZON, 7, generator=generator)
    actions[..., 6] = torch.where(actions[..., 6] > 0, 1.0, -1.0)
    mask = torch.ones(ROWS, HORIZON, dtype=torch.bool)
    mask[0, 2:] = False
    return Batch(
        window={"state": torch.zeros(ROWS, 1, 8)},
        task={"action": actions},
        valid=torch.ones(ROWS, 1, dtype=torch.bool),
        actions=actions,
        action_mask=mask,
    )


def losses_of(
    policy: OraclePolicy, batch: Batch, config: FlowMatchingConfig | None = None, seed: int = 1
) -> dict[str, Tensor]:
    objective = FlowMatchingObjective(config or FlowMatchingConfig(), gripper_index=6)
    draws = objective.draw(batch, torch.Generator().manual_seed(seed))
    return objective(policy, batch, draws)  # type: ignore[no-any-return]


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_exact_velocity_and_the_right_gripper_have_no_loss(repeats: int) -> None:
    losses = losses_of(OraclePolicy(), make_batch(), FlowMatchingConfig(draws_per_sample=repeats))
    assert losses["flow"].item() == pytest.approx(0, abs=1e-4)
    assert losses["gripper"].item() == pytest.approx(0, abs=1e-6)


def test_a_velocity_that_is_off_by_two_has_a_loss_of_four_and_weights_apply() -> None:
    config = FlowMatchingConfig(flow_weight=3.0, gripper_weight=0.5)
    losses = losses_of(OraclePolicy(offset=2.0), make_batch(), config)
    assert losses["flow"].item() == pytest.approx(4.0, rel=1e-4)
    expected = 3.0 * losses["flow"] + 0.5 * losses["gripper"]
    torch.testing.assert_close(losses["total"], expected)


def test_steps_past_the_end_carry_no_loss() -> None:
    batch = make_batch()
    before = losses_of(OraclePolicy(offset=0.3), batch)
    # What the policy believes about padded steps changes; their recorded actions do not.
    believed = batch.actions.clone()
    believed[0, 2:] = 50.0
    changed = Batch(batch.window, {"action": believed}, batch.valid, batch.actions,
                    batch.action_mask)  # fmt: skip
    after = losses_of(OraclePolicy(offset=0.3), changed)
    torch.testing.assert_close(before, after)
    unmasked = Batch(changed.window, changed.task, changed.valid, changed.actions,
                     torch.ones_like(changed.action_mask))  # fmt: skip
    assert losses_of(OraclePolicy(offset=0.3), unmasked)["flow"] > 2 * before["flow"]


def test_closed_is_the_positive_class() -> None:
    batch = make_batch()
    flipped = batch.actions.clone()
    flipped[..., 6] *= -1
    wrong = Batch(batch.window, {"action": flipped}, batch.valid, batch.actions,
                  batch.action_mask)  # fmt: skip
    assert losses_of(OraclePolicy(), wrong)["gripper"].item() == pytest.approx(20, rel=1e-3)


def test_draws_are_functions_of_the_generator_and_noise_reaches_the_state() -> None:
    batch = make_batch()
    objective = FlowMatchingObjective(FlowMatchingConfig(state_noise=0.5), gripper_index=6)
    first = objective.draw(batch, torch.Generator().manual_seed(4))
    second = objective.draw(batch, torch.Generator().manual_seed(4))
    other = objective.draw(batch, torch.Generator().manual_seed(5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    policy = OraclePolicy()
    objective(policy, batch, first)
    assert policy.seen_state is not None
    assert torch.equal(policy.seen_state, first["state_noise"])
    assert policy.seen_state.std().item() == pytest.approx(0.5, rel=0.5)


@pytest.mark.parametrize(("density", "mean"), [("beta", 0.6), ("uniform", 0.5)])
def test_the_density_of_time_has_its_mean(density: str, mean: float) -> None:
    config = FlowMatchingConfig.model_validate({"time_density": density, "draws_per_sample": 64})
    objective = FlowMatchingObjective(config, gripper_index=6)
    batch = make_batch()
    generator = torch.Generator().manual_seed(0)
    times = torch.cat([objective.draw(batch, generator)["time"].flatten() for _ in range(100)])
    assert times.min() >= 0 and times.max() <= 1
    # 38,400 draws: a standard error of 0.0014.
    assert times.mean().item() == pytest.approx(mean, abs=0.006)
    assert math.isfinite(times.sum().item())

"""The estimate of a run's memory and time is what small steps say of large ones, by engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from reflexarc.training.estimate import Estimate, _batch, _probe
from reflexarc.training.live_tensors import LiveTensors
from reflexarc.training.memory_estimate import _recomputed, _SmallStep, divided, measure_step
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import Planned, plan

CPU = torch.device("cpu")
Plan = Callable[..., Planned]


@pytest.fixture
def planned(recipe_in_two_stages: Path, tmp_path: Path) -> Plan:
    def make(*overrides: str, stage: int = 1, **options: object) -> Planned:
        recipe = load_recipe(
            str(recipe_in_two_stages), list(overrides), stage=stage, from_scratch=stage > 1
        )
        return plan(recipe, tmp_path / "run", device=CPU, **options)  # type: ignore[arg-type]

    return make


def test_what_is_alive_at_once_is_counted_to_the_byte() -> None:
    """Three layers: at the peak the input, three outputs and two gradients of outputs live."""
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(3)]
    with LiveTensors() as live:
        rows = torch.ones(100, 64)
        hidden = rows
        for weight in weights:
            hidden = torch.relu(hidden @ weight)
        hidden.sum().backward()
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    one = 100 * 64 * 4
    assert live.peak(without=gradients) == pytest.approx(6 * one, abs=64)
    assert live.peak() == pytest.approx(6 * one + 64 * 64 * 4, abs=64)


def test_storages_that_were_there_before_are_not_counted() -> None:
    weight = torch.zeros(1000)
    with LiveTensors() as live:
        weight.add_(1).view(10, 100).mul_(2)
    assert live.peak() == 0
    with LiveTensors() as live:
        for _ in range(5):
            nn.functional.relu(weight)
    assert live.peak() == 4000


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "option",
    ["precision=fp32", "precision=bf16", "activation_checkpointing=true"],
)
def test_two_small_steps_foretell_a_large_one(planned: Plan, option: str, stage: int) -> None:
    """Of temporal JEPA and of flow matching; what is left as it was is checked too."""
    prepared = planned(f"training.{option}", stage=stage).preparation
    recipe, policy, objective = prepared.recipe, prepared.policy, prepared.objective
    batch_of = partial(_batch, _probe(prepared)[1])
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    cost = measure_step(recipe, policy, objective, batch_of)
    policy.train()
    with _recomputed(policy, recipe.training.activation_checkpointing):
        large = _SmallStep(recipe, policy, objective, batch_of).activations(40)
    assert cost.activations(40) == pytest.approx(large, rel=0.03)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert not any("forward" in vars(block) for block in policy.blocks())


def test_passes_and_processes_divide_what_is_computed_at_once(planned: Plan) -> None:
    def found(*overrides: str, **options: object) -> Estimate:
        return planned("training.batch_size=32", *overrides, **options).estimate

    alone = found()
    passes = found("training.accumulate=2", world=4, engine="ddp")
    assert (alone.rows, passes.rows) == (32, 4)
    assert passes.memory.activations < 0.25 * alone.memory.activations
    assert passes.total_steps == alone.total_steps
    assert alone.memory.total == sum(vars(alone.memory).values())


def test_engines_divide_what_they_hold(planned: Plan) -> None:
    prepared = planned().preparation
    held = {
        engine: divided(prepared.policy, prepared.objective, engine, 4, averaged=True)
        for engine in ("ddp", "fsdp2", "zero2", "deepspeed")
    }
    ddp = held["ddp"]
    assert ddp["moments"] == 2 * ddp["gradients"] > 0 < ddp["averages"]
    for engine in ("fsdp2", "zero2", "deepspeed"):
        assert held[engine]["moments"] == pytest.approx(ddp["moments"] / 4, abs=8)
    for engine in ("fsdp2", "zero2"):
        assert held[engine]["averages"] == ddp["averages"] // 4
    assert held["fsdp2"]["weights"] <= held["zero2"]["weights"]
    assert held["deepspeed"]["weights"] == ddp["weights"] + ddp["gradients"] // 4


def test_time_is_measured_when_it_is_asked_for(planned: Plan) -> None:
    assert planned().estimate.step_seconds is None
    timed = planned(timed=True).estimate.step_seconds
    assert timed is not None and timed > 0

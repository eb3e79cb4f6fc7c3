"""Weight decay groups, averaged weights, learning-rate schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reflexarc.contract.errors import ConfigError
from reflexarc.training.config import OptimizerConfig, ScheduleConfig
from reflexarc.training.config_objectives import FlowMatchingConfig
from reflexarc.training.freezing import freeze_modules
from reflexarc.training.objectives.flow_matching import FlowMatchingObjective
from reflexarc.training.optimization import AveragedWeights, make_optimizer
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.schedule import learning_rate_factor
from reflexarc.training.trained_modules import module_rows

from .tiny_statevla import tiny_statevla


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 8)
        self.convolution = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(5, 4)
        self.A_log = nn.Parameter(torch.zeros(4, 16))
        self.D = nn.Parameter(torch.ones(4))
        self.position_embedding = nn.Parameter(torch.zeros(1, 9, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_only_matrices_and_kernels_decay_and_frozen_weights_are_left_out() -> None:
    block = Block()
    optimizer = make_optimizer(block, OptimizerConfig(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    decayed, kept = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert decayed == {"projection.weight", "convolution.weight"}
    assert kept == {
        "projection.bias", "convolution.bias", "norm.weight", "norm.bias", "table.weight",
        "A_log", "D", "position_embedding",
    }  # fmt: skip
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]


def test_modules_learn_at_their_own_rates_and_the_longest_path_counts() -> None:
    block = nn.ModuleDict({"slow": Block(), "fast": Block()})
    scales = {"slow": 0.1, "slow.norm": 0.5}
    groups = make_optimizer(block, OptimizerConfig(weight_decay=0.1), scales).param_groups
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    scale = {names[id(p)]: group["scale"] for group in groups for p in group["params"]}
    assert scale["slow.norm.weight"] == 0.5
    assert {scale[name] for name in scale if name.startswith("fast.")} == {1.0}
    assert scale["slow.projection.weight"] == 0.1
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_nothing_left_to_train_is_named() -> None:
    with pytest.raises(ConfigError, match="every module is frozen"):
        make_optimizer(Block().requires_grad_(False), OptimizerConfig())


def test_averaged_weights_follow_and_give_the_trained_ones_back() -> None:
    layer = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    averaged = AveragedWeights(layer, decay=0.5)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    averaged.update(step=1000)
    with averaged.applied():
        torch.testing.assert_close(layer.weight.detach(), torch.full((2, 2), 0.5))
    torch.testing.assert_close(layer.weight.detach(), torch.ones(2, 2))
    # Early on the average follows faster than its decay: (1 + 1) / (10 + 1) of the past is kept.
    early = AveragedWeights(layer, decay=0.999)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    early.update(step=1)
    torch.testing.assert_close(early.values["weight"], torch.full((2, 2), 2 - 2 / 11))


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_schedules_rise_to_the_peak_and_fall_to_the_final_fraction(name: str) -> None:
    config = ScheduleConfig.model_validate(
        {"name": name, "warmup_steps": 10, "warmup_fraction": 0.1, "final_fraction": 0.05}
    )
    factors = [learning_rate_factor(config, step, 100) for step in range(101)]
    peak = factors.index(max(factors))
    assert max(factors) == pytest.approx(1.0)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 < factors[0] < 0.1
    assert factors[-1] == pytest.approx(0.05)


def test_the_table_of_modules_divides_only_what_learns_differently() -> None:
    policy = tiny_statevla()
    recipe = load_recipe(
        "statevla_tiny",
        ["freeze=['representation.tokenizer']", "learning_rate_scale={flow.stack: 0.1}"],
    )
    freeze_modules(policy, recipe.freeze)
    objective = FlowMatchingObjective(FlowMatchingConfig(), gripper_index=6)
    rows = {row.path: row for row in module_rows(recipe, policy, objective)}
    rate = recipe.optimizer.learning_rate
    assert rows["representation.tokenizer"].learning_rate is None
    assert rows["representation.encoder"].learning_rate == rate
    assert rows["flow.stack"].learning_rate == pytest.approx(0.1 * rate)
    assert rows["flow.position"].learning_rate == rows["gripper"].learning_rate == rate
    assert sum(row.parameters for row in rows.values()) == sum(
        parameter.numel() for parameter in policy.parameters()
    )

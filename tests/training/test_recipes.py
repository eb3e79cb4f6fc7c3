"""Recipes: strict keys, overrides, packaged files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from reflexarc.contract.errors import ConfigError
from reflexarc.training.recipe_files import (
    load_recipe,
    packaged_recipes,
    recipe_differences,
    recipe_stages,
    recipe_to_yaml,
)


def test_every_packaged_recipe_loads_and_its_yaml_reads_back_equal(tmp_path: Path) -> None:
    assert {"statevla_tiny", "statevla_pilot_libero_object"} <= set(packaged_recipes())
    for name in packaged_recipes():
        stages = range(1, len(recipe_stages(name)) + 1)
        for stage in list(stages) or [None]:
            recipe = load_recipe(name, stage=stage)
            assert recipe.name == name
            path = tmp_path / "recipe.yaml"
            path.write_text(recipe_to_yaml(recipe))
            assert load_recipe(str(path), stage=stage) == recipe


TEMPORAL = "statevla_temporal_libero_object_small"


def test_a_stage_is_a_recipe_of_what_is_shared_and_its_own(tmp_path: Path) -> None:
    one, two = (load_recipe(TEMPORAL, stage=number) for number in (1, 2))
    assert (one.objective.name, two.objective.name) == ("temporal_jepa", "flow_matching")
    assert (one.best_metric, two.best_metric) == ("total", "action_mae")
    assert two.freeze == ("representation",)
    assert one.stage and one.stage.name == "representation"
    assert two.stage and (two.stage.number, two.stage.from_scratch) == (2, False)
    assert {name: getattr(one, name) for name in ("policy", "contract", "data", "language")} == {
        name: getattr(two, name) for name in ("policy", "contract", "data", "language")
    }
    changed = load_recipe(TEMPORAL, ["training.epochs=3", "objective.horizon=8"], stage=1)
    assert (changed.training.epochs, changed.objective.horizon) == (3, 8)  # type: ignore[union-attr]
    scratch = load_recipe(TEMPORAL, stage=2, from_scratch=True)
    assert scratch.freeze == () and scratch.stage and scratch.stage.from_scratch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"stages 1 \(representation\), 2 \(policy\): choose one with --stage"),
        ({"stage": 3}, r"has no stage 3, only 1 \(representation\), 2 \(policy\)"),
        ({"stage": 1, "from_scratch": True}, "starts from random weights here anyway"),
        ({"stage": 1, "overrides": ["stages.0.freeze=[]"]}, "without its stage"),
        ({"stage": 2, "overrides": ["objective.horizon=3"]}, r"did you mean 'objective\.name'"),
        ({"stage": 1, "overrides": ["training.best_metric=flow"]}, "temporal_jepa reports: total"),
    ],
)
def test_a_wrong_stage_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(TEMPORAL, **arguments)
    with pytest.raises(ConfigError, match="no stages, so there is no stage 2"):
        load_recipe("statevla_tiny", stage=2)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("horizon: 4", "horizn: 4", r"'stages\.representation\.objective\.horizn'.*horizon"),
        ("freeze: [repr", "freze: [repr", r"'stages\.policy\.freze'.*'stages\.policy\.freeze'"),
        ("epochs: 14", "epochs: no", r"stages\.policy\.training\.epochs"),
        ("name: policy", "name: representation", "names of stages must differ"),
        ("\nstages:", "\nfreeze: []\nstages:", "freeze stands beside stages"),
        ("  - name: policy", "  - called: policy", "stage 2 must be a map of keys with a name"),
    ],
)
def test_a_fault_in_any_stage_is_found_whichever_is_chosen(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    packaged = resources.files("reflexarc.training") / "recipes" / f"{TEMPORAL}.yaml"
    path = tmp_path / "mine.yaml"
    path.write_text(packaged.read_text().replace(before, after, 1))
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path), stage=1)


@pytest.mark.parametrize(
    ("override", "path", "neighbour"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat", "optimizer.learning_rate"),
        ("trainin.seed=1", "trainin", "training"),
        ("policy.d_modle=3", "policy.d_modle", "policy.d_model"),
        ("policy.vision.poll=3", "policy.vision.poll", "policy.vision.pool"),
        ("training.learning_rate=1", "training.learning_rate", "optimizer.learning_rate"),
        ("data.validation_fractio=0", "data.validation_fractio", "data.validation_fraction"),
        ("objective.flow_weigt=1", "objective.flow_weigt", "objective.flow_weight"),
        # A key of the other objective: the union knows which of the two this recipe names.
        ("objective.ema_start=1", "objective.ema_start", "objective.name"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest_neighbour(
    override: str, path: str, neighbour: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("statevla_tiny", [override])
    assert caught.value.field == path
    assert repr(path) in caught.value.message
    assert repr(neighbour) in caught.value.message


def test_an_unknown_key_in_a_file_is_refused_too(tmp_path: Path) -> None:
    text = recipe_to_yaml(load_recipe("statevla_tiny"))
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("batch_size:", "batchsize:"))
    with pytest.raises(ConfigError, match=r"'training\.batchsize'.*'training\.batch_size'"):
        load_recipe(str(path))


def test_overrides_are_typed_as_yaml() -> None:
    recipe = load_recipe(
        "statevla_tiny",
        [
            "optimizer.learning_rate=3e-4",
            "data.tasks=[a, b]",
            "training.epochs=null",
            "training.steps=7",
            "training.ema_decay=0.9",
        ],
    )
    assert recipe.optimizer.learning_rate == 3e-4
    assert recipe.data.tasks == ("a", "b")
    assert (recipe.training.steps, recipe.training.epochs) == (7, None)
    assert recipe.training.ema_decay == 0.9


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.batch_size=0", "training.batch_size"),
        ("training.batch_size=many", "training.batch_size"),
        ("contract.state_layout=eef7", "eef7"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate"),
        ("family=statevl", "statevla"),
        ("objective.flow_weight=-1", "objective.flow_weight: "),
        ("objective.name=temporal_jep", "did you mean 'temporal_jepa'"),
        ("objective=3", "objective"),
        (
            "training.steps=3",
            "training: give exactly one of epochs and steps, got epochs=1 and steps=3; clear",
        ),
        ("training.seed", "key=value"),
        ("name.first=x", "name holds a value"),
    ],
)
def test_a_wrong_value_is_named(override: str, named: str) -> None:
    overrides = [override] if "steps" not in override else [override, "training.epochs=1"]
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        load_recipe("statevla_tiny", overrides)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'statevla_tiny'"):
        load_recipe("statevla_tny")
    with pytest.raises(ConfigError, match="no recipe file"):
        load_recipe("absent.yaml")


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02PK\xff")
    with pytest.raises(ConfigError, match=r"model\.pt cannot be read as a YAML recipe"):
        load_recipe(str(path))


def test_differences_name_keys_and_both_values() -> None:
    first = load_recipe("statevla_tiny")
    second = load_recipe("statevla_tiny", ["training.seed=5"])
    assert recipe_differences(first, first) == []
    assert recipe_differences(first, second) == ["training.seed: 0 -> 5"]

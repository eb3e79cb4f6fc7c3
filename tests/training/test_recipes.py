"""Recipes: strict keys, overrides, packaged files."""

from __future__ import annotations

from pathlib import Path

import pytest

from reflexarc.contract.errors import ConfigError
from reflexarc.training.recipe_files import (
    load_recipe,
    packaged_recipes,
    recipe_differences,
    recipe_to_yaml,
)


def test_every_packaged_recipe_loads_and_its_yaml_reads_back_equal(tmp_path: Path) -> None:
    assert {"statevla_tiny", "statevla_pilot_libero_object"} <= set(packaged_recipes())
    for name in packaged_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe_to_yaml(recipe))
        assert load_recipe(str(path)) == recipe


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
        ("training.steps=3", "exactly one of epochs and steps"),
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

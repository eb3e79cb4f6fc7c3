"""One stage out of a recipe's file that holds several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reflexarc.contract.errors import ConfigError
from reflexarc.training.config import Recipe, Stage, Trained

_STAGES = "stages"


def stage_names(values: Mapping[str, Any]) -> list[str]:
    """Names of a recipe file's stages in order; empty where it holds none."""
    stages = values.get(_STAGES)
    if stages is None:
        return []
    if not isinstance(stages, list) or not stages:
        raise ConfigError("stages must be a list of at least one map of keys", field=_STAGES)
    for number, stage in enumerate(stages, start=1):
        if not isinstance(stage, Mapping) or not isinstance(stage.get("name"), str):
            raise ConfigError(f"stage {number} must be a map of keys with a name", field=_STAGES)
    names = [str(stage["name"]) for stage in stages]
    if len(set(names)) != len(names):
        raise ConfigError(f"the names of stages must differ, got {names}", field=_STAGES)
    return names


def select_stage(values: Mapping[str, Any], number: int | None) -> dict[str, Any]:
    """The values of a recipe of one stage: what the stages share, and the keys of stage ``number``.

    Raises ConfigError when there is no such stage, or several and none was chosen.
    """
    names = stage_names(values)
    if not names:
        _refuse_other_number(values, number)
        return dict(values)
    beside = sorted(values.keys() & Trained.model_fields.keys())
    if beside:
        raise ConfigError(
            f"{beside[0]} stands beside stages; it belongs into each of them", field=beside[0]
        )
    listed = ", ".join(f"{place} ({name})" for place, name in enumerate(names, start=1))
    if number is None:
        raise ConfigError(
            f"the recipe {values.get('name')} has the stages {listed}: choose one with --stage",
            field="stage",
        )
    if not 1 <= number <= len(names):
        raise ConfigError(
            f"the recipe {values.get('name')} has no stage {number}, only {listed}", field="stage"
        )
    chosen = {key: value for key, value in values[_STAGES][number - 1].items() if key != "name"}
    shared = {key: value for key, value in values.items() if key != _STAGES}
    return {**shared, "stage": {"number": number, "names": names}, **chosen}


def without_start(recipe: Recipe) -> Recipe:
    """The same stage begun from random weights: nothing is frozen or slowed down.

    Raises ConfigError for a recipe whose weights are random to begin with.
    """
    stage = recipe.stage
    if stage is None or stage.number == 1:
        raise ConfigError(
            f"--from-scratch is for a stage after the first; {recipe.name} starts from random "
            "weights here anyway",
            field="stage",
        )
    return recipe.model_copy(
        update={
            "stage": stage.model_copy(update={"from_scratch": True}),
            "freeze": (),
            "learning_rate_scale": {},
        }
    )


def stage_prefixes(values: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], type[Stage]]]:
    """Of each stage the prefix of its keys in messages, its values, and their model."""
    return [
        (f"{_STAGES}.{name}.", stage, Stage)
        for name, stage in zip(stage_names(values), values.get(_STAGES) or [], strict=True)
    ]


def _refuse_other_number(values: Mapping[str, Any], number: int | None) -> None:
    stage = values.get("stage")
    is_one = isinstance(stage, Mapping) and isinstance(stage.get("number"), int)
    here = stage["number"] if is_one and isinstance(stage, Mapping) else 1
    if number not in (None, here):
        raise ConfigError(
            f"the recipe {values.get('name')} holds no stages"
            + (f"; it is stage {here} of one that does" if is_one else "")
            + f", so there is no stage {number}",
            field="stage",
        )

"""A later stage starts from the weights of the stage before, once it is sure that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reflexarc.contract import NormalizationStatistics
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.checkpoint import LoadedPolicy, load_checkpoint
from reflexarc.policy.checkpoint_files import read_manifest
from reflexarc.policy.interface import Policy
from reflexarc.policy.language import INDEX_FILE, LanguageEmbeddings
from reflexarc.training.config import Recipe
from reflexarc.training.recipe_files import value_differences
from reflexarc.training.run_folder import RunFolder

_SHOWN = 8
# What one encoder gives on two machines differs by rounding alone.
_SAME_VECTOR = 1e-3
# Facts of one checkpoint or one build, not of what its policy is.
_OF_THE_CHECKPOINT = frozenset({"checkpoint_fingerprint", "statistics_sha256", "protocol_version"})


def open_start(directory: Path) -> LoadedPolicy:
    """The newest checkpoint of a run's folder, or the checkpoint itself, on the CPU."""
    last = RunFolder(directory).pointed("last") if directory.is_dir() else None
    return load_checkpoint(last or directory)


def origin_of(start: LoadedPolicy) -> dict[str, Any]:
    """What a checkpoint says of the one that it started from."""
    recipe = start.provenance.get("recipe", {})
    return {
        "recipe": recipe.get("name"),
        "stage": recipe.get("stage"),
        "step": start.provenance.get("step"),
        "fingerprint": start.fingerprint,
    }


def check_stage(recipe: Recipe, start: LoadedPolicy) -> None:
    """Raise ConfigError unless ``start`` was made by the stage before, of the same recipe."""
    assert recipe.stage is not None
    wanted = recipe.stage.number - 1
    before = start.provenance.get("recipe") or {}
    stage = before.get("stage") or {}
    if (before.get("name"), stage.get("number")) == (recipe.name, wanted):
        return
    number, names = stage.get("number"), stage.get("names") or []
    came = f"stage {number} ({names[number - 1]})" if number else "a recipe without stages"
    raise ConfigError(
        f"--init-from {start.directory} was trained by {came} of {before.get('name')!r}; "
        f"{recipe.name} starts here from stage {wanted} ({recipe.stage.names[wanted - 1]}) of "
        f"{recipe.name!r}: give the folder of such a run",
        field="init_from",
    )


def check_fits(start: LoadedPolicy, policy: Policy, statistics: NormalizationStatistics) -> None:
    """Raise ConfigError naming each key in which the two stages' policies differ, both values.

    Family, architecture, contract, frozen backbones, instructions' encoder and normalisation have
    to be equal: weights that fit by shape alone would have learnt to read something else.
    """
    now, before = _description(policy), _description(start.policy)
    if not (before["language"].get("sha256") and now["language"].get("sha256")):
        for described in (before, now):  # checkpoints did not always say which weights it had
            described["language"].pop("sha256", None)
    found = value_differences(before, now)
    if found:
        raise ConfigError(
            f"--init-from {start.directory} is another policy than this stage's (there -> here): "
            f"{_listed(found)}. Give the settings that it was trained with, or train the stage "
            "before anew with these",
            field=found[0].partition(":")[0],
        )
    found = _statistics_differences(start.statistics, statistics)
    if found:
        raise ConfigError(
            f"--init-from {start.directory} normalises otherwise than this stage's data "
            f"(there -> here): {_listed(found)}. Give the demonstrations, the split and "
            "data.labels that it was trained with",
            field="data",
        )


def load_start(policy: Policy, start: LoadedPolicy) -> None:
    """Give the policy the weights of ``start``, which fits."""
    policy.load_state_dict(start.policy.state_dict())


def _description(policy: Policy) -> dict[str, Any]:
    contract = policy.contract.model_dump(mode="json", exclude=set(_OF_THE_CHECKPOINT))
    backbones = {path: f"{b.name} {b.sha256}" for path, b in policy.frozen_backbones().items()}
    return {
        "family": policy.family,
        "policy": policy.config.model_dump(mode="json"),
        "contract": contract,
        "frozen_backbones": backbones,
        "language": _language(policy),
    }


def _language(policy: Policy) -> dict[str, Any]:
    """Which encoder made a policy's embeddings; empty where it carries none."""
    files = policy.extra_files()
    if INDEX_FILE not in files:
        return {}
    identity = LanguageEmbeddings.from_files(files).identity
    return {"encoder": identity.name, "sha256": identity.sha256}


def _statistics_differences(
    before: NormalizationStatistics, now: NormalizationStatistics
) -> list[str]:
    found = []
    for feature in ("state", "action"):
        one, two = getattr(before, feature), getattr(now, feature)
        for name in ("mean", "std", "min", "max", "q01", "q99"):
            first, second = np.array(getattr(one, name)), np.array(getattr(two, name))
            # Another version of numpy may sum in another order.
            different = ~np.isclose(first, second, rtol=1e-9, atol=1e-12)
            found += [
                f"{feature}.{name}[{one.names[i]}]: {first[i]:.6g} -> {second[i]:.6g}"
                for i in np.flatnonzero(different)
            ]
    return found


def _listed(found: list[str]) -> str:
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def required_start(recipe: Recipe, shown_name: str) -> ConfigError:
    """The error of a later stage that was given no weights to start from."""
    assert recipe.stage is not None
    number, names = recipe.stage.number, recipe.stage.names
    return ConfigError(
        f"stage {number} ({recipe.stage.name}) starts from the weights of stage {number - 1} "
        f"({names[number - 2]}): make them with 'reflexarc train {shown_name} --stage "
        f"{number - 1} --output DIR', then give --init-from DIR; or train all of it at once from "
        "random weights with --from-scratch",
        field="init_from",
    )


def kept_origin(last: Path, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Where a run that is resumed from ``last`` began, as its checkpoint says.

    Raises ConfigError when ``given``, where it is to begin now, is something else.
    """
    before = read_manifest(last)[0].provenance.get("init_from")
    if given is not None and given != before:
        began = "random weights" if before is None else f"{before['fingerprint'][:12]}…"
        raise ConfigError(
            f"the run of {last} began with {began}, not with {given['fingerprint'][:12]}…; leave "
            "out --init-from to resume it, or give --fresh",
            field="init_from",
        )
    return None if before is None else dict(before)


def check_same_language(last: Path, policy: Policy) -> None:
    """Raise ConfigError where instructions mean something else than to the run that goes on.

    A table of embeddings may have been made anew since, at the same path.
    """
    files = policy.extra_files()
    if INDEX_FILE not in files:
        return
    before, now = LanguageEmbeddings.load(last), LanguageEmbeddings.from_files(files)
    known = not now.missing(before.instructions)
    if known and torch.allclose(now.lookup(before.instructions), before.vectors, atol=_SAME_VECTOR):
        return
    raise ConfigError(
        f"the run of {last} has other embeddings of its instructions (by {before.encoder}) than "
        f"the recipe gives now (by {now.encoder}). A run with a table goes on with its own by "
        f"--set language.table={last}; or give --fresh",
        field="language",
    )

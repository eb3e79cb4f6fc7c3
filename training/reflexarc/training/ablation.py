"""Recipes that differ in one thing: which, where each runs, and what a report says of them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reflexarc.contract.errors import ConfigError
from reflexarc.training.config import Recipe
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.runs.plot import Curves, read_curves

_FIRST_PORT = 29500
_MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Ablation:
    """A key of a recipe and what it is set to.

    Attributes:
        family: of the recipes that have the key.
        key: that each arm sets to its own name.
        arms: all there are; ``default`` runs where none are chosen.
        reference: the arm that others are compared with.
        store: overrides with which one feature store serves every arm.
    """

    family: str
    key: str
    arms: tuple[str, ...]
    default: tuple[str, ...]
    reference: str
    store: tuple[str, ...]


ABLATIONS: Mapping[str, Ablation] = {
    "geometry": Ablation(
        family="qwen_geometry",
        key="policy.compressor",
        arms=("none", "pool", "per_layer", "qformer", "control"),
        default=("none", "pool", "per_layer", "qformer"),
        reference="none",
        store=("policy.compressor=qformer", "policy.stored_geometry=every"),
    )
}


@dataclass(frozen=True)
class Place:
    """Where an arm runs: what is set in the environment of its process."""

    environment: Mapping[str, str]
    device: str


@dataclass(frozen=True)
class ArmCosts:
    """What one arm's run says of itself.

    Attributes:
        parameters: trained numbers in its checkpoint, by module of the policy.
        samples_per_second: median over the run's log lines.
        memory: MiB, the most that was reported, and of what.
        best: the held-out metric that chose its checkpoint, and its value.
    """

    arm: str
    parameters: Mapping[str, int]
    samples_per_second: float | None
    memory: tuple[str, float] | None
    best: tuple[str, float] | None


def find_ablation(name: str, recipe: Recipe, chosen: Sequence[str]) -> tuple[Ablation, list[str]]:
    """The ablation and its arms. ConfigError for names there are not, or another family."""
    if name not in ABLATIONS:
        raise ConfigError(
            f"--ablation {name!r} is unknown; known: {', '.join(ABLATIONS)}", field="ablation"
        )
    ablation = ABLATIONS[name]
    if recipe.family != ablation.family:
        raise ConfigError(
            f"--ablation {name} sets {ablation.key}, which the family {recipe.family} has not; "
            f"give a recipe of {ablation.family}",
            field="ablation",
        )
    unknown = [arm for arm in chosen if arm not in ablation.arms]
    if unknown or len(set(chosen)) != len(chosen):
        raise ConfigError(
            f"--arms {','.join(chosen)}: choose each at most once among {', '.join(ablation.arms)}",
            field="arms",
        )
    return ablation, list(chosen or ablation.default)


def arm_overrides(ablation: Ablation, arm: str, group: str) -> list[str]:
    """What ``--set`` adds for an arm: its own setting, and one group for all that report."""
    return [f"{ablation.key}={arm}", f"reporting.group={group}"]


def places(arms: Sequence[str], gpus: int, device: str) -> list[Place]:
    """A place for each arm: a GPU of its own and a port that no other listens on.

    With fewer than two GPUs, or a device named, all get the same device, to run one after another.
    """
    spread = device in ("auto", "cuda") and gpus > 1
    found = []
    for number, _ in enumerate(arms):
        environment = {"MASTER_PORT": str(_FIRST_PORT + number)}
        if spread:
            environment["CUDA_VISIBLE_DEVICES"] = _visible(number % gpus)
        found.append(Place(environment, "cuda" if spread else device))
    return found


def _visible(number: int) -> str:
    """The GPU of that number among those that this process may see."""
    allowed = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    return allowed[number] if number < len(allowed) else str(number)


def read_costs(arm: str, folder: Path) -> tuple[ArmCosts, Curves]:
    """What a run has reported so far. ConfigError where it has reported nothing."""
    curves = read_curves(folder)
    run = RunFolder(folder)
    checkpoint = run.pointed("best") or run.pointed("last")
    # A checkpoint says it; before the first one the recipe does.
    name = curves.best_metric or load_recipe(str(run.recipe)).best_metric
    series = curves.validation.get(name)
    held = {n: values for n, values in curves.train.items() if n.startswith("memory/")}
    memory = max(held, key=lambda n: n == "memory/device_mb") if held else None
    speeds = curves.train.get("samples_per_second")
    return (
        ArmCosts(
            arm=arm,
            parameters={} if checkpoint is None else _parameters(checkpoint / _MODEL_FILE),
            samples_per_second=None if speeds is None else float(np.median(speeds[:, 1])),
            memory=None if memory is None else (memory, float(held[memory][:, 1].max())),
            best=None if series is None else (name, float(series[:, 1].min())),
        ),
        curves,
    )


def _parameters(path: Path) -> dict[str, int]:
    """Numbers by their module, from the file's header alone."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    counts: dict[str, int] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            module = name.partition(".")[0]
            counts[module] = counts.get(module, 0) + int(np.prod(entry["shape"]))
    return counts

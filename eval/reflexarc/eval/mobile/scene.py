"""Random scenes: where the base, the targets and the obstacles stand.

Every scene has all targets, each seen from the start, and two obstacles on the straight ways to
two of them. Which two says nothing about the one that is named: of every task's scenes exactly
every other has an obstacle on its own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import SimulatorError
from reflexarc.eval.mobile.tasks import TARGETS

Point: TypeAlias = npt.NDArray[np.float64]
Split = Literal["collected", "evaluated"]
"""Scenes of one are never those of the other: they are drawn from different streams."""

BASE_RADIUS = 0.16
TARGET_RADIUS = 0.17
OBSTACLE_RADIUS = 0.13
REACH = 0.46
"""Metres between the centres of base and target at which a target is reached."""

_BEARINGS = np.deg2rad([-33.0, -11.0, 11.0, 33.0])
_BEARING_JITTER = np.deg2rad(3.0)
_DISTANCES = (1.8, 2.7)
_CLEARANCE = 0.5  # of every straight way from the other targets
_TRIES = 1000


@dataclass(frozen=True)
class Scene:
    """Metres in the world's plane; the base looks along x.

    Attributes:
        start: ``(2,)`` of the base.
        targets: ``(4, 2)``, as in ``TARGETS``.
        obstacles: ``(2, 2)``.
        obstructed: indices of the targets on whose straight ways the obstacles stand.
    """

    start: Point
    targets: Point
    obstacles: Point
    obstructed: tuple[int, ...]


def draw_scene(split: Split, task: int, state: int, seed: int) -> Scene:
    """The scene of these numbers: the same on every machine."""
    stream = {"collected": 0, "evaluated": 1}[split]
    random = np.random.default_rng([20251119, stream, seed, task, state])
    for _ in range(_TRIES):
        scene = _attempt(random, task, own_way=state % 2 == 0)
        if _is_clear(scene):
            return scene
    raise SimulatorError(f"no scene of task {task}, state {state}, seed {seed} has room")


def _attempt(random: np.random.Generator, task: int, *, own_way: bool) -> Scene:
    count = len(TARGETS)
    start = np.array([0.0, random.uniform(-0.2, 0.2)])
    bearings = random.permutation(_BEARINGS)
    bearings = bearings + random.uniform(-_BEARING_JITTER, _BEARING_JITTER, count)
    distances = random.uniform(*_DISTANCES, count)
    directions = np.stack([np.cos(bearings), np.sin(bearings)], axis=1)
    targets = start + distances[:, None] * directions
    others = random.permutation([index for index in range(count) if index != task])
    obstructed = (task, int(others[0])) if own_way else (int(others[0]), int(others[1]))
    obstacles = []
    for index in obstructed:
        sideways = random.uniform(0.03, 0.1) * random.choice([-1.0, 1.0])
        normal = np.array([-directions[index, 1], directions[index, 0]])
        along = random.uniform(0.4, 0.55) * distances[index]
        obstacles.append(start + along * directions[index] + sideways * normal)
    order = random.permutation(len(obstacles))  # which obstacle is which says nothing either
    return Scene(start, targets, np.stack(obstacles)[order], tuple(sorted(obstructed)))


def _is_clear(scene: Scene) -> bool:
    """Whether the targets stand apart, and no straight way passes another target."""
    for index, target in enumerate(scene.targets):
        others = np.delete(scene.targets, index, axis=0)
        if np.linalg.norm(others - target, axis=1).min() < 2 * REACH:
            return False
        if distance_to_segment(others, scene.start, target).min() < _CLEARANCE:
            return False
        if np.linalg.norm(scene.obstacles - target, axis=1).min() < REACH + OBSTACLE_RADIUS:
            return False
    return True


def distance_to_segment(points: Point, start: Point, end: Point) -> Point:
    """``(N,)`` of ``points (N, 2)`` from the way between ``start (2,)`` and ``end (2,)``."""
    along = end - start
    share = np.clip((points - start) @ along / max(float(along @ along), 1e-12), 0.0, 1.0)
    found: Point = np.linalg.norm(points - (start + share[:, None] * along), axis=1)
    return found

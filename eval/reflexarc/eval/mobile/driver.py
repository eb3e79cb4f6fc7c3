"""The scripted driver: sees every pose, and drives the shortest way that touches nothing else."""

from __future__ import annotations

import numpy as np
from scipy.sparse.csgraph import dijkstra

from reflexarc.eval.mobile.scene import (
    BASE_RADIUS,
    OBSTACLE_RADIUS,
    REACH,
    Point,
    Scene,
    distance_to_segment,
)

CRUISE = 0.4  # metres a second
_MARGIN = 0.06
_RING = 16  # places around each thing through which a way may lead
_RING_FACTOR = 1.08  # the ring's corners stay outside of the circle that it goes around


class Driver:
    """Plans anew at every step, so that being pushed off the way costs nothing but the way back.

    Args:
        scene: with all poses.
        goal: index of the target to drive to.
    """

    def __init__(self, scene: Scene, goal: int) -> None:
        self._goal = scene.targets[goal]
        others = np.delete(scene.targets, goal, axis=0)
        self._centres = np.concatenate([others, scene.obstacles])
        clear = BASE_RADIUS + OBSTACLE_RADIUS + _MARGIN
        self._radii = np.array([REACH + _MARGIN] * len(others) + [clear] * len(scene.obstacles))
        angles = np.linspace(0, 2 * np.pi, _RING, endpoint=False)
        around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        factor = _RING_FACTOR / np.cos(np.pi / _RING)
        ring = self._centres[:, None] + factor * self._radii[:, None, None] * around
        places = ring.reshape(-1, 2)
        self._places = np.array([p for p in places if self._outside(p)]).reshape(-1, 2)

    def velocity(self, position: Point) -> Point:
        """``(2,)`` m/s to drive at now, from ``position (2,)``."""
        ahead = self._next_place(position) - position
        length = max(float(np.linalg.norm(ahead)), 1e-9)
        velocity: Point = ahead / length * CRUISE
        return velocity

    def _next_place(self, position: Point) -> Point:
        """The first corner of the shortest way, or the goal itself."""
        inside = self._radii - np.linalg.norm(self._centres - position, axis=1)
        worst = int(inside.argmax())
        if inside[worst] > 0:  # pushed too near to something: first away from it
            away = position - self._centres[worst]
            sideways = 0.5 * (self._goal - position) / np.linalg.norm(self._goal - position)
            target: Point = position + away / max(float(np.linalg.norm(away)), 1e-9) + sideways
            return target
        nodes = np.concatenate([position[None], self._goal[None], self._places])
        lengths = np.linalg.norm(nodes[:, None] - nodes[None], axis=2)
        free = self._visible(nodes)
        _, before = dijkstra(np.where(free, lengths, 0.0), indices=0, return_predecessors=True)
        node = 1
        if before[node] < 0:
            goal: Point = self._goal
            return goal
        while before[node] != 0:
            node = before[node]
        found: Point = nodes[node]
        return found

    def _visible(self, nodes: Point) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        """``bool (N, N)``: whether the straight way between two nodes touches no circle."""
        start, end = nodes[:, None], nodes[None]
        along = end - start
        square = np.maximum((along**2).sum(-1), 1e-12)
        free = np.ones(square.shape, dtype=bool)
        for centre, radius in zip(self._centres, self._radii, strict=True):
            share = np.clip(((centre - start) * along).sum(-1) / square, 0.0, 1.0)
            nearest = start + share[..., None] * along
            free &= ((nearest - centre) ** 2).sum(-1) >= radius**2
        return free

    def _outside(self, place: Point) -> bool:
        return bool((np.linalg.norm(self._centres - place, axis=1) >= self._radii).all())


def is_obstructed(scene: Scene, goal: int) -> bool:
    """Whether an obstacle stands on the straight way from the start to the target ``goal``."""
    distance = distance_to_segment(scene.obstacles, scene.start, scene.targets[goal])
    return bool((distance < BASE_RADIUS + OBSTACLE_RADIUS).any())

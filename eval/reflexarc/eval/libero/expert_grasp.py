"""Where to grip an object: across its narrowest horizontal slice, or by its rim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from reflexarc.eval.libero.geometry import (
    FINGER_TIP_BELOW_GRIP,
    Scene,
    bounding_center,
    rotation_about_z,
)

FloatArray = npt.NDArray[np.float64]

_OPEN_HALF_GAP = 0.0385
_WIDEST_PINCH = 0.072
_FLAT_OBJECT = 0.06
# Obstacle points that it takes to change sides. A bowl that stands free can be taken on either
# side; chosen by chance, half of a task's demonstrations would reach left and half right of it,
# and a policy with little noise in its sampler learns their middle, where nothing can be gripped.
_OTHER_SIDE = 15.0


@dataclass(frozen=True)
class Grasp:
    """``center (3,)`` of the grip site in metres, gripper ``yaw`` in radians.

    ``pinch`` closes around the object, ``rim`` around its wall: then the object hangs beside
    the gripper, and tilts.
    """

    kind: Literal["pinch", "rim"]
    center: FloatArray
    yaw: float


def plan_grasp(scene: Scene, name: str) -> Grasp:
    """The grasp with the fewest obstacle points in the way of the fingers and hand.

    Objects that are too wide to pinch in every direction are taken by their rim, on the side of
    positive y (the robot's left) unless that is blocked.
    """
    points = scene.visible_points(name)
    obstacles = scene.obstacle_points(exclude=(name,))
    pinches = _pinches(points, obstacles)
    kind: Literal["pinch", "rim"] = "pinch" if pinches else "rim"
    candidates = pinches or _rim_grasps(points, obstacles)
    _, center, yaw = min(candidates, key=lambda candidate: candidate[0])
    return Grasp(kind, center, yaw)


def _pinches(points: FloatArray, obstacles: FloatArray) -> list[tuple[float, FloatArray, float]]:
    """``(cost, center, yaw)`` of every direction in which the object fits between the fingers."""
    low, high = points[:, 2].min(), points[:, 2].max()
    height = high - low
    flat = height < _FLAT_OBJECT
    if flat:
        grip = max(low + FINGER_TIP_BELOW_GRIP + 0.003, min(low + 0.5 * height, high - 0.005))
    else:
        grip = max(high - 0.045, low + 0.4 * height)
    half_slice = max(0.012, 0.25 * height) if flat else 0.012
    cut = points[np.abs(points[:, 2] - grip) < half_slice]
    if len(cut) < 8:
        cut = points
    candidates = []
    for yaw in np.deg2rad(np.arange(-90, 90, 5)):
        across, closing = rotation_about_z(yaw)[:, 0], rotation_about_z(yaw)[:, 1]
        along_closing, along_across = cut @ closing, cut @ across
        width = np.ptp(along_closing)
        if width > _WIDEST_PINCH:
            continue
        center = (along_closing.max() + along_closing.min()) / 2 * closing + (
            along_across.max() + along_across.min()
        ) / 2 * across
        center[2] = grip
        hits = _points_in_the_way(center, yaw, obstacles)
        candidates.append((hits + 40 * width + 0.7 * abs(yaw), center, float(yaw)))
    return candidates


def _rim_grasps(points: FloatArray, obstacles: FloatArray) -> list[tuple[float, FloatArray, float]]:
    """``(cost, center, yaw)`` all around the rim of an open, round object."""
    low, high = points[:, 2].min(), points[:, 2].max()
    rim = points[points[:, 2] > high - 0.008]
    middle = bounding_center(rim)
    radius = np.median(np.linalg.norm(rim[:, :2] - middle[:2], axis=1))
    grip = high - 0.022
    if grip - FINGER_TIP_BELOW_GRIP < low + 0.004:
        grip = low + FINGER_TIP_BELOW_GRIP + 0.004
    candidates = []
    for angle in np.deg2rad(np.arange(0, 360, 10)):
        outward = np.array([np.cos(angle), np.sin(angle), 0.0])
        # The fingers close along the wall's normal; half a turn of the gripper is the same grasp.
        yaw = (np.arctan2(-outward[0], outward[1]) + np.pi / 2) % np.pi - np.pi / 2
        center = middle + (radius - 0.003) * outward
        center[2] = grip
        hits = _points_in_the_way(center, yaw, obstacles)
        side = 0.0 if outward[1] > -1e-9 else _OTHER_SIDE
        candidates.append((hits + 1.0 * abs(yaw) + side, center, float(yaw)))
    return candidates


def _points_in_the_way(center: FloatArray, yaw: float, obstacles: FloatArray) -> int:
    """Obstacle points in the space that open fingers and hand sweep on their way down."""
    # In the gripper's frame: x across the fingers, y their closing direction, z up.
    x, y, z = ((obstacles - center) @ rotation_about_z(yaw)).T
    fingers = (
        (np.abs(x) < 0.0175)
        & (np.abs(np.abs(y) - (_OPEN_HALF_GAP + 0.011)) < 0.0145)
        & (z > -FINGER_TIP_BELOW_GRIP - 0.004)
    )
    hand = (np.abs(x) < 0.038) & (np.abs(y) < 0.105) & (z > 0.045)
    return int(fingers.sum() + hand.sum())

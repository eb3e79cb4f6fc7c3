"""Privileged geometry of a scene, read from MuJoCo: where surfaces are, what is in the way."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from reflexarc.eval.libero.simulator import LiberoSimulator

FloatArray = npt.NDArray[np.float64]

# The gripper points straight down: its approach axis is the world's -z.
POINTING_DOWN = np.diag([1.0, -1.0, -1.0])
FINGER_TIP_BELOW_GRIP = 0.0108
_VISUAL_GROUP, _COLLISION_GROUP = 1, 0
_MAXIMUM_MESH_POINTS = 1500
_SURFACE_SPACING = 0.01
_CORRIDOR_RADIUS = 0.11


def rotation_about_z(angle: float) -> FloatArray:
    """Rotation matrix ``(3, 3)`` by ``angle`` radians about the world's z axis."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def bounding_center(points: FloatArray) -> FloatArray:
    """Centre ``(3,)`` of the axis-aligned box around ``points (N, 3)``."""
    center: FloatArray = (points.max(0) + points.min(0)) / 2
    return center


class Scene:
    """Objects and fixtures of one episode by their LIBERO names. Made anew after every reset."""

    def __init__(self, simulator: LiberoSimulator) -> None:
        self.model, self.data = simulator.model, simulator.data
        environment = simulator.environment
        self.bodies: dict[str, int] = dict(environment.obj_body_id)
        self.movable = frozenset(environment.objects_dict)
        self._region_owner = {
            name: site.parent_name for name, site in environment.object_sites_dict.items()
        }
        self._geoms = {name: self._geoms_under(body) for name, body in self.bodies.items()}

    def position(self, name: str) -> FloatArray:
        """Origin ``(3,)`` of an object's body."""
        return np.array(self.data.xpos[self.bodies[name]])

    @property
    def movable_names(self) -> tuple[str, ...]:
        """Names of what can be moved, in a fixed order."""
        return tuple(sorted(self.movable))

    def movable_positions(self) -> FloatArray:
        """Origins ``(O, 3)`` of the bodies of ``movable_names``, metres."""
        return np.array([self.data.xpos[self.bodies[name]] for name in self.movable_names])

    def poses(self) -> dict[str, dict[str, list[float]]]:
        """Position and xyzw quaternion of every object and fixture, as plain lists."""
        return {
            name: {
                "position": self.data.xpos[body].tolist(),
                "quaternion": self.data.xquat[body][[1, 2, 3, 0]].tolist(),
            }
            for name, body in self.bodies.items()
        }

    def tilt_step(self, name: str) -> int:
        """How far the object's axes lean away from the vertical, in steps of four degrees."""
        vertical_part = np.abs(self.data.xmat[self.bodies[name]].reshape(3, 3)[2]).max()
        return round(float(np.degrees(np.arccos(np.clip(vertical_part, -1, 1)))) / 4)

    def region_owner(self, region: str) -> str | None:
        """The object or fixture that a goal region belongs to."""
        return self._region_owner.get(region)

    def region_position(self, region: str) -> FloatArray:
        """Centre ``(3,)`` of a goal region."""
        site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, region)
        return np.array(self.data.site_xpos[site])

    def visible_points(self, name: str) -> FloatArray:
        """Points ``(N, 3)`` on what is seen of the object, or on its hull if it has no mesh."""
        mesh = [
            self._mesh_points(geom)
            for geom in self._geoms[name]
            if self._is_mesh(geom) and self.model.geom_group[geom] == _VISUAL_GROUP
        ]
        if mesh:
            return np.concatenate(mesh)
        plane = mujoco.mjtGeom.mjGEOM_PLANE
        return np.concatenate(
            [
                self._surface_points(geom)
                for geom in self._geoms[name]
                if self.model.geom_group[geom] == _COLLISION_GROUP
                and self.model.geom_type[geom] != plane
            ]
        )

    def obstacle_points(self, exclude: tuple[str, ...] = ()) -> FloatArray:
        """Points ``(N, 3)`` on everything that can be collided with, except some objects."""
        return np.concatenate(
            [
                self._surface_points(geom)
                for name, geoms in self._geoms.items()
                if name not in exclude
                for geom in geoms
                if self.model.geom_contype[geom] or self.model.geom_conaffinity[geom]
            ]
        )

    def highest_between(
        self, start: FloatArray, end: FloatArray, exclude: tuple[str, ...] = ()
    ) -> float:
        """Height of the highest obstacle near the straight way from ``start`` to ``end``."""
        points = self.obstacle_points(exclude)
        way = end[:2] - start[:2]
        length = np.linalg.norm(way) + 1e-9
        direction = way / length
        along = np.clip((points[:, :2] - start[:2]) @ direction, 0, length)
        nearest = start[:2] + along[:, None] * direction
        near = points[np.linalg.norm(points[:, :2] - nearest, axis=1) < _CORRIDOR_RADIUS]
        return float(near[:, 2].max() if len(near) else min(start[2], end[2]))

    def _geoms_under(self, root: int) -> list[int]:
        parents = self.model.geom_bodyid
        return [geom for geom in range(self.model.ngeom) if self._is_under(parents[geom], root)]

    def _is_under(self, body: int, root: int) -> bool:
        while body not in (0, root):
            body = self.model.body_parentid[body]
        return bool(body == root)

    def _is_mesh(self, geom: int) -> bool:
        return bool(self.model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH)

    def _surface_points(self, geom: int) -> FloatArray:
        return self._mesh_points(geom) if self._is_mesh(geom) else self._box_points(geom)

    def _to_world(self, geom: int, points: Any) -> FloatArray:
        rotation = self.data.geom_xmat[geom].reshape(3, 3)
        world: FloatArray = points @ rotation.T + self.data.geom_xpos[geom]
        return world

    def _mesh_points(self, geom: int) -> FloatArray:
        mesh = self.model.geom_dataid[geom]
        first, count = self.model.mesh_vertadr[mesh], self.model.mesh_vertnum[mesh]
        vertices = self.model.mesh_vert[first : first + count]
        if count > _MAXIMUM_MESH_POINTS:
            vertices = vertices[:: count // _MAXIMUM_MESH_POINTS]
        return self._to_world(geom, vertices)

    def _box_points(self, geom: int) -> FloatArray:
        """A grid on the geom's bounding box, dense enough that no finger fits between points."""
        half = np.array(self.model.geom_size[geom])
        kind = self.model.geom_type[geom]
        if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
            half = np.repeat(half[0], 3)
        elif kind in (mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_CAPSULE):
            half = half[[0, 0, 1]]
        counts = np.clip(np.ceil(2 * half / _SURFACE_SPACING) + 1, 2, 40).astype(int)
        axes = [np.linspace(-1, 1, count) for count in counts]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        return self._to_world(geom, grid[np.abs(grid).max(1) > 0.99] * half)

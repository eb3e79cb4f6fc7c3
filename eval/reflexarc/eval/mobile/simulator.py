"""The world in MuJoCo: a base with mecanum wheels, driven by two velocities, seen from its front.

The base keeps its heading and moves along x (ahead) and y (to its left), as the two velocities of
the recorded robot's episodes do. It stops for good at the first target that it reaches, so that
nobody succeeds by visiting all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import SimulatorError
from reflexarc.eval.libero.package import choose_renderer
from reflexarc.eval.mobile.model import BIRDS_EYE, FRONT, world_xml
from reflexarc.eval.mobile.scene import REACH, Point, Scene
from reflexarc.eval.mobile.tasks import CONTROL_HZ, SPEED_LIMIT, MobileTask

choose_renderer()  # MuJoCo decides how it renders when it is first imported

import mujoco  # noqa: E402

ImageArray = npt.NDArray[np.uint8]
_SUBSTEPS = 20
ACTION_DIMENSION = 2


@dataclass(frozen=True)
class RawObservation:
    """What the base sees: ``{"front": uint8 (S, S, 3)}`` RGB, upright."""

    images: Mapping[str, ImageArray]


@dataclass(frozen=True)
class RenderSnapshot:
    """Where the base stood: all that moves in a scene."""

    position: Point


class MobileSimulator:
    """One scene after the other; a context manager. Not to be shared between threads.

    Args:
        task: whose target counts as success.
        image_size: height and width of rendered images in pixels.
    """

    def __init__(self, task: MobileTask, *, image_size: int = 224) -> None:
        if not 16 <= image_size <= 1024:
            raise SimulatorError(f"image size {image_size} is outside 16..1024", field="image_size")
        self.task, self.image_size = task, image_size
        self._model = mujoco.MjModel.from_xml_string(world_xml(image_size))
        self._model.opt.timestep = 1 / CONTROL_HZ / _SUBSTEPS
        self._data = mujoco.MjData(self._model)
        self._renderer: Any = None
        self._scene: Scene | None = None
        self.reached: int | None = None

    def __enter__(self) -> MobileSimulator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def reset(self, scene: Scene) -> None:
        """Put everything where ``scene`` says."""
        self._scene, self.reached = scene, None
        mujoco.mj_resetData(self._model, self._data)
        for index, place in enumerate(scene.targets):
            self._place(f"target_{index}", place)
        for index, place in enumerate(scene.obstacles):
            self._place(f"obstacle_{index}", place)
        self._data.qpos[:2] = scene.start
        mujoco.mj_forward(self._model, self._data)

    def step(self, action: npt.NDArray[np.floating]) -> bool:
        """Drive at ``action (2,)`` m/s for a control step; whether the task's target is reached.

        Velocities beyond the limit are cut to it. A base that has reached a target stays.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIMENSION,) or not np.isfinite(action).all():
            raise SimulatorError(
                f"an action must be {ACTION_DIMENSION} finite numbers, got {action}", field="action"
            )
        if self.reached is None:
            self._data.ctrl[:] = np.clip(action, -SPEED_LIMIT, SPEED_LIMIT)
            mujoco.mj_step(self._model, self._data, nstep=_SUBSTEPS)
            distances = np.linalg.norm(self.scene.targets - self.position, axis=1)
            if distances.min() <= REACH:
                self.reached = int(distances.argmin())
        return self.success

    @property
    def scene(self) -> Scene:
        if self._scene is None:
            raise SimulatorError("the mobile world has no scene yet; reset it first")
        return self._scene

    @property
    def position(self) -> Point:
        """``(2,)`` metres, of the base."""
        return np.array(self._data.qpos[:2])

    @property
    def success(self) -> bool:
        """Whether the base stands at the task's own target."""
        return self.reached == self.task.index

    @property
    def over(self) -> bool:
        """Whether nothing can happen any more: the base stands at some target."""
        return self.reached is not None

    def observe(self) -> RawObservation:
        """Render the front camera now."""
        return RawObservation({FRONT: self._render(FRONT)})

    def observe_state(self) -> npt.NDArray[np.float64]:
        """``(0,)``: this robot senses with its camera alone."""
        return np.zeros(0)

    def snapshot(self) -> RenderSnapshot:
        return RenderSnapshot(self.position)

    def render_snapshot(self, snapshot: RenderSnapshot) -> dict[str, ImageArray]:
        """The front camera and the scene from above, as they were then."""
        self._data.qpos[:2] = snapshot.position
        mujoco.mj_forward(self._model, self._data)
        return {name: self._render(name) for name in (FRONT, BIRDS_EYE)}

    def close(self) -> None:
        """Free the rendering context. May be called twice."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _place(self, body: str, place: Point) -> None:
        self._model.body(body).pos[:2] = place

    def _render(self, camera: str) -> ImageArray:
        if self._renderer is None:
            try:
                self._renderer = mujoco.Renderer(self._model, self.image_size, self.image_size)
            except Exception as error:  # mujoco raises what its backend raises
                raise SimulatorError(
                    f"MuJoCo cannot render here ({error}); set MUJOCO_GL=egl or osmesa"
                ) from error
            flags = self._renderer.scene.flags
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                flags[flag] = 0
        self._renderer.update_scene(self._data, camera)
        return np.array(self._renderer.render(), dtype=np.uint8)

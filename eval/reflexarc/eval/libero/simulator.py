"""One LIBERO task in MuJoCo, rendered only when somebody looks.

Rendering both cameras costs about ten times a simulation step. The environment is made without
camera observations, and :meth:`LiberoSimulator.observe` renders the current state. Simulator
states do not depend on whether, or how often, it was called.

``observe`` shows the state after the last physics substep. That equals robosuite's own camera
observation after a seeded reset; after ``set_init_state`` robosuite's sampling clock runs one
substep (2 ms) behind, and its observations are older by that much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import SimulatorError
from reflexarc.eval.libero.package import import_libero, quiet
from reflexarc.eval.libero.suites import LiberoTask

FloatArray = npt.NDArray[np.float64]
ImageArray = npt.NDArray[np.uint8]

CAMERAS = {"agentview": "agentview", "eye_in_hand": "robot0_eye_in_hand"}
ACTION_DIMENSION = 7
WAIT_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
WAIT_STEPS = 10

# Everything in mjData and mjModel that a frame is drawn from and that changes in an episode.
_DRAWN_DATA = (
    "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat",
    "light_xpos", "light_xdir", "xpos", "xmat", "xipos", "ximat",
)  # fmt: skip
_DRAWN_MODEL = ("geom_rgba", "site_rgba", "mat_rgba")


@dataclass(frozen=True)
class RawState:
    """Proprioception in metres and radians, in the frames of LIBERO's own files.

    ``eef_position (3,)`` of the grip site and ``eef_quaternion (4,)`` xyzw of the hand, world
    frame; ``eef_axis_angle (3,)`` of that quaternion; ``finger_positions (2,)``;
    ``joint_positions (7,)``. All float64.
    """

    eef_position: FloatArray
    eef_quaternion: FloatArray
    eef_axis_angle: FloatArray
    finger_positions: FloatArray
    joint_positions: FloatArray

    def vector(self, layout: str) -> FloatArray:
        """The state ``(S,)`` in one of the contract's layouts; SimulatorError for another."""
        pose = (self.eef_position, self.eef_axis_angle, self.finger_positions)
        layouts: dict[str, tuple[FloatArray, ...]] = {
            "eef3+axisangle3+fingers2": pose,
            "joint7+fingers2": (self.joint_positions, self.finger_positions),
            "eef3+axisangle3+fingers2+joint7": (*pose, self.joint_positions),
        }
        if layout not in layouts:
            raise SimulatorError(
                f"LIBERO has no state layout {layout!r}; it offers {', '.join(layouts)}",
                field="state",
            )
        return np.concatenate(layouts[layout])


@dataclass(frozen=True)
class RawObservation:
    """What the cameras and joints say now.

    ``images``: ``agentview`` and ``eye_in_hand``, uint8 ``(S, S, 3)`` RGB, upside-down as
    OpenGL and LIBERO's files have them.
    """

    images: Mapping[str, ImageArray]
    state: RawState


@dataclass(frozen=True)
class RenderSnapshot:
    """What a frame is drawn from, copied, so that it can be drawn later in the same episode."""

    data: Mapping[str, npt.NDArray[Any]]
    model: Mapping[str, npt.NDArray[Any]]


class LiberoSimulator:
    """A task's simulator. Not to be shared between threads; a context manager.

    Args:
        task: one of :func:`reflexarc.eval.libero.suites.load_tasks`.
        image_size: height and width of rendered images in pixels.
        render: False makes resets four times faster, and :meth:`observe` an error.
    """

    def __init__(self, task: LiberoTask, *, image_size: int = 256, render: bool = True) -> None:
        if not 1 <= image_size <= 4096:
            raise SimulatorError(f"image size {image_size} is outside 1..4096", field="image_size")
        import_libero()
        self.task = task
        self.image_size = image_size
        self.render = render
        self._environment = _make_environment(task, image_size, render)

    def __enter__(self) -> LiberoSimulator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def reset_to_state(
        self, init_state: FloatArray, seed: int = 0, wait_steps: int = WAIT_STEPS
    ) -> None:
        """Start from a benchmark state ``(S,)``, then let the objects settle.

        ``seed`` decides the poses of fixtures (cabinet, stove, rack), which are not in the state.
        """
        self._reset(seed)
        expected = self.state().shape
        if np.shape(init_state) != expected:
            raise SimulatorError(
                f"{self.task.name}: a state of shape {np.shape(init_state)} was given, this scene "
                f"has {expected}"
            )
        self._environment.set_init_state(np.asarray(init_state, dtype=np.float64))
        self._wait(wait_steps)

    def reset_seeded(self, seed: int, wait_steps: int = WAIT_STEPS) -> None:
        """Start from object poses drawn with ``seed``: the same in every process and order."""
        self._reset(seed)
        self._wait(wait_steps)

    def step(self, action: npt.NDArray[np.floating]) -> bool:
        """Execute one action ``(7,)`` for 50 ms; whether the task's goal holds afterwards."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIMENSION,) or not np.isfinite(action).all():
            raise SimulatorError(
                f"an action must be {ACTION_DIMENSION} finite numbers, got {action}", field="action"
            )
        _, _, success, _ = self._environment.step(action)
        return bool(success)

    @property
    def success(self) -> bool:
        """Whether the task's goal holds now."""
        return bool(self._environment.check_success())

    @property
    def over(self) -> bool:
        """Never: a goal may come to hold until time is up."""
        return False

    def observe(self) -> RawObservation:
        """Render both cameras now and read the joints."""
        return RawObservation(images=self._render(), state=self.observe_state())

    def observe_state(self) -> RawState:
        """Read the joints now, without rendering."""
        from robosuite.utils.transform_utils import convert_quat, quat2axisangle

        data, robot = self._environment.sim.data, self._environment.robots[0]
        hand = data.get_body_xquat(robot.robot_model.eef_name)
        quaternion = convert_quat(np.array(hand), to="xyzw")
        return RawState(
            eef_position=np.array(data.site_xpos[robot.eef_site_id]),
            eef_quaternion=quaternion,
            eef_axis_angle=quat2axisangle(quaternion.copy()),
            finger_positions=np.array(data.qpos[robot._ref_gripper_joint_pos_indexes]),
            joint_positions=np.array(data.qpos[robot._ref_joint_pos_indexes]),
        )

    def state(self) -> FloatArray:
        """The simulator's state, flat: time, positions, velocities."""
        state: FloatArray = self._environment.get_sim_state()
        return state

    def snapshot(self) -> RenderSnapshot:
        """Keep what a frame of this moment is drawn from, at a thousandth of rendering's cost."""
        data, model = self.data, self.model
        return RenderSnapshot(
            data={name: np.array(getattr(data, name)) for name in _DRAWN_DATA},
            model={name: np.array(getattr(model, name)) for name in _DRAWN_MODEL},
        )

    def render_snapshot(self, snapshot: RenderSnapshot) -> dict[str, ImageArray]:
        """The images that :meth:`observe` would have given at the snapshot's moment.

        Leaves the simulator unfit for stepping: only a reset may follow.
        """
        for target, arrays in ((self.data, snapshot.data), (self.model, snapshot.model)):
            for name, array in arrays.items():
                getattr(target, name)[:] = array
        return self._render()

    @property
    def environment(self) -> Any:
        """robosuite's environment: the privileged view that the scripted expert plans with."""
        return self._environment.env

    @property
    def model(self) -> Any:
        """The scene's ``mujoco.MjModel``; a new one after every reset."""
        return self._environment.sim.model._model

    @property
    def data(self) -> Any:
        """The scene's ``mujoco.MjData``; a new one after every reset."""
        return self._environment.sim.data._data

    def close(self) -> None:
        """Free the simulator and its rendering context. May be called twice."""
        if self._environment is not None:
            with quiet():
                self._environment.close()
            self._environment = None

    def _reset(self, seed: int) -> None:
        environment = self._environment
        # robosuite keeps appending drawer and knob samplers at every reset; each draws from the
        # random stream, so that object poses would depend on how often the scene was reset.
        environment.env.object_property_initializers.clear()
        environment.seed(seed)
        with quiet():
            environment.reset()

    def _wait(self, steps: int) -> None:
        for _ in range(steps):
            self._environment.step(WAIT_ACTION)

    def _render(self) -> dict[str, ImageArray]:
        if not self.render:
            raise SimulatorError("this simulator was made with render=False; it has no images")
        size = self.image_size
        return {
            name: self._environment.sim.render(camera_name=camera, width=size, height=size)
            for name, camera in CAMERAS.items()
        }


def _make_environment(task: LiberoTask, image_size: int, render: bool) -> Any:
    if not task.bddl_path.is_file():
        raise SimulatorError(f"{task.bddl_path}: the scene description is missing")
    with quiet():
        try:
            from libero.libero.envs.env_wrapper import ControlEnv
        except ImportError as error:  # OpenCV without GLib, for one
            raise SimulatorError(f"LIBERO's environments cannot be imported: {error}") from error

        np.random.seed(0)  # the constructor already draws object poses
        return ControlEnv(
            bddl_file_name=str(task.bddl_path),
            has_offscreen_renderer=render,
            use_camera_obs=False,
            camera_heights=image_size,
            camera_widths=image_size,
            ignore_done=True,  # an episode's length is the caller's business
        )

"""What a policy expects and returns: the one thing that trainer, server and client share.

A :class:`PolicyContract` is written into every checkpoint, sent in the server's handshake, and
checked by everyone who touches an observation or an action. Nothing is guessed, padded or
converted in silence: what has to be done to a camera's image is listed in the contract.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PROTOCOL_VERSION = 1

ActionKind = Literal["delta_osc", "velocity", "position"]
NormalizationMode = Literal["mean_std", "min_max", "q01_q99", "identity"]
Orientation = Literal["opengl", "rotated_180", "upright"]


class FrozenModel(BaseModel):
    """Strict, immutable pydantic base: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Camera(FrozenModel):
    """One camera's image as the policy wants it: ``uint8 (height, width, 3)`` RGB.

    ``source_height`` and ``source_width`` are the size at which training images were rendered
    or recorded. A client that can choose renders at that size, turns the image to
    ``orientation`` and resizes it bilinearly (:func:`reflexarc.contract.images.prepare_image`).
    ``opengl`` is the image as LIBERO renders it (upside-down); ``rotated_180`` is that image
    turned by half a turn, as most LIBERO clients send it. ``upright`` is the image of a camera
    that stands as it should, taken as it comes.
    """

    name: str
    height: Annotated[int, Field(gt=0, le=4096)]
    width: Annotated[int, Field(gt=0, le=4096)]
    orientation: Orientation
    source_height: Annotated[int, Field(gt=0, le=4096)]
    source_width: Annotated[int, Field(gt=0, le=4096)]

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the conversions from a rendered image, in order."""
        rotate = ("rotate_180",) if self.orientation == "rotated_180" else ()
        same_size = (self.height, self.width) == (self.source_height, self.source_width)
        return rotate + (() if same_size else (f"resize_bilinear_{self.height}x{self.width}",))


class StateSpec(FrozenModel):
    """Proprioceptive state: ``(dimension,)`` floats in SI units and radians.

    ``layout`` names the parts in order, each with its length: ``eef3+axisangle3+fingers2``
    (world-frame end-effector position in metres, axis-angle in radians, two finger joints in
    metres), ``joint7+fingers2``, or ``eef3+axisangle3+fingers2+joint7``.
    """

    layout: str
    names: tuple[str, ...]

    @property
    def dimension(self) -> int:
        return len(self.names)


class History(FrozenModel):
    """How many frames and states one decision sees, and the environment steps between them.

    A decision at environment step t sees the rows at t, t - stride, t - 2·stride, ...: as many
    frames and as many states as stated here. Rows before step 0 do not exist: the oldest row that
    does is repeated in their place and marked as padding.
    """

    frames: Annotated[int, Field(ge=1, le=256)] = 1
    states: Annotated[int, Field(ge=1, le=256)] = 1
    stride: Annotated[int, Field(ge=1, le=256)] = 1

    @property
    def rows(self) -> int:
        """Rows of a decision's window: the longer of frames and states."""
        return max(self.frames, self.states)

    @property
    def span(self) -> int:
        """Environment steps from a window's oldest row to its newest."""
        return (self.rows - 1) * self.stride

    def frame_steps(self, step: int) -> list[int]:
        """Steps of the frames that a decision at ``step`` sees, oldest first, without padding."""
        return _window_steps(step, self.frames, self.stride)

    def state_steps(self, step: int) -> list[int]:
        """Steps of the states that a decision at ``step`` sees, oldest first, without padding."""
        return _window_steps(step, self.states, self.stride)


def _window_steps(step: int, length: int, stride: int) -> list[int]:
    return [past for past in range(step - (length - 1) * stride, step + 1, stride) if past >= 0]


class Gripper(FrozenModel):
    """Which action dimension is the gripper, and the commands that open and close it."""

    index: Annotated[int, Field(ge=0)]
    open: float
    closed: float


class ActionSpec(FrozenModel):
    """An action chunk: ``float32 (horizon, dimension)``, first row to be executed first.

    ``low`` and ``high`` bound each dimension of an executable action in its own units. Actions of
    the kinds ``delta_osc`` and ``velocity`` stand still at zero; ``position`` holds targets (of
    joints or poses), which stand still where they are.
    """

    names: tuple[str, ...]
    horizon: Annotated[int, Field(ge=1, le=1024)]
    kind: ActionKind
    control_hz: Annotated[float, Field(gt=0)]
    low: tuple[float, ...]
    high: tuple[float, ...]
    gripper: Gripper | None = None

    @property
    def dimension(self) -> int:
        return len(self.names)

    @model_validator(mode="after")
    def _lengths_agree(self) -> ActionSpec:
        if not len(self.low) == len(self.high) == len(self.names):
            raise ValueError(
                f"action has {len(self.names)} names, {len(self.low)} low and "
                f"{len(self.high)} high limits: give one of each a dimension"
            )
        if self.gripper is not None and self.gripper.index >= len(self.names):
            raise ValueError(
                f"gripper index {self.gripper.index} is outside {len(self.names)} dimensions"
            )
        return self


class PolicyContract(FrozenModel):
    """Everything that a client must supply and may expect. JSON through pydantic.

    ``statistics_sha256`` and ``checkpoint_fingerprint`` are empty until a checkpoint is written
    or loaded; they tie a result to the exact weights and normalisation.
    """

    protocol_version: int = PROTOCOL_VERSION
    family: str
    cameras: tuple[Camera, ...]
    state: StateSpec
    history: History = History()
    action: ActionSpec
    needs_language: bool = True
    needs_goal_image: bool = False
    state_normalization: NormalizationMode = "mean_std"
    action_normalization: NormalizationMode = "mean_std"
    statistics_sha256: str = ""
    checkpoint_fingerprint: str = ""

    @model_validator(mode="after")
    def _camera_names_differ(self) -> PolicyContract:
        names = [camera.name for camera in self.cameras]
        if len(set(names)) != len(names):
            raise ValueError(f"camera names must differ, got {names}")
        return self

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    @property
    def needs_session(self) -> bool:
        """Whether a request leaves out what an earlier one of its episode brought."""
        return self.history.rows > 1 or self.needs_goal_image


LIBERO_STATE_EEF = StateSpec(
    layout="eef3+axisangle3+fingers2",
    names=(
        "eef_x", "eef_y", "eef_z",
        "eef_axisangle_x", "eef_axisangle_y", "eef_axisangle_z",
        "finger_left", "finger_right",
    ),
)  # fmt: skip
LIBERO_STATE_JOINT = StateSpec(
    layout="joint7+fingers2",
    names=(*(f"joint_{i}" for i in range(1, 8)), "finger_left", "finger_right"),
)
LIBERO_STATE_EEF_JOINT = StateSpec(
    layout="eef3+axisangle3+fingers2+joint7",
    names=(*LIBERO_STATE_EEF.names, *LIBERO_STATE_JOINT.names[:7]),
)
LIBERO_STATES = {
    spec.layout: spec for spec in (LIBERO_STATE_EEF, LIBERO_STATE_JOINT, LIBERO_STATE_EEF_JOINT)
}


def libero_action(horizon: int) -> ActionSpec:
    """LIBERO's action: OSC deltas in [-1, 1] (±0.05 m, ±0.5 rad a step), gripper -1 opens."""
    return ActionSpec(
        names=("delta_x", "delta_y", "delta_z", "delta_rx", "delta_ry", "delta_rz", "gripper"),
        horizon=horizon,
        kind="delta_osc",
        control_hz=20.0,
        low=(-1.0,) * 7,
        high=(1.0,) * 7,
        gripper=Gripper(index=6, open=-1.0, closed=1.0),
    )


def libero_cameras(size: int = 224, source_size: int = 256) -> tuple[Camera, ...]:
    """LIBERO's two cameras, turned by 180° as the field's clients send them."""
    return tuple(
        Camera(
            name=name,
            height=size,
            width=size,
            orientation="rotated_180",
            source_height=source_size,
            source_width=source_size,
        )
        for name in ("agentview", "eye_in_hand")
    )

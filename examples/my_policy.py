"""A policy of your own behind the server: the arm moves to a point and stays there.

    serve-policy --policy examples.my_policy:ReachPoint
    serve-policy --policy examples.my_policy:ReachPoint --policy-config target.json
    reflexarc eval libero --suite libero_object --tasks 0 --states 40 --baselines none --videos all

No torch, no weights, no base class: `contract`, `infer`, and if you like `reset` and `warm_up`.
Put your model in the place of `infer`. This one scores 0 %: it reaches and grasps nothing. The
point is above the floor of libero_object's scenes; target.json may say {"target": [0, 0, 0.4]}.
"""

import numpy as np

from reflexarc.contract import Camera, Observation, PolicyContract
from reflexarc.contract.policy_contract import ActionSpec, Gripper, StateSpec

METRES_PER_UNIT = 0.05  # LIBERO's controller: an action of 1 asks for 5 cm in one step


class ReachPoint:
    # What every observation must hold, and what comes back. The server checks both sides: an
    # observation that differs never reaches infer, and an action outside never leaves.
    contract = PolicyContract(
        family="reach_point",
        # Your cameras: clients turn and resize their images to this before they send them.
        cameras=(
            Camera(
                name="agentview", height=128, width=128, orientation="rotated_180",
                source_height=256, source_width=256,
            ),
        ),
        state=StateSpec(
            layout="eef3+axisangle3+fingers2",  # metres, radians, metres; world frame
            names=(
                "eef_x", "eef_y", "eef_z",
                "eef_axisangle_x", "eef_axisangle_y", "eef_axisangle_z",
                "finger_left", "finger_right",
            ),
        ),
        action=ActionSpec(
            names=("delta_x", "delta_y", "delta_z", "delta_rx", "delta_ry", "delta_rz", "gripper"),
            horizon=8, kind="delta_osc", control_hz=20,
            low=(-1,) * 7, high=(1,) * 7,
            gripper=Gripper(index=6, open=-1, closed=1),
        ),
        needs_language=False,
    )  # fmt: skip

    def __init__(self, target: tuple[float, float, float] = (0.05, 0.2, 0.35), gain: float = 0.3):
        """Arguments come from --policy-config. Load weights here: the server says when ready."""
        self.target, self.gain = np.asarray(target, dtype=float), gain
        self.chunks: dict[str | None, int] = {}

    def reset(self, session_id: str | None) -> None:
        """A new episode begins. Keep what belongs to one episode under its session's name."""
        self.chunks[session_id] = 0

    def infer(self, observation: Observation) -> np.ndarray:
        """A chunk float32 (horizon, dimension); images are observation.images["agentview"]."""
        self.chunks[observation.session_id] += 1
        position = np.array(observation.state[:3], dtype=float)
        actions = np.zeros((self.contract.action.horizon, self.contract.action.dimension))
        actions[:, 6] = -1  # gripper open
        for row in actions:  # look ahead: where the arm will be when this row is executed
            row[:3] = np.clip(self.gain * (self.target - position) / METRES_PER_UNIT, -1, 1)
            position += METRES_PER_UNIT * row[:3]
        return actions.astype(np.float32)

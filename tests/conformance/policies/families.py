"""The shapes: contract, policy, a batch to train on and an episode to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from policies.common import TinyConfig
from policies.flow import FlowPolicy
from policies.mobile import MobilePolicy
from policies.video import VideoPolicy
from policies.vision_language import VisionLanguagePolicy
from policies.vjepa2_head import HEAD_CONFIG, head_loss

from reflexarc.contract import (
    Camera,
    FeatureStatistics,
    NormalizationStatistics,
    Observation,
    PolicyContract,
)
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_EEF,
    ActionSpec,
    History,
    StateSpec,
    libero_action,
    libero_cameras,
)
from reflexarc.policy.interface import Task
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.processing import Processor
from reflexarc.policy.vjepa2_head.model import VJEPA2Head
from reflexarc.policy.windows import join_rows, pad_window, with_clips
from reflexarc.training.objective import Batch

INSTRUCTIONS = ("pick up the milk", "put the red bowl on the plate", "drive")
VELOCITY = ActionSpec(
    names=("linear_x", "linear_y"), horizon=10, kind="velocity", control_hz=10.0,
    low=(-0.5, -0.5), high=(0.5, 0.5),
)  # fmt: skip
ARM_WITHOUT_GRIPPER = ActionSpec(
    names=("x", "y", "z", "rx", "ry", "rz"), horizon=8, kind="delta_osc", control_hz=20.0,
    low=(-1.0,) * 6, high=(1.0,) * 6,
)  # fmt: skip
FRONT = Camera(
    name="front", height=32, width=32, orientation="opengl", source_height=32, source_width=32
)


@dataclass(frozen=True)
class Shape:
    """One row of the table below: who, under which contract, asked how often."""

    policy: type[Any]
    contract: PolicyContract
    replan_steps: int

    def build(self) -> Any:
        """Trained weights random, the same at every call."""
        torch.manual_seed(7)
        if self.policy is VJEPA2Head:
            return VJEPA2Head(HEAD_CONFIG, self.contract, None)
        if self.policy is not FlowPolicy:
            return self.policy(TinyConfig(), self.contract)
        vectors = torch.randn(len(INSTRUCTIONS), 16)
        language = LanguageEmbeddings(INSTRUCTIONS, vectors, "random")
        return FlowPolicy(TinyConfig(), self.contract, language)

    def loss(self, policy: Any) -> torch.Tensor:
        """Of one batch, the same at every call."""
        batch = training_batch(self, policy)
        return head_loss(policy, batch) if self.policy is VJEPA2Head else policy.loss(batch, seed=1)

    def statistics(self) -> NormalizationStatistics:
        rng = np.random.default_rng(0)
        state, action = self.contract.state, self.contract.action
        return NormalizationStatistics(
            state=FeatureStatistics.from_rows(rng.normal(size=(50, state.dimension)), state.names),
            action=FeatureStatistics.from_rows(
                rng.uniform(action.low, action.high, (50, action.dimension)), action.names
            ),
            dataset_fingerprint="random numbers",
        )


def _contract(policy: type[Any], **fields: Any) -> PolicyContract:
    values = {"state": LIBERO_STATE_EEF, "action": libero_action(8), **fields}
    return PolicyContract(family=policy.family, **values)


SHAPES = {
    "video": Shape(
        VideoPolicy,
        _contract(
            VideoPolicy,
            cameras=(FRONT,),
            history=History(frames=16, states=5, stride=1),
            needs_language=False,
            needs_goal_image=True,
        ),
        replan_steps=4,
    ),
    "vjepa2_head": Shape(
        VJEPA2Head,
        _contract(
            VJEPA2Head,
            cameras=libero_cameras(32, 32),
            history=History(frames=4, states=3, stride=2),
            needs_language=False,
            needs_goal_image=True,
        ),
        replan_steps=4,
    ),
    "mobile": Shape(
        MobilePolicy,
        _contract(
            MobilePolicy,
            cameras=(FRONT,),
            state=StateSpec(layout="none", names=()),
            history=History(frames=8),
            action=VELOCITY,
        ),
        replan_steps=3,
    ),
    "vision_language": Shape(
        VisionLanguagePolicy,
        _contract(
            VisionLanguagePolicy,
            cameras=libero_cameras(56, 56),
            history=History(frames=2, stride=5),
        ),
        replan_steps=4,
    ),
    "flow_and_gripper": Shape(
        FlowPolicy,
        _contract(
            FlowPolicy,
            cameras=libero_cameras(32, 32),
            history=History(frames=2, states=4, stride=2),
        ),
        replan_steps=5,
    ),
    "flow_without_gripper": Shape(
        FlowPolicy,
        _contract(
            FlowPolicy,
            cameras=libero_cameras(32, 32),
            history=History(frames=3, stride=2),
            action=ARM_WITHOUT_GRIPPER,
        ),
        replan_steps=3,
    ),
}


@dataclass(frozen=True)
class Episode:
    """What would be seen at every step: the same for the same number."""

    contract: PolicyContract
    number: int

    def observe(self, step: int, **fields: Any) -> Observation:
        rng = np.random.default_rng([self.number, step])
        contract = self.contract
        values: dict[str, Any] = {
            "instruction": INSTRUCTIONS[self.number % 2] if contract.needs_language else None,
            "seed": 100 * self.number + step,
            "step_index": step,
            "goal_image": self.goal() if contract.needs_goal_image and step == 0 else None,
        }
        return Observation(
            images=self.images(rng),
            state=rng.normal(size=contract.state.dimension),
            **{**values, **fields},
        )

    def goal(self) -> dict[str, np.ndarray]:
        return self.images(np.random.default_rng(self.number))

    def images(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            camera.name: rng.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
            for camera in self.contract.cameras
        }


def training_batch(shape: Shape, policy: Any, rows: int = 3) -> Batch:
    """Decisions at random steps of random episodes, through the code that serving goes through."""
    contract, processor = shape.contract, Processor(shape.contract, shape.statistics())
    tasks, frames, states, steps = [], [], [], []
    for number in range(rows):
        episode, step = Episode(contract, number), 4 * number
        seen = {past: episode.observe(past) for past in range(step + 1)}
        goal = {name: torch.from_numpy(image) for name, image in (seen[0].goal_image or {}).items()}
        with torch.no_grad():
            task = policy.embed_task([Task(seen[0].instruction, goal or None)])
            rows_of = {
                past: policy.embed_frames(
                    processor.frames({n: i[None] for n, i in seen[past].images.items()}), task
                )
                for past in contract.history.frame_steps(step)
            }
        tasks.append(task)
        steps.append(step)
        frames.append({p: {n: r[0] for n, r in row.items()} for p, row in rows_of.items()})
        states.append({p: processor.normalize_state(o.state) for p, o in seen.items()})
    window, valid = pad_window(contract.history, steps, frames, states)
    window = with_clips(policy, window, valid)
    action = contract.action
    actions = torch.rand(rows, action.horizon, action.dimension) * 2 - 1
    if action.gripper is not None:
        actions[..., action.gripper.index] = actions[..., action.gripper.index].sign()
    mask = torch.ones(rows, action.horizon, dtype=torch.bool)
    mask[-1, -2:] = False
    return Batch(
        window=window, task=join_rows(tasks), valid=valid, actions=actions, action_mask=mask
    )

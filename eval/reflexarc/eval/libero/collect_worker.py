"""Roll out the expert in a worker process and keep the demonstration as a part file."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reflexarc.data.libero_writer import Demonstration, TaskFileWriter
from reflexarc.eval.libero.expert import run_expert
from reflexarc.eval.libero.geometry import Scene
from reflexarc.eval.libero.simulator import LiberoSimulator, RawState, RenderSnapshot
from reflexarc.eval.libero.suites import LiberoTask

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Attempt:
    """One episode to try; everything that decides how it goes."""

    task: LiberoTask
    number: int
    seed: int
    image_size: int
    render_every: int
    action_noise: float
    folder: Path


@dataclass(frozen=True)
class AttemptOutcome:
    """What the parent learns; the demonstration itself is on disk."""

    task_name: str
    number: int
    success: bool
    reason: str


def attempt_seed(base_seed: int, task_name: str, number: int) -> int:
    """Seed of attempt ``number`` at a task: the same in every run and order, below 2**32."""
    sequence = np.random.SeedSequence([base_seed, zlib.crc32(task_name.encode()), number])
    return int(sequence.generate_state(1)[0])


_simulator: LiberoSimulator | None = None


def run_attempt(attempt: Attempt) -> AttemptOutcome:
    """Try one episode; a success is on disk when this returns. Runs in a worker process."""
    simulator = _simulator_for(attempt.task, attempt.image_size)
    writer = TaskFileWriter(attempt.folder, attempt.task.name)
    demonstration, reason = record(simulator, attempt)
    if demonstration is None:
        writer.add_failure(attempt.number, reason)
    else:
        writer.add(demonstration)
    return AttemptOutcome(attempt.task.name, attempt.number, demonstration is not None, reason)


def record(simulator: LiberoSimulator, attempt: Attempt) -> tuple[Demonstration | None, str]:
    """The demonstration of an attempt, or None and why it failed.

    Nothing is rendered on the way: frames are drawn afterwards, of successes only, from
    snapshots that give the same pixels.
    """
    simulator.reset_seeded(attempt.seed)
    scene = Scene(simulator)
    recorder = _Recorder(simulator, scene, attempt.render_every)
    poses = scene.poses()
    model_file = portable_model(simulator.environment.sim.model.get_xml())
    result = run_expert(
        simulator,
        seed=attempt.seed,
        noise=attempt.action_noise,
        before_step=recorder.before_step,
    )
    if not result.success:
        return None, result.reason
    frames = [simulator.render_snapshot(snapshot) for snapshot in recorder.snapshots]
    states = recorder.raw_states
    return (
        Demonstration(
            attempt=attempt.number,
            seed=attempt.seed,
            actions=np.stack(recorder.actions),
            expert_actions=np.stack(recorder.expert_actions),
            states=np.stack(recorder.states),
            eef_positions=np.stack([state.eef_position for state in states]),
            eef_quaternions=np.stack([state.eef_quaternion for state in states]),
            eef_axis_angles=np.stack([state.eef_axis_angle for state in states]),
            finger_positions=np.stack([state.finger_positions for state in states]),
            joint_positions=np.stack([state.joint_positions for state in states]),
            image_steps=np.arange(0, len(states), attempt.render_every, dtype=np.int64),
            images={camera: np.stack([frame[camera] for frame in frames]) for camera in frames[0]},
            object_poses=poses,
            object_positions=np.stack(recorder.object_positions),
            object_names=scene.movable_names,
            model_file=model_file,
        ),
        "",
    )


def portable_model(xml: str) -> str:
    """The MuJoCo model with asset paths relative to the package that holds them.

    ``file="/some/where/site-packages/robosuite/models/..."`` becomes
    ``file="robosuite/models/..."``: a demonstration does not tell where it was collected, and
    LIBERO's and robosuite's own loaders look for the package's name in the path anyway.
    """
    return re.sub(r'file="[^"]*/(?=(?:robosuite|libero[^/"]*)/)', 'file="', xml)


class _Recorder:
    """Keeps what a client would see before every action."""

    def __init__(self, simulator: LiberoSimulator, scene: Scene, render_every: int) -> None:
        self._simulator, self._scene, self._render_every = simulator, scene, render_every
        self.actions: list[FloatArray] = []
        self.expert_actions: list[FloatArray] = []
        self.object_positions: list[FloatArray] = []
        self.states: list[FloatArray] = []
        self.raw_states: list[RawState] = []
        self.snapshots: list[RenderSnapshot] = []

    def before_step(self, action: FloatArray, mean: FloatArray) -> None:
        if len(self.actions) % self._render_every == 0:
            self.snapshots.append(self._simulator.snapshot())
        self.actions.append(action.copy())
        self.expert_actions.append(mean.copy())
        self.object_positions.append(self._scene.movable_positions())
        self.states.append(self._simulator.state())
        self.raw_states.append(self._simulator.observe_state())


def _simulator_for(task: LiberoTask, image_size: int) -> LiberoSimulator:
    """This process's simulator, made anew when the task changes: one costs 2 GB."""
    global _simulator  # noqa: PLW0603 - a worker process serves one simulator
    if _simulator is None or _simulator.task != task or _simulator.image_size != image_size:
        if _simulator is None:
            # While the interpreter is whole: what frees a rendering context needs its modules.
            Finalize(None, _close_simulator, exitpriority=10)
        _close_simulator()
        _simulator = LiberoSimulator(task, image_size=image_size)
    return _simulator


def _close_simulator() -> None:
    if _simulator is not None:
        _simulator.close()

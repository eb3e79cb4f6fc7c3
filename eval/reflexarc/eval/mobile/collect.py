"""Collect episodes with the scripted driver, each in a file of its own, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field

from reflexarc.contract.errors import ConfigError, SimulatorError
from reflexarc.contract.policy_contract import FrozenModel
from reflexarc.data.libero_writer import atomic_path
from reflexarc.data.mobile.layout import CAMERA
from reflexarc.data.mobile.writing import write_episode
from reflexarc.eval.mobile.driver import Driver, is_obstructed
from reflexarc.eval.mobile.scene import draw_scene
from reflexarc.eval.mobile.simulator import MobileSimulator
from reflexarc.eval.mobile.tasks import (
    CONTROL_HZ,
    MAX_STEPS,
    SPEED_LIMIT,
    MobileTask,
    select_tasks,
)

SETTINGS_FILE, SUMMARY_FILE = "collection.json", "summary.json"
_NOISE_MEMORY = 0.7  # of a step's noise in the next one's: pushes that last


class CollectionSettings(FrozenModel):
    """What decides every episode beside its number.

    Attributes:
        image_size: height and width of images, pixels.
        action_noise: deviation of the noise on executed velocities, m/s. The labels are without.
        seed: of scenes and noise.
    """

    image_size: int = Field(default=224, ge=16, le=1024)
    action_noise: float = Field(default=0.15, ge=0.0, le=1.0)
    seed: int = Field(default=0, ge=0, lt=2**32)


@dataclass(frozen=True)
class CollectionSummary:
    """What ``summary.json`` holds."""

    episodes: int
    steps: int
    shortest: int
    longest: int
    obstructed: int
    failed: int


@dataclass(frozen=True)
class Drive:
    """One episode: T steps, and whether it ended at its target."""

    images: npt.NDArray[np.uint8]
    executed: npt.NDArray[np.float64]
    meant: npt.NDArray[np.float64]
    success: bool


def collect(
    settings: CollectionSettings,
    output: Path,
    *,
    episodes: int,
    tasks: tuple[int, ...] | None = None,
    on_episode: Callable[[str], None] = lambda name: None,
) -> CollectionSummary:
    """Bring ``output`` to ``episodes`` episodes of every task; those that stand there are kept.

    Raises ConfigError where ``output`` holds a collection of other settings, SimulatorError where
    the driver fails too often.
    """
    selected = select_tasks(tasks)
    output.mkdir(parents=True, exist_ok=True)
    _check_settings(settings, output)
    lengths, obstructed, failed = [], 0, 0
    for task in selected:
        with MobileSimulator(task, image_size=settings.image_size) as simulator:
            number = made = 0
            while made < episodes:
                found = _one(settings, output, simulator, number)
                number += 1
                if found is None:
                    failed += 1
                    _refuse_failures(task, failed, episodes)
                    continue
                made += 1
                lengths.append(found["steps"])
                obstructed += found["obstructed"]
                on_episode(f"{task.name} {number}")
    summary = CollectionSummary(
        len(lengths), sum(lengths), min(lengths), max(lengths), obstructed, failed
    )
    with atomic_path(output / SUMMARY_FILE) as temporary:
        temporary.write_text(json.dumps(summary.__dict__, indent=2) + "\n")
    return summary


def _one(
    settings: CollectionSettings, output: Path, simulator: MobileSimulator, number: int
) -> dict[str, int] | None:
    """Collect one attempt, or read what it gave before; None where the driver failed."""
    task = simulator.task
    path = output / f"episode_{task.name}_{number:05d}.h5"
    scene = draw_scene("collected", task.index, number, settings.seed)
    obstructed = int(is_obstructed(scene, task.index))
    if path.is_file():
        from reflexarc.data.mobile.episode import read_episode

        return {"steps": read_episode(path).length, "obstructed": obstructed}
    random = np.random.default_rng([settings.seed, task.index, number, 7])
    simulator.reset(scene)
    drive = drive_to_target(simulator, random, settings.action_noise)
    if not drive.success:
        return None
    write_episode(
        path,
        drive.images,
        drive.executed,
        task.instruction,
        control_hz=CONTROL_HZ,
        expert_actions=drive.meant,
        attributes={"seed": settings.seed, "number": number, "action_noise": settings.action_noise},
    )
    return {"steps": len(drive.executed), "obstructed": obstructed}


def drive_to_target(
    simulator: MobileSimulator, random: np.random.Generator, noise: float, *, render: bool = True
) -> Drive:
    """Drive the scene at hand to its task's target, with noise on what is executed."""
    driver = Driver(simulator.scene, simulator.task.index)
    images, executed, meant = [], [], []
    push = random.normal(0, noise, 2)
    for _ in range(MAX_STEPS):
        if render:
            images.append(simulator.observe().images[CAMERA])
        clean = driver.velocity(simulator.position)
        action = np.clip(clean + push, -SPEED_LIMIT, SPEED_LIMIT)
        executed.append(action)
        meant.append(clean)
        fresh = random.normal(0, noise, 2)
        push = _NOISE_MEMORY * push + (1 - _NOISE_MEMORY**2) ** 0.5 * fresh
        simulator.step(action)
        if simulator.over:
            break
    pixels = np.stack(images) if images else np.empty((0, 0, 0, 3), np.uint8)
    return Drive(pixels, np.stack(executed), np.stack(meant), simulator.success)


def _check_settings(settings: CollectionSettings, output: Path) -> None:
    path = output / SETTINGS_FILE
    if not path.is_file():
        with atomic_path(path) as temporary:
            temporary.write_text(settings.model_dump_json(indent=2) + "\n")
        return
    found, wanted = json.loads(path.read_text()), settings.model_dump()
    differing = {key: found.get(key) for key in wanted if found.get(key) != wanted[key]}
    if differing:
        raise ConfigError(
            f"{output} holds a collection made with {differing}; give the same options to "
            "continue it, or another --output",
            field="output",
        )


def _refuse_failures(task: MobileTask, failed: int, episodes: int) -> None:
    if failed > episodes + 10:
        raise SimulatorError(f"{task.name}: {failed} attempts failed; lower --action-noise")

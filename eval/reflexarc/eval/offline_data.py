"""Recorded episodes as questions to a policy: its observations, and the chunks that followed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract import HistoryRow, Observation, PolicyContract
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.contract.images import prepare_image
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.eval.goal_images import last_images
from reflexarc.eval.libero.observation import check_libero_contract
from reflexarc.eval.offline_settings import Labels, OfflineSettings

FloatRows = npt.NDArray[np.float64]
Images = dict[str, npt.NDArray[np.uint8]]
_STEPS_NAMED = 6


@dataclass(frozen=True, eq=False)
class RecordedEpisode:
    """One episode with the steps at which the policy is asked.

    Attributes:
        name: ``file/demo``, the file relative to the data folder.
        steps: ``int64 (N,)``, steps with a recorded frame.
    """

    name: str
    episode: DatasetEpisode
    labels: Labels
    steps: npt.NDArray[np.int64]

    def actions(self) -> FloatRows:
        """``float64 (T, D)``, what the chunks are compared with.

        Raises DatasetError where the file holds no expert's actions.
        """
        if self.labels == "executed":
            return self.episode.actions()
        try:
            return self.episode.labelled_actions("expert")
        except DatasetError as error:
            raise DatasetError(
                f"{error.message}; to compare with what was executed: --labels executed",
                field="expert_actions",
            ) from error

    def sha256(self) -> str:
        """Of what was asked and compared: instruction, steps and actions."""
        digest = hashlib.sha256(f"{self.episode.instruction}\n{self.steps.tolist()}\n".encode())
        digest.update(np.ascontiguousarray(self.actions(), dtype="<f8").tobytes())
        return digest.hexdigest()

    def chunks(self, horizon: int) -> tuple[FloatRows, npt.NDArray[np.bool_]]:
        """Chunks ``(N, H, D)`` from each step on, and ``(N, H)``: False past the episode's end."""
        actions = self.actions()
        rows = self.steps[:, None] + np.arange(horizon)
        return actions[np.minimum(rows, len(actions) - 1)], rows < len(actions)

    def observations(self, contract: PolicyContract, seed: int) -> Iterator[Observation]:
        """One observation a step, each with its whole history: a request depends on nothing else.

        The seed of a request follows from ``seed``, the episode's name and the step.
        """
        states = self.episode.states(contract.state.layout).astype(np.float32)
        frames = _Frames(self.episode, contract)
        # Each request stands for itself, so each brings the goal: what this episode ends with.
        goal = last_images(contract, self.episode) if contract.needs_goal_image else None
        name = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little")
        for step in map(int, self.steps):
            words = np.random.SeedSequence([seed, name, step]).generate_state(1, np.uint64)
            yield Observation(
                images=frames.at(step),
                state=states[step],
                instruction=self.episode.instruction if contract.needs_language else None,
                session_id=f"offline-{name:016x}",
                seed=int(words[0] >> np.uint64(1)),
                step_index=step,
                history=_history(contract, frames, states, step),
                goal_image=goal,
            )


def _history(
    contract: PolicyContract, frames: _Frames, states: npt.NDArray[Any], step: int
) -> tuple[HistoryRow, ...]:
    with_images = set(contract.history.frame_steps(step))
    past = sorted((with_images | set(contract.history.state_steps(step))) - {step})
    return tuple(
        HistoryRow(at, states[at], frames.at(at) if at in with_images else None) for at in past
    )


class _Frames:
    """Prepared images of an episode by step; each is read and prepared once."""

    def __init__(self, episode: DatasetEpisode, contract: PolicyContract) -> None:
        self._episode, self._contract = episode, contract
        self._index = {int(step): index for index, step in enumerate(episode.image_steps)}
        self._prepared: dict[int, Images] = {}
        self._span = contract.history.span

    def at(self, step: int) -> Images:
        if step not in self._prepared:
            self._prepared = {
                kept: images for kept, images in self._prepared.items() if kept >= step - self._span
            }
            self._prepared[step] = {
                camera.name: prepare_image(
                    camera, self._episode.images(camera.name, [self._index[step]])[0]
                )
                for camera in self._contract.cameras
            }
        return self._prepared[step]


def select_episodes(settings: OfflineSettings, contract: PolicyContract) -> list[RecordedEpisode]:
    """The episodes that were asked for, after a check that they fit the policy's contract.

    Raises ContractViolationError, DatasetError or ConfigError naming what does not fit.
    """
    found = _open(settings, contract)
    chosen = _of_tasks(found, settings.tasks)
    if settings.episodes is not None:
        chosen = _at_positions(chosen, settings.episodes)
    recorded = [
        RecordedEpisode(
            name=_name(settings.data, episode),
            episode=episode,
            labels=settings.labels,
            steps=episode.image_steps[:: settings.every],
        )
        for episode in chosen
    ]
    for one in recorded:
        _check_images(one, contract, resize=settings.resize)
        _check_history(one, contract)
    return recorded


def _open(settings: OfflineSettings, contract: PolicyContract) -> Sequence[DatasetEpisode]:
    data = settings.data
    # LIBERO needs no LeRobot, which needs pyarrow.
    if (data / "meta" / "info.json").is_file():
        from reflexarc.data.lerobot.for_contract import open_for_contract
        from reflexarc.data.lerobot.recipe_names import names_in_recipe

        recipe = settings.recipe_data
        names = None if recipe is None else names_in_recipe(recipe, data)
        return open_for_contract(data, contract, names).episodes
    check_libero_contract(contract)  # the files hold what the simulator gave
    return open_libero([data]).episodes


def _name(data: Path, episode: DatasetEpisode) -> str:
    inside = data.is_dir() and episode.path != data  # a LeRobot folder is all episodes' path
    file = episode.path.relative_to(data) if inside else Path(episode.path.name)
    return f"{file.as_posix()}/{episode.demo}"


def _of_tasks(episodes: Sequence[DatasetEpisode], wanted: Sequence[str]) -> list[DatasetEpisode]:
    if not wanted:
        return list(episodes)
    names = list(dict.fromkeys(episode.task_name for episode in episodes))
    chosen = set()
    for text in wanted:
        fitting = [name for name in names if name == text] or [n for n in names if text in n]
        if len(fitting) != 1:
            what = "fits no task" if not fitting else f"fits {len(fitting)} tasks"
            raise ConfigError(
                f"--tasks: {text!r} {what}; there are: {', '.join(fitting or names)}",
                field="tasks",
            )
        chosen.update(fitting)
    return [episode for episode in episodes if episode.task_name in chosen]


def _at_positions(
    episodes: Sequence[DatasetEpisode], positions: Sequence[int]
) -> list[DatasetEpisode]:
    """Those at ``positions`` among their task's demonstrations."""
    by_task: dict[str, list[DatasetEpisode]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task_name, []).append(episode)
    for task, members in by_task.items():
        if not any(position < len(members) for position in positions):
            raise ConfigError(
                f"--episodes: none of them exists for {task}, which has {len(members)} "
                f"demonstrations: 0-{len(members) - 1}",
                field="episodes",
            )
    wanted = {
        id(members[position])
        for members in by_task.values()
        for position in positions
        if position < len(members)
    }
    return [episode for episode in episodes if id(episode) in wanted]


def _check_images(recorded: RecordedEpisode, contract: PolicyContract, *, resize: bool) -> None:
    for camera in contract.cameras:
        height, width = recorded.episode.image_size(camera.name)
        source = (camera.source_height, camera.source_width)
        if (height, width) != source and not resize:
            raise DatasetError(
                f"{recorded.name}: images are {height}x{width}, the policy's camera "
                f"{camera.name} was trained on images rendered at {source[0]}x{source[1]}, which "
                "look different after resizing; collect data at that size, or send these "
                "nevertheless with --resize",
                field=f"images.{camera.name}",
            )


def _check_history(recorded: RecordedEpisode, contract: PolicyContract) -> None:
    held = set(recorded.episode.image_steps.tolist())
    for step in map(int, recorded.steps):
        missing = [at for at in contract.history.frame_steps(step) if at not in held]
        if missing:
            held_steps = ", ".join(map(str, sorted(held)[:_STEPS_NAMED]))
            history = contract.history
            raise DatasetError(
                f"{recorded.name}: the decision at step {step} sees the images of the steps "
                f"{', '.join(map(str, missing[:_STEPS_NAMED]))}, which were not recorded (images "
                f"stand at {held_steps}, ...); the policy sees {history.frames} frames at a "
                f"stride of {history.stride}: collect data with that --render-every, or 1",
                field="history",
            )

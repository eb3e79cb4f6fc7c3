"""Which steps of an episode a sample sees: its window of past rows, and the row k steps ahead.

The windows are those of ``reflexarc.policy.windows``, which serving goes through.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import ActionSpec
from reflexarc.data.dataset import DatasetEpisode

Steps = npt.NDArray[np.int64]
_OFFERED_UP_TO = 40


def chunk_actions(
    actions: npt.NDArray[np.floating], steps: Steps, horizon: int, action: ActionSpec
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Chunks ``(F, H, D)`` that start at ``steps (F,)`` of ``actions (T, D)``, and their mask.

    Past the end of the episode a chunk stands still, and the mask ``(F, H)`` is False: targets
    stay the last one; deltas and velocities are zero, with the last gripper command.
    """
    padding = np.zeros((horizon, actions.shape[1]))
    if action.kind == "position":
        padding[:] = actions[-1]
    elif action.gripper is not None:
        padding[:, action.gripper.index] = actions[-1, action.gripper.index]
    padded = np.concatenate([actions, padding])
    rows = steps[:, None] + np.arange(horizon)
    return padded[rows], rows < len(actions)


def window_steps(steps: Steps, length: int, stride: int) -> Steps:
    """``(F, length)``: for each of ``steps (F,)`` the steps of its window, oldest first.

    Steps before 0 do not exist; the oldest one of the window that does stands in their place.
    """
    wanted = steps[:, None] - np.arange(length - 1, -1, -1) * stride
    oldest: Steps = (steps % stride)[:, None]
    return np.where(wanted < 0, oldest, wanted)


def window_valid(steps: Steps, rows: int, stride: int) -> npt.NDArray[np.bool_]:
    """``bool (F, rows)``, False where a row of the window of ``steps (F,)`` is padding."""
    return (steps[:, None] - np.arange(rows - 1, -1, -1) * stride) >= 0


def frame_rows(episode: DatasetEpisode, steps: Steps) -> Steps:
    """Index into the episode's frames of the image at each of ``steps``, any shape.

    Raises ConfigError when an image was not rendered at one of them.
    """
    rows = _rows_by_step(episode)[steps]
    if (rows < 0).any():
        raise ConfigError(
            f"a window needs the image of step {int(steps[rows < 0][0])} of {episode.path.name}, "
            f"{episode.demo}, whose images stand {episode.render_stride} steps apart; "
            f"contract.history.stride must be a multiple of {episode.render_stride}",
            field="contract.history.stride",
        )
    return rows


def future_steps(episode: DatasetEpisode, ahead: int) -> tuple[Steps, npt.NDArray[np.bool_]]:
    """The step ``ahead`` control steps after each of the episode's frames, and where it exists.

    Past the end of the episode the last frame's step stands in its place, with False.

    Raises ConfigError, naming the horizons that the data offers, when no image was rendered there.
    """
    steps = np.asarray(episode.image_steps, dtype=np.int64)
    exists = steps + ahead < episode.length
    if not _is_rendered(episode, ahead):
        offered = [k for k in range(1, _OFFERED_UP_TO + 1) if _is_rendered(episode, k)]
        listed = ", ".join(map(str, offered)) or "none"
        raise ConfigError(
            f"objective.horizon is {ahead}, but the images of {episode.path.name}, "
            f"{episode.demo} stand {episode.render_stride} steps apart, so that step t + {ahead} "
            f"has none; up to {_OFFERED_UP_TO} this data offers: {listed}",
            field="objective.horizon",
        )
    return np.where(exists, steps + ahead, steps[-1]), exists


def _is_rendered(episode: DatasetEpisode, ahead: int) -> bool:
    later = np.asarray(episode.image_steps, dtype=np.int64) + ahead
    return bool((_rows_by_step(episode)[later[later < episode.length]] >= 0).all())


def _rows_by_step(episode: DatasetEpisode) -> Steps:
    """``int64 (T,)``: the index of the image at each step, -1 where there is none."""
    rows = np.full(episode.length, -1, dtype=np.int64)
    rows[episode.image_steps] = np.arange(len(episode.image_steps))
    return rows

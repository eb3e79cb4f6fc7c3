"""Check every episode of a mobile robot and say what is there, without stopping at a bad one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reflexarc.contract.errors import DatasetError
from reflexarc.data.inspection import Problem, Range
from reflexarc.data.mobile.dataset import find_episodes
from reflexarc.data.mobile.episode import MobileEpisode, read_episode
from reflexarc.data.mobile.layout import CAMERA, INSTRUCTION, VELOCITIES

WINDOW, AHEAD = 8, 10
WHOLE = WINDOW + AHEAD
"""Steps of a whole sample: the window's frames and the chunk behind them."""
_NO_INSTRUCTION = "(none)"
_STILL = 1e-4


@dataclass
class MobileReport:
    """What the episodes hold; counts are of those that can be used.

    ``short`` are episodes of less than ``WHOLE`` steps, whose samples are padded and masked;
    ``still_share`` is the share of steps at which the base stands.
    """

    paths: list[str]
    episodes: int = 0
    steps: int = 0
    shortest: int = 0
    longest: int = 0
    short: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    image_shapes: list[tuple[int, int, int]] = field(default_factory=list)
    control_hz: list[float] = field(default_factory=list)
    with_expert: int = 0
    still_share: float = 0.0
    actions: list[Range] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_mobile(
    paths: Sequence[Path],
    *,
    pattern: str | None = None,
    read_images: bool = True,
    on_episode: Callable[[str], None] = lambda name: None,
) -> MobileReport:
    """Read every episode.

    Raises DatasetError for paths that name no file. A bad episode is a :class:`Problem`.
    """
    report = MobileReport(paths=[str(path) for path in paths])
    usable: list[tuple[MobileEpisode, np.ndarray[Any, np.dtype[np.float64]]]] = []
    for path in find_episodes(paths, pattern):
        on_episode(path.name)
        try:
            episode = read_episode(path, _NO_INSTRUCTION)
            actions = episode.actions()
            if episode.has_expert:
                episode.labelled_actions("expert")
            if read_images:
                report.remarks += _blank_images(episode)
        except DatasetError as error:
            report.problems.append(Problem(str(path), path.stem, error.field or "", error.message))
            continue
        usable.append((episode, actions))
    if usable:
        _summarise(report, usable)
    return report


def _summarise(
    report: MobileReport,
    usable: list[tuple[MobileEpisode, np.ndarray[Any, np.dtype[np.float64]]]],
) -> None:
    episodes = [episode for episode, _ in usable]
    lengths = [episode.length for episode in episodes]
    actions = np.concatenate([rows for _, rows in usable])
    report.episodes, report.steps = len(episodes), sum(lengths)
    report.shortest, report.longest = min(lengths), max(lengths)
    report.short = sum(length < WHOLE for length in lengths)
    report.instructions = dict(sorted(Counter(e.instruction for e in episodes).items()))
    report.image_shapes = sorted({episode.image_shape for episode in episodes})
    report.control_hz = sorted({e.control_hz for e in episodes if e.control_hz is not None})
    report.with_expert = sum(episode.has_expert for episode in episodes)
    report.still_share = float((np.linalg.norm(actions, axis=1) < _STILL).mean())
    report.actions = [
        Range(name, float(rows.min()), float(rows.max()))
        for name, rows in zip(VELOCITIES, actions.T, strict=True)
    ]
    report.remarks += _shared_remarks(report, episodes)


def _shared_remarks(report: MobileReport, episodes: list[MobileEpisode]) -> list[str]:
    found = []
    if report.short:
        found.append(
            f"{report.short} of {report.episodes} episodes are shorter than {WHOLE} steps (a "
            f"window of {WINDOW} frames and a chunk of {AHEAD} actions): padded, and masked"
        )
    silent = report.instructions.get(_NO_INSTRUCTION, 0)
    if silent:
        found.append(
            f"{silent} episodes have no {INSTRUCTION}; training needs data.fallback_instruction"
        )
    if len(report.image_shapes) > 1:
        found.append(f"images of different sizes: {report.image_shapes}; one run takes one size")
    unrated = sum(episode.control_hz is None for episode in episodes)
    if unrated:
        found.append(f"{unrated} episodes do not say their rate; training needs data.control_hz")
    return found


def _blank_images(episode: MobileEpisode) -> list[str]:
    pixels = episode.images(CAMERA, range(episode.length))
    flat = pixels.reshape(len(pixels), -1, 3)
    blank = int((flat == flat[:, :1]).all(axis=(1, 2)).sum())
    return [f"{episode.demo}: {blank} images have a single colour"] if blank else []

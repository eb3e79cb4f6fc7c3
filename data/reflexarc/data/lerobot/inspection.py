"""Check every episode of a LeRobot folder and say what is in it, without stopping at a bad one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reflexarc.contract.errors import DatasetError
from reflexarc.data.inspection import Problem, Range
from reflexarc.data.lerobot.dataset import LeRobotDataset, open_lerobot
from reflexarc.data.lerobot.episode import LeRobotEpisode
from reflexarc.data.lerobot.video import TOLERANCE, check_whole, video_facts

_FRAMES_AT_ONCE = 32


@dataclass(frozen=True)
class CameraReport:
    """A camera that is there. ``codec`` is empty for images inside parquet."""

    name: str
    feature: str
    height: int
    width: int
    codec: str


@dataclass
class LeRobotReport:
    """What a folder holds; counts are of the episodes that can be used."""

    path: str
    version: str = ""
    robot: str = ""
    fps: float = 0.0
    episodes: int = 0
    frames: int = 0
    shortest: int = 0
    longest: int = 0
    tasks: list[tuple[str, int]] = field(default_factory=list)
    features: dict[str, str] = field(default_factory=dict)
    cameras: list[CameraReport] = field(default_factory=list)
    absent_cameras: list[str] = field(default_factory=list)
    state_parts: list[str] = field(default_factory=list)
    action_parts: list[str] = field(default_factory=list)
    states: list[Range] = field(default_factory=list)
    actions: list[Range] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_lerobot(
    root: Path, *, read_images: bool = True, on_episode: Callable[[str], None] = lambda name: None
) -> tuple[LeRobotReport, LeRobotDataset | None]:
    """Read every episode, and with ``read_images`` decode every frame.

    Returns the report and the dataset, None where it does not open at all.
    """
    report = LeRobotReport(path=str(root))
    try:
        dataset = open_lerobot(root)
    except DatasetError as error:
        report.problems.append(Problem(str(root), "", error.field or "", error.message))
        return report, None
    _describe(report, dataset)
    states, actions, usable = [], [], []
    for episode in dataset.episodes:
        on_episode(episode.demo)
        try:
            rows = episode.states(dataset.layout("eef3+axisangle3+fingers2")), episode.actions()
            report.remarks += _time_remarks(episode)
            _check_frames(episode, read_images)
        except DatasetError as error:
            problem = Problem(str(root), episode.demo, error.field or "", error.message)
            report.problems.append(problem)
            continue
        usable.append(episode)
        states.append(rows[0])
        actions.append(rows[1])
    if usable:
        _summarise(report, usable)
        layout = dataset.layout("eef3+axisangle3+fingers2")
        report.states = _ranges(dataset.state_spec(layout).names, np.concatenate(states))
        report.actions = _ranges(dataset.action_spec(1).names, np.concatenate(actions))
        report.remarks += _constant(report)
    return report, dataset


def _describe(report: LeRobotReport, dataset: LeRobotDataset) -> None:
    info = dataset.info
    report.version, report.robot, report.fps = info.version, info.robot, info.fps
    report.absent_cameras = list(dataset.absent_cameras)
    report.features = {
        key: f"{feature.dtype} {'x'.join(map(str, feature.shape))}"
        for key, feature in info.features.items()
    }
    report.state_parts = [f"{n} [{s.start}:{s.end}]" for n, s in info.modality.state.items()]
    report.action_parts = [f"{n} [{s.start}:{s.end}]" for n, s in info.modality.action.items()]
    depth = [key for key, feature in info.features.items() if feature.is_depth]
    if depth:
        report.remarks.append(f"depth maps are not read: {', '.join(depth)}")
    if dataset.absent_cameras and not dataset.cameras:
        listed = ", ".join(dataset.absent_cameras)
        message = (
            f"info.json declares {listed}, but there is no file of any; copy the dataset again"
        )
        report.problems.append(Problem(str(info.root), "", dataset.absent_cameras[0], message))
    first = dataset.episodes[0]
    for name, feature in dataset.mapping.cameras.items():
        height, width = first.image_sizes[name]
        span, codec = first.record.videos.get(feature), ""
        if span is not None:
            try:
                codec = video_facts(span.path).codec
            except DatasetError:
                codec = "unreadable"  # named with its episode
        report.cameras.append(CameraReport(name, feature, height, width, codec))
    frames = sum(episode.length for episode in dataset.episodes)
    for key, said, found in (
        ("total_episodes", info.total_episodes, len(dataset.episodes)),
        ("total_frames", info.total_frames, frames),
    ):
        if said is not None and said != found:
            report.remarks.append(f"info.json says {key} is {said}, there are {found}")


def _check_frames(episode: LeRobotEpisode, read_images: bool) -> None:
    times = episode.times()
    for camera, feature in episode.mapping.cameras.items():
        span = episode.record.videos.get(feature)
        if span is not None:
            check_whole(span.path, span.start + float(times[-1]), episode.tolerance)
        if read_images:
            for start in range(0, len(episode.image_steps), _FRAMES_AT_ONCE):
                stop = min(start + _FRAMES_AT_ONCE, len(episode.image_steps))
                episode.images(camera, range(start, stop))


def _time_remarks(episode: LeRobotEpisode) -> list[str]:
    expected = np.arange(episode.length) / episode.mapping.fps
    off = float(np.abs(episode.times() - expected).max())
    if off <= TOLERANCE:
        return []
    return [
        f"{episode.demo}: timestamps lie up to {off:.4f} s from {episode.mapping.fps:g} a second"
    ]


def _summarise(report: LeRobotReport, usable: list[LeRobotEpisode]) -> None:
    lengths = [episode.length for episode in usable]
    report.episodes, report.frames = len(usable), sum(lengths)
    report.shortest, report.longest = min(lengths), max(lengths)
    report.tasks = Counter(episode.instruction for episode in usable).most_common()
    median = float(np.median(lengths))
    report.remarks += [
        f"{episode.demo}: {episode.length} rows where the median is {median:g}"
        for episode in usable
        if not median / 2 <= episode.length <= 2 * median
    ]
    if len(report.tasks) == len(usable) > 1:
        report.remarks.append(
            "every episode has an instruction of its own: hold some out with data.split_by: dataset"
        )


def _constant(report: LeRobotReport) -> list[str]:
    remarks = []
    for kind, ranges in (("state", report.states), ("action", report.actions)):
        constant = [r.name for r in ranges if r.maximum - r.minimum < 1e-9]
        if constant:
            remarks.append(f"{len(constant)} constant dimensions of {kind}: {', '.join(constant)}")
    return remarks


def _ranges(names: tuple[str, ...], rows: np.ndarray[Any, Any]) -> list[Range]:
    return [
        Range(name, float(low), float(high))
        for name, low, high in zip(names, rows.min(0), rows.max(0), strict=True)
    ]

"""Check every demo of LIBERO files and say what is in them, without stopping at a bad one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATES, libero_action
from reflexarc.data.libero_episode import Episode, FloatRows
from reflexarc.data.libero_hdf5 import find_files, list_demos, read_episode
from reflexarc.data.libero_layout import CAMERA_DATASETS, Alignment, open_hdf5

_FRAMES_AT_ONCE = 64
_NO_OP_NORM = 1e-4
_CONSTANT_SPREAD = 1e-9
_GRIPPER = 6


@dataclass(frozen=True)
class Problem:
    """Why a demo, or with an empty ``demo`` a whole file, cannot be used."""

    path: str
    demo: str
    key: str
    message: str


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of one dimension."""

    name: str
    minimum: float
    maximum: float


@dataclass
class FileReport:
    """What one file holds; counts are of the demos that can be used.

    ``gripper_closed_share`` and ``no_op_share`` are shares of all steps; a no-op is a step whose
    six deltas have a norm below 1e-4 while the gripper command stays as it was.
    """

    path: str
    megabytes: float
    task_name: str = ""
    instruction: str = ""
    alignment: str = ""
    recognised_by: str = ""
    render_stride: int = 0
    image_shapes: list[tuple[int, int, int]] = field(default_factory=list)
    demos: int = 0
    steps: int = 0
    frames: int = 0
    shortest: int = 0
    longest: int = 0
    seeds: list[int] = field(default_factory=list)
    gripper_closed_share: float = 0.0
    no_op_share: float = 0.0
    actions: list[Range] = field(default_factory=list)
    states: list[Range] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Inspection:
    """All files' reports, and what is odd about them taken together."""

    files: list[FileReport]
    remarks: list[str]

    @property
    def problems(self) -> list[Problem]:
        return [problem for report in self.files for problem in report.problems]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_libero(
    paths: Sequence[Path],
    *,
    alignment: Alignment | None = None,
    read_images: bool = True,
    on_demo: Callable[[str], None] = lambda name: None,
) -> Inspection:
    """Read every demo of every file.

    Args:
        paths: files or folders, as :func:`reflexarc.data.libero_hdf5.open_libero` takes them.
        alignment: for files that cannot be recognised.
        read_images: also read every image, which finds damage and blank frames.
        on_demo: called with ``file demo`` before each demo, for progress.

    Raises:
        DatasetError: for paths that name no file. A bad file or demo is a :class:`Problem`.
    """
    seen: dict[str, str] = {}
    reports = [
        _inspect_file(path, alignment, read_images, on_demo, seen) for path in find_files(paths)
    ]
    return Inspection(reports, _shared_remarks(reports))


def count_demos(paths: Sequence[Path]) -> int:
    """How many demos there are to inspect; files that cannot be opened count none."""
    total = 0
    for path in find_files(paths):
        try:
            total += len(list_demos(path))
        except DatasetError:
            continue
    return total


def _inspect_file(
    path: Path,
    alignment: Alignment | None,
    read_images: bool,
    on_demo: Callable[[str], None],
    seen: dict[str, str],
) -> FileReport:
    report = FileReport(path=str(path), megabytes=round(path.stat().st_size / 1e6, 1))
    try:
        demos = list_demos(path)
    except DatasetError as error:
        report.problems.append(_problem(path, "", error))
        return report
    usable: list[tuple[Episode, FloatRows, FloatRows]] = []
    for demo in demos:
        on_demo(f"{path.name} {demo}")
        try:
            episode = read_episode(path, demo, alignment)
            actions, states = episode.actions(), _all_states(episode)
            if read_images:
                report.remarks += _image_remarks(episode)
        except DatasetError as error:
            report.problems.append(_problem(path, demo, error))
            continue
        usable.append((episode, actions, states))
        report.remarks += _demo_remarks(episode, actions, seen)
    if usable:
        _summarise(report, usable)
    try:
        report.remarks += _attribute_remarks(path, len(demos), [e for e, _, _ in usable])
    except DatasetError as error:
        report.problems.append(_problem(path, "", error))
    return report


def _problem(path: Path, demo: str, error: DatasetError) -> Problem:
    return Problem(str(path), demo, error.field or "", error.message)


def _all_states(episode: Episode) -> FloatRows:
    """``(T, S)``: all layouts side by side, so that each of their keys is checked."""
    return np.concatenate([episode.states(layout) for layout in LIBERO_STATES], axis=1)


def _summarise(report: FileReport, usable: list[tuple[Episode, FloatRows, FloatRows]]) -> None:
    episodes = [episode for episode, _, _ in usable]
    actions = np.concatenate([rows for _, rows, _ in usable])
    states = np.concatenate([rows for _, _, rows in usable])
    first, lengths = episodes[0], [episode.length for episode in episodes]
    report.task_name, report.instruction = first.task_name, first.instruction
    report.alignment, report.recognised_by = first.alignment, first.recognised_by
    report.render_stride = first.render_stride
    report.image_shapes = sorted({episode.image_shape for episode in episodes})
    report.demos, report.steps = len(episodes), sum(lengths)
    report.frames = sum(len(episode.image_steps) for episode in episodes)
    report.shortest, report.longest = min(lengths), max(lengths)
    report.seeds = [episode.seed for episode in episodes if episode.seed is not None]
    report.gripper_closed_share = float((actions[:, _GRIPPER] > 0).mean())
    report.no_op_share = sum(no_ops(rows).sum() for _, rows, _ in usable) / len(actions)
    report.actions = _ranges(libero_action(1).names, actions)
    names = [name for spec in LIBERO_STATES.values() for name in spec.names]
    # Layouts share parts: a name once.
    report.states = list({r.name: r for r in _ranges(names, states)}.values())
    report.remarks += _length_remarks(episodes) + _summary_remarks(report)


def no_ops(actions: FloatRows) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """``bool (T,)``: steps of ``actions (T, 7)`` that neither move nor change the gripper."""
    still = np.linalg.norm(actions[:, :_GRIPPER], axis=1) < _NO_OP_NORM
    unchanged = np.ones(len(actions), dtype=bool)
    unchanged[1:] = actions[1:, _GRIPPER] == actions[:-1, _GRIPPER]
    return np.asarray(still & unchanged)


def _ranges(names: Sequence[str], rows: FloatRows) -> list[Range]:
    lowest, highest = rows.min(0), rows.max(0)
    return [
        Range(name, float(low), float(high))
        for name, low, high in zip(names, lowest, highest, strict=True)
    ]


def _image_remarks(episode: Episode) -> list[str]:
    """Reads all images of a demo, a block at a time; says which are of a single colour."""
    remarks = []
    for camera in CAMERA_DATASETS:
        blank = 0
        for start in range(0, len(episode.image_steps), _FRAMES_AT_ONCE):
            stop = min(start + _FRAMES_AT_ONCE, len(episode.image_steps))
            pixels = episode.images(camera, range(start, stop))
            flat = pixels.reshape(len(pixels), -1, 3)
            blank += int((flat == flat[:, :1]).all(axis=(1, 2)).sum())
        if blank:
            remarks.append(f"{episode.demo}: {blank} images of {camera} have a single colour")
    return remarks


def _demo_remarks(episode: Episode, actions: FloatRows, seen: dict[str, str]) -> list[str]:
    remarks = []
    outside = np.argwhere(np.abs(actions) > 1)
    if len(outside):
        step, column = outside[0]
        remarks.append(
            f"{episode.demo}: {len(outside)} action values outside [-1, 1], first at aligned step "
            f"{step}, {libero_action(1).names[column]} = {actions[step, column]:.4g}"
        )
    if not np.isin(actions[:, _GRIPPER], (-1.0, 1.0)).all():
        remarks.append(f"{episode.demo}: gripper commands other than -1 and +1")
    name = f"{episode.path.name} {episode.demo}"
    key = hashlib.sha256(np.ascontiguousarray(actions).tobytes()).hexdigest()
    if key in seen:
        remarks.append(f"{episode.demo}: the same actions as {seen[key]}")
    seen.setdefault(key, name)
    return remarks


def _length_remarks(episodes: list[Episode]) -> list[str]:
    median = float(np.median([episode.length for episode in episodes]))
    return [
        f"{episode.demo}: {episode.length} steps where the median is {median:g}"
        for episode in episodes
        if not median / 2 <= episode.length <= 2 * median
    ]


def _summary_remarks(report: FileReport) -> list[str]:
    remarks = []
    for kind, ranges in (("action", report.actions), ("state", report.states)):
        constant = [r.name for r in ranges if r.maximum - r.minimum < _CONSTANT_SPREAD]
        if constant:
            remarks.append(f"constant {kind}: {', '.join(constant)}")
    if len(report.image_shapes) > 1:
        remarks.append(f"images of different sizes: {report.image_shapes}")
    if len(set(report.seeds)) < len(report.seeds):
        remarks.append(f"{len(report.seeds)} demos share {len(set(report.seeds))} seeds")
    return remarks


def _attribute_remarks(path: Path, demos: int, usable: list[Episode]) -> list[str]:
    """Counts stated in attributes that differ from what is there."""
    remarks = []
    with open_hdf5(path) as file:
        stated = file["data"].attrs.get("num_demos")
        if stated is not None and int(stated) != demos:
            remarks.append(f"attribute num_demos is {stated}, the file holds {demos}")
        for episode in usable:
            group = file["data"][episode.demo]
            samples, rows = group.attrs.get("num_samples"), len(group["actions"])
            if samples is not None and int(samples) != rows:
                remarks.append(f"{episode.demo}: num_samples is {samples}, actions has {rows} rows")
    return remarks


def _shared_remarks(reports: list[FileReport]) -> list[str]:
    """Differences between files that one training run would mix."""
    remarks = []
    good = [report for report in reports if report.demos]
    for what, values in (
        ("alignments", {report.alignment for report in good}),
        ("image sizes", {shape for report in good for shape in report.image_shapes}),
        ("render strides", {report.render_stride for report in good}),
    ):
        if len(values) > 1:
            listed = ", ".join(map(str, sorted(values, key=str)))
            remarks.append(f"files of different {what}: {listed}")
    return remarks

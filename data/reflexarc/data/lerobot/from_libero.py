"""What the conversion of LIBERO's HDF5 files keeps beside LeRobot's own format.

``meta/libero.json`` names the task files in order; ``libero/chunk-…/file-….parquet`` holds every
array with a row a step, ``….json`` beside it the attributes and other arrays. LeRobot reads none
of them; with them an episode keeps LIBERO's states, labels and steps, and converts back exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import ActionSpec, StateSpec, libero_action
from reflexarc.data.lerobot.episode import LiberoColumns
from reflexarc.data.lerobot.info import DatasetInfo, Slice, read_json
from reflexarc.data.lerobot.parquet import COLUMNS, column_names
from reflexarc.data.lerobot.records import EpisodeRecord
from reflexarc.data.libero_layout import STATE_PARTS, libero_state_spec
from reflexarc.data.presence import is_file

MANIFEST = "meta/libero.json"
PREFIX = "libero."
RENDERED, EXPERT = "libero.rendered", "libero.expert_actions"
FORMAT = 1


def extra_file(root: Path, data_file: Path) -> Path:
    """The parquet file of arrays that belongs to a data file."""
    return root / "libero" / data_file.relative_to(root / "data")


@dataclass(frozen=True)
class LiberoFolder:
    """A dataset that came from LIBERO's HDF5 files.

    Attributes:
        files: of each data file in order, what its HDF5 file said: ``task_name``,
            ``render_stride``, ``name``.
        images: how they were compressed, and the error that was measured.
    """

    root: Path
    files: Sequence[Mapping[str, Any]]
    images: Mapping[str, Any]

    def state_spec(self, layout: str) -> StateSpec:
        return libero_state_spec(layout)

    def action_spec(self, horizon: int) -> ActionSpec:
        return libero_action(horizon)

    def file_of(self, record: EpisodeRecord) -> Mapping[str, Any]:
        """What the HDF5 file of an episode said."""
        name = record.data_file.relative_to(self.root).as_posix()
        for file in self.files:
            if file["data_file"] == name:
                return file
        raise DatasetError(f"{self.root / MANIFEST} does not list {name}", field="data_file")

    def task_name(self, record: EpisodeRecord) -> str:
        return str(self.file_of(record)["task_name"])

    def render_stride(self, record: EpisodeRecord) -> int:
        return int(self.file_of(record)["render_stride"])

    def image_steps(self, record: EpisodeRecord) -> npt.NDArray[np.int64]:
        """Steps with an image of their own; the others repeat the one before."""
        column = COLUMNS.get(record.data_file, RENDERED)
        rendered = np.asarray(column[record.first_row : record.first_row + record.length])
        return np.flatnonzero(rendered.reshape(-1)).astype(np.int64)

    def columns(self, record: EpisodeRecord) -> LiberoColumns:
        file = extra_file(self.root, record.data_file)
        layouts = {
            layout: tuple(Slice(f"{PREFIX}obs.{key}", 0, width) for key, width in parts)
            for layout, parts in STATE_PARTS.items()
        }
        return LiberoColumns(file, layouts, EXPERT if EXPERT in column_names(file) else None)


def read_libero_folder(info: DatasetInfo) -> LiberoFolder | None:
    """None for a dataset that did not come from LIBERO's HDF5 files."""
    path = info.root / MANIFEST
    if not is_file(path):
        return None
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise DatasetError(
            f"{path}: format is {values.get('format')!r}, this version reads {FORMAT}",
            field="format",
        )
    try:
        return LiberoFolder(info.root, list(values["files"]), dict(values["images"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{path} is not as it was written: {error}") from error

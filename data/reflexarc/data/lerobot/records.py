"""Where the rows and frames of one episode lie, the same for every version of the format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflexarc.contract.errors import DatasetError
from reflexarc.data.lerobot.info import DatasetInfo
from reflexarc.data.presence import is_file


@dataclass(frozen=True)
class VideoSpan:
    """A part of a video file.

    Attributes:
        path: the file.
        start: seconds from the file's beginning to the episode's first frame.
    """

    path: Path
    start: float


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode of T rows.

    Attributes:
        index: ``episode_index``.
        length: T.
        tasks: instructions, most important first.
        data_file, first_row: the parquet file and the row in it where the episode begins.
        videos: feature to where its frames lie; images in the parquet file are not here.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data_file: Path
    first_row: int
    videos: Mapping[str, VideoSpan]

    @property
    def name(self) -> str:
        return f"episode_{self.index:06d}"


@dataclass(frozen=True)
class Listing:
    """All episodes of a folder.

    Attributes:
        records: in the order of their indices.
        tasks: ``task_index`` to instruction.
        absent_cameras: declared features of which no file is there at all.
    """

    records: list[EpisodeRecord]
    tasks: Mapping[int, str]
    absent_cameras: tuple[str, ...]


def check_indices(info: DatasetInfo, indices: Sequence[int], lengths: Sequence[int]) -> None:
    """DatasetError for no episodes, for an index that comes twice, and for an empty episode."""
    if not indices:
        raise DatasetError(f"{info.root} lists no episodes", field="episode_index")
    twice = [index for index, count in Counter(indices).items() if count > 1]
    if twice:
        raise DatasetError(
            f"{info.root}: episode_index {', '.join(map(str, twice[:5]))} is listed more than "
            "once; give every episode an index of its own",
            field="episode_index",
        )
    for index, length in zip(indices, lengths, strict=True):
        if length < 1:
            raise DatasetError(
                f"{info.root}, episode_{index:06d}: length is {length}; remove this episode",
                field="length",
            )


def require_files(info: DatasetInfo, records: Sequence[EpisodeRecord]) -> None:
    """DatasetError naming the first file that ``info.json`` leads to and that is not there."""
    seen: set[Path] = set()
    for record in records:
        for path in (record.data_file, *(span.path for span in record.videos.values())):
            if path not in seen and not is_file(path):
                raise DatasetError(
                    f"{path} does not exist, but {info.root / 'meta'} says that {record.name} lies "
                    "there; copy the dataset again, whole",
                    field=str(path.relative_to(info.root)),
                )
            seen.add(path)

"""Finished offline episodes on disk: one JSON line each, appended durably, read when resuming."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from reflexarc.eval.offline_errors import OfflineEpisode
from reflexarc.eval.offline_settings import OfflineIdentity
from reflexarc.eval.results import RESULTS_FILE, ResultsError


class OfflineLog:
    """``results.jsonl`` of an output folder, held by one run at a time.

    Opening it reads the finished episodes, drops a half-written last line (with a notice), and
    refuses episodes of another checkpoint, other settings or other data.

    Args:
        folder: made where it is missing.
        identity: of this run.
        data: name of every asked episode to the sha256 of its data.

    Attributes:
        episodes: by name.

    Raises ResultsError naming file, line and what differs.
    """

    def __init__(
        self,
        folder: Path,
        identity: OfflineIdentity,
        data: Mapping[str, str],
        notify: Callable[[str], None],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / RESULTS_FILE
        self._identity, self._data = identity, data
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self.episodes = {episode.name: episode for episode in self._read(notify)}
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> OfflineLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, episode: OfflineEpisode) -> None:
        """Write one line and force it to the disk."""
        self._file.write(episode.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.episodes[episode.name] = episode

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(
                f"{self.path} is being written by another run; wait for it, or choose another "
                "--output"
            ) from None

    def _read(self, notify: Callable[[str], None]) -> list[OfflineEpisode]:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            notify(f"{self.path}: the last line is half-written; dropped, its episode runs again")
            self._file.truncate(len(complete))
        lines = enumerate(complete.splitlines(), start=1)
        return [self._episode(number, line) for number, line in lines]

    def _episode(self, number: int, line: bytes) -> OfflineEpisode:
        try:
            episode = OfflineEpisode.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise ResultsError(
                f"{self.path} line {number} is not an offline episode: {where}: {first['msg']}; "
                "choose another --output, or remove that line to run its episode again",
                field=where,
            ) from error
        found = [
            f"{name}: there {there!r}, this run {here!r}"
            for name in OfflineIdentity.model_fields
            if (there := getattr(episode.identity, name)) != (here := getattr(self._identity, name))
        ]
        if self._data.get(episode.name, episode.data_sha256) != episode.data_sha256:
            found.append(f"data_sha256: {episode.name} holds other actions than it did then")
        if found:
            raise ResultsError(
                f"{self.path} line {number} is of another run ({'; '.join(found)}); choose "
                "another --output, or give the settings of the run that began there",
                field=found[0].split(":")[0],
            )
        return episode

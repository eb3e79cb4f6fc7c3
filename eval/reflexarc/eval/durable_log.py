"""``results.jsonl``: one JSON line a finished episode, appended durably, read when resuming."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from reflexarc.contract.errors import ReflexarcError

if TYPE_CHECKING:
    from typing_extensions import Self

RESULTS_FILE = "results.jsonl"
Line = TypeVar("Line", bound=BaseModel)


class ResultsError(ReflexarcError):
    """A results file that cannot be read, is in use, or holds another run's episodes."""

    code = "results"


class DurableLog(Generic[Line]):
    """``results.jsonl`` of an output folder, held by one run at a time; a context manager.

    Opening it reads the finished episodes, drops a half-written last line (with a notice), and
    refuses episodes of another run.

    Args:
        folder: made where it is missing.
        model: what a line holds.
        title: what that is called, such as ``an episode``.
        differences: what keeps an episode out of this run, each as ``field: there X, this run Y``.
        mend: what to do where something does, besides choosing another folder.

    Attributes:
        results: the finished episodes, in the order in which they ended.

    Raises ResultsError naming the file, the line and what differs.
    """

    def __init__(
        self,
        folder: Path,
        model: type[Line],
        title: str,
        differences: Callable[[Line], list[str]],
        notify: Callable[[str], None],
        mend: str = "serve the checkpoint and give the settings of the run that began there",
    ) -> None:
        self._mend = mend
        self.path = folder / RESULTS_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ResultsError(
                f"{self.path} cannot be written ({error.strerror}); choose another --output"
            ) from error
        try:
            self._lock()
            self.results = parse_lines(self._complete_lines(notify), self.path, model, title)
            self._refuse_foreign(differences)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, result: Line) -> None:
        """Write one line and force it to the disk."""
        self._file.write(result.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results.append(result)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(
                f"{self.path} is being written by another run; wait for it, or choose another "
                "--output"
            ) from None

    def _complete_lines(self, notify: Callable[[str], None]) -> bytes:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            notify(
                f"{self.path}: the last line is half-written ({len(content) - len(complete)} "
                "bytes); dropped, its episode runs again"
            )
            self._file.truncate(len(complete))
        return complete

    def _refuse_foreign(self, differences: Callable[[Line], list[str]]) -> None:
        for number, result in enumerate(self.results, start=1):
            found = differences(result)
            if found:
                raise ResultsError(
                    f"{self.path} line {number} is of another run ({'; '.join(found)}); choose "
                    f"another --output, or {self._mend}",
                    field=found[0].split(":")[0],
                )


def unequal(pairs: Iterable[tuple[str, object, object]]) -> list[str]:
    """``field: there X, this run Y`` of each field whose two values differ; hashes shortened."""
    return [f"{name}: there {_shown(a)}, this run {_shown(b)}" for name, a, b in pairs if a != b]


def _shown(value: object) -> str:
    is_hash = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return f"'{str(value)[:12]}…'" if is_hash else repr(value)


def parse_lines(content: bytes, path: Path, model: type[Line], title: str) -> list[Line]:
    """Read complete lines. Raises ResultsError naming the first that is not ``title``."""
    results = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            results.append(model.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise ResultsError(
                f"{path} line {number} is not {title}: {where}: {first['msg']}; choose another "
                "folder, or remove that line to run its episode again",
                field=where,
            ) from error
    return results

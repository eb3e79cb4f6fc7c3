"""Write a folder whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path


def write_whole(
    directory: Path,
    files: Mapping[str, bytes],
    write_also: Callable[[Path], None] | None = None,
) -> None:
    """Write under a temporary name beside ``directory``, then rename; replaces what stands there.

    Args:
        directory: its parents are made; whether it may be replaced is the caller's to know.
        files: plain names to contents.
        write_also: writes more into the folder that it is given, before the rename.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        for name, content in files.items():
            _write_durably(temporary / name, content)
        if write_also is not None:
            write_also(temporary)
        _swap(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _swap(temporary: Path, directory: Path) -> None:
    """Put ``temporary`` in the place of ``directory``; a crash loses neither of both."""
    replaced: Path | None = None
    if directory.exists():
        replaced = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.replaced"
        directory.replace(replaced)
    try:
        temporary.replace(directory)
    except BaseException:
        if replaced is not None:
            replaced.replace(directory)
        raise
    if replaced is not None:
        shutil.rmtree(replaced)

"""Whether files are there, told apart from files that nobody lets us see."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TypeGuard

from reflexarc.contract.errors import DatasetError


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file. DatasetError where a folder on the way may not be read."""
    try:
        return path.is_file()
    except PermissionError as error:
        raise not_allowed(path, error) from error


def exists(path: Path) -> bool:
    """Whether ``path`` is there. DatasetError where a folder on the way may not be read."""
    try:
        return path.exists()
    except PermissionError as error:
        raise not_allowed(path, error) from error


def changes_of(path: Path) -> tuple[str, int, int]:
    """A file's path, its size in bytes, and the time of its last change in nanoseconds."""
    found = path.stat()
    return str(path.absolute()), found.st_size, found.st_mtime_ns


def is_forbidden(error: BaseException) -> TypeGuard[PermissionError]:
    """Whether the system refused access; ffmpeg calls a broken file "not permitted" too."""
    return isinstance(error, PermissionError) and error.errno == errno.EACCES


def not_allowed(path: Path, error: PermissionError) -> DatasetError:
    """The error for what is there and may not be read."""
    return DatasetError(
        f"{path} cannot be read: {error.strerror or error}; give this user the right to read "
        f"it (such as chmod -R u+rX on the dataset's folder)"
    )

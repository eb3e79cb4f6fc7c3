"""Which parts of a store are done, and which process computes which, durably."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_DONE = b"\1"
_WAIT_SECONDS = 0.1


class Shards:
    """Shards of equal numbers of rows; processes of one machine share them by file locks.

    A shard is done when its byte in the map is 1, which is written after its rows have reached
    the disk. A lock dies with its process, and its shard is computed by another.

    Args:
        path: the map, one byte a shard.
        locks: folder for the locks; made when it is absent.
    """

    def __init__(self, path: Path, locks: Path) -> None:
        self._path, self._locks = path, locks

    def create(self, count: int) -> None:
        """A map of ``count`` shards, none of them done."""
        with self._path.open("wb") as file:
            file.write(bytes(count))
            file.flush()
            os.fsync(file.fileno())

    def left(self) -> list[int]:
        """Shards that are not done."""
        return [i for i, done in enumerate(self._path.read_bytes()) if not done]

    def claim(self) -> Iterator[int]:
        """Shards for this process to compute; ends when all are done, by whomever.

        Each is locked until the next is asked for, which marks it as done. Where others hold all
        that is left, this waits for them, and takes over what one leaves.
        """
        self._locks.mkdir(parents=True, exist_ok=True)
        while left := self.left():
            claimed = False
            for shard in left:
                lock = FileLock(self._locks / f"{shard:08d}.lock")
                try:
                    lock.acquire(blocking=False)
                except Timeout:
                    continue
                try:
                    if not self._is_done(shard):
                        yield shard
                        self._mark(shard)
                        claimed = True
                finally:
                    lock.release()
            if not claimed:
                time.sleep(_WAIT_SECONDS)

    def _is_done(self, shard: int) -> bool:
        with self._path.open("rb") as file:
            file.seek(shard)
            return file.read(1) == _DONE

    def _mark(self, shard: int) -> None:
        with self._path.open("r+b", buffering=0) as file:
            file.seek(shard)
            file.write(_DONE)
            os.fsync(file.fileno())

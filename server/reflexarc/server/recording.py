"""Finished requests written to disk beside the inference, never in its way."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reflexarc.contract import ReflexarcError
from reflexarc.contract.errors import ConfigError
from reflexarc.contract.recording import (
    Buffer,
    RecordedExchange,
    SegmentWriter,
    index_path,
    pack_in_parts,
    scan_offsets,
    segments,
    size_of,
    write_index,
)
from reflexarc.server.exchange import Exchange

logger = logging.getLogger(__name__)
MEGABYTE = 1_000_000
LEAST_LIMIT_MB = 1
SEGMENTS = 8  # of a full recording; the oldest is dropped as a whole
WAITING_BYTES = 64 * MEGABYTE
_SAY_DROPS_SECONDS = 10.0


class Recorder:
    """A listener that records every request it has time for.

    Like a dash camera it keeps the newest: the directory holds at most ``limit_mb``, segments of
    earlier runs included, and the oldest segment goes first. A thread of its own writes. When it
    falls behind by ``waiting_bytes``, requests are left out; that is counted, logged, and stated
    in the next frame. When the disk refuses (full, gone), recording ends with one warning.

    Args:
        directory: made where it is missing; nothing outside it is ever written.
        limit_mb: of the whole directory, in 10^6 bytes.
        waiting_bytes: of the requests that wait to be written.

    Attributes:
        written: requests on disk.
        dropped: requests left out.

    Raises ConfigError: the directory cannot be written.
    """

    def __init__(
        self, directory: Path, *, limit_mb: float = 1024, waiting_bytes: int = WAITING_BYTES
    ) -> None:
        if limit_mb < LEAST_LIMIT_MB:
            raise ConfigError(
                f"--record-limit-mb must be at least {LEAST_LIMIT_MB}, got {limit_mb:g}",
                field="record_limit_mb",
            )
        self._writer = _Writer(directory, int(limit_mb * MEGABYTE))
        self._most_waiting = waiting_bytes
        self._waiting = 0
        self._lock = threading.Lock()
        self._exchanges: queue.SimpleQueue[tuple[Exchange, int, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._header: dict[str, Any] = {}
        self._unsaid = self._unwritten = 0
        self._said_at = -_SAY_DROPS_SECONDS
        self._ended = False
        self.written = self.dropped = 0

    def start(self, handshake: Mapping[str, Any]) -> None:
        """Begin to write, once the policy is loaded; ``handshake`` heads every segment."""
        self._header = {**handshake, "run": secrets.token_hex(8), "started_at": time.time()}
        self._thread.start()

    def __call__(self, exchange: Exchange) -> None:
        """Take note of a request; microseconds, and never raises."""
        if self._ended:
            return
        size = _size(exchange)
        with self._lock:
            full = self._waiting > 0 and self._waiting + size > self._most_waiting
            self._waiting += 0 if full else size
        if full:
            self._drop()
        else:
            self._exchanges.put((exchange, size, self._unwritten))
            self._unwritten = 0

    def close(self, timeout: float = 10.0) -> None:
        """Write what waits, close the segment, say how much was left out."""
        self._ended = True
        if self._thread.is_alive():
            self._exchanges.put(None)
            self._thread.join(timeout)
        if self.dropped:
            logger.warning(
                "the recording holds %d requests and leaves out %d that came faster than the "
                "disk or the processor took them",
                self.written,
                self.dropped,
            )

    def _drop(self) -> None:
        self.dropped += 1
        self._unwritten += 1
        self._unsaid += 1
        now = time.monotonic()
        if now - self._said_at >= _SAY_DROPS_SECONDS:
            logger.warning("recording fell behind: %d requests left out", self._unsaid)
            self._unsaid, self._said_at = 0, now

    def _write_all(self) -> None:
        try:
            while (waiting := self._exchanges.get()) is not None:
                exchange, size, dropped_before = waiting
                self._write(exchange, dropped_before)
                with self._lock:
                    self._waiting -= size
                del exchange, waiting  # hold no images while nothing comes
            self._writer.close()
        except OSError as error:
            self._ended = True
            logger.warning("recording ended after %d requests: %s", self.written, error)

    def _write(self, exchange: Exchange, dropped_before: int) -> None:
        try:
            parts = pack_in_parts(_recorded(exchange, dropped_before).to_wire())
        except ReflexarcError as error:
            logger.warning("a request was not recorded: %s", error.message)
            return
        if self._writer.write(parts, self._header):
            self.written += 1
        else:
            logger.warning("a request of %d bytes is above the limit", size_of(parts))
            self.dropped += 1


def _recorded(exchange: Exchange, dropped_before: int) -> RecordedExchange:
    chunk, error = exchange.chunk, exchange.error
    return RecordedExchange(
        received_at=exchange.received_at,
        dialect=exchange.dialect,
        session=exchange.session,
        observation=exchange.observation,
        actions=None if chunk is None else chunk.actions,
        error=None if error is None else error.to_wire(),
        timing=exchange.timing,
        dropped_before=dropped_before,
    )


def _size(exchange: Exchange) -> int:
    """Bytes of the images, which are all that counts."""
    seen = exchange.observation
    if seen is None:
        return 1024
    maps = [seen.images, seen.goal_image, *(row.images for row in seen.history)]
    return 1024 + sum(image.nbytes for m in maps if m for image in m.values())


class _Writer:
    """Segments in a directory, the oldest dropped when the limit is reached. One thread's."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        self._segment: SegmentWriter | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / f".writable.{secrets.token_hex(4)}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"--record {directory}: {error}", field="record") from error
        self._sizes = {path: path.stat().st_size for path in segments(directory)}
        self._next = 1 + max((int(path.stem) for path in self._sizes), default=0)
        for path in self._sizes:
            if not index_path(path).exists():  # its writer was killed
                _index(path)

    def write(self, parts: Sequence[Buffer], header: Mapping[str, Any]) -> bool:
        """Append a frame; False where it is above the limit by itself. Raises OSError."""
        size = size_of(parts)
        if self._segment is not None and self._segment.bytes + size > self._limit // SEGMENTS:
            self.close()
        if self._segment is None:
            path = self._directory / f"{self._next:06d}.frames"
            self._next += 1
            self._segment = SegmentWriter(path, header)
        if not self._make_room(self._segment.bytes + size):
            return False
        self._segment.write(parts)
        return True

    def _make_room(self, needed: int) -> bool:
        while self._sizes and sum(self._sizes.values()) + needed > self._limit:
            oldest = next(iter(self._sizes))
            index_path(oldest).unlink(missing_ok=True)
            oldest.unlink(missing_ok=True)
            del self._sizes[oldest]
        return needed <= self._limit

    def close(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()
            self._sizes[segment.path] = segment.bytes


def _index(segment: Path) -> None:
    try:
        write_index(segment, scan_offsets(segment))
    except (OSError, ReflexarcError) as error:
        logger.warning("%s was left as it is: %s", segment, error)

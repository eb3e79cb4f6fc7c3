"""Finished requests on disk: what ``serve-policy --record`` writes and ``query --replay`` reads.

A recording is a directory of segments, ``000001.frames``, ``000002.frames``, ... A segment is
eight bytes of magic, then frames: length and CRC-32 (four bytes each, big-endian), then one message
of the codec. Its first frame is the header, the server's handshake with ``started_at`` and ``run``;
each other is one :class:`RecordedExchange`. A frame is written at once, so a process that is killed
leaves a segment that is whole up to its last complete frame.

``000001.index`` holds the offsets of a closed segment's frames. It is only a shortcut: where it is
missing or does not fit, offsets are found by walking the segment.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from reflexarc.contract.codec import MAX_FRAME_BYTES, pack, unpack
from reflexarc.contract.errors import CodecError
from reflexarc.contract.messages import Observation

MAGIC = b"RXFRAME1"
MAX_RECORD_BYTES = 4 * MAX_FRAME_BYTES  # images that came compressed are recorded decoded
_FRAME = struct.Struct(">II")
_LARGE_BYTES = 4096
_PARTS_AT_ONCE = 512  # IOV_MAX is 1024 on Linux and macOS
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class RecordedExchange:
    """One finished request.

    Attributes:
        received_at: seconds since the epoch.
        dialect: protocol of the request.
        session: of the episode; None without one.
        observation: as the policy saw it, images decoded and with its seed; None where the request
            could not be read or violated the contract.
        actions: ``float32 (horizon, dimension)``, or None where ``error`` says what was wrong.
        error: ``{"code", "message", "field"}``.
        timing: milliseconds by name, and ``batch_size``.
        dropped_before: requests since the one before that the recorder had no time for.
    """

    received_at: float
    dialect: str
    session: str | None = None
    observation: Observation | None = None
    actions: npt.NDArray[np.float32] | None = None
    error: Mapping[str, Any] | None = None
    timing: Mapping[str, float] = field(default_factory=dict)
    dropped_before: int = 0

    def to_wire(self) -> dict[str, Any]:
        observation = self.observation
        return {
            "received_at": self.received_at,
            "dialect": self.dialect,
            "session": self.session,
            "observation": None if observation is None else observation.to_wire(),
            "actions": self.actions,
            "error": self.error,
            "timing": dict(self.timing),
            "dropped_before": self.dropped_before,
        }

    @classmethod
    def from_wire(cls, message: object) -> RecordedExchange:
        """Build from a decoded map; raises CodecError."""
        if not isinstance(message, Mapping):
            raise CodecError(f"a recorded request must be a map, got {type(message).__name__}")
        seen, actions = message.get("observation"), message.get("actions")
        if actions is not None and (not isinstance(actions, np.ndarray) or actions.ndim != 2):
            raise CodecError("recorded actions must be an array of two dimensions", field="actions")
        try:
            return cls(
                received_at=float(message["received_at"]),
                dialect=str(message["dialect"]),
                session=message.get("session"),
                observation=None if seen is None else Observation.from_wire(seen),
                actions=actions,
                error=message.get("error"),
                timing=dict(message.get("timing") or {}),
                dropped_before=int(message.get("dropped_before") or 0),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CodecError(f"a recorded request cannot be read: {error!r}") from error


def pack_in_parts(message: Mapping[str, Any]) -> list[Buffer]:
    """What ``pack`` gives, as pieces of which the large ones are the arrays themselves.

    Who writes them down copies nothing, and holds up no other thread for long.
    """
    parts: list[Buffer] = []
    small = bytearray()

    def put(value: Any) -> None:
        nonlocal small
        if isinstance(value, np.ndarray) and value.nbytes >= _LARGE_BYTES:
            small += b"\x84" + pack(b"__ndarray__") + pack(True) + pack(b"data")
            small += b"\xc6" + value.nbytes.to_bytes(4, "big")
            parts.extend((small, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data))
            small = bytearray()
            small += pack(b"dtype") + pack(value.dtype.str)
            small += pack(b"shape") + pack(list(value.shape))
        elif isinstance(value, Mapping):
            small += b"\xdf" + len(value).to_bytes(4, "big")
            for key, item in value.items():
                small += pack(key)
                put(item)
        elif isinstance(value, list):
            small += b"\xdd" + len(value).to_bytes(4, "big")
            for item in value:
                put(item)
        else:
            small += pack(value)

    put(message)
    return [*parts, small]


def size_of(parts: Sequence[Buffer]) -> int:
    """Bytes of a message in parts."""
    return sum(map(len, parts))


class SegmentWriter:
    """One segment being written. A new file; an existing one is never opened for writing.

    Attributes:
        bytes: written so far.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.bytes = path, 0
        self._offsets: list[int] = []
        # Unbuffered: what was written is the kernel's, whatever becomes of this process.
        self._file: BinaryIO = path.open("xb", buffering=0)
        self._put([MAGIC])
        self.write([pack(dict(header))])

    def write(self, parts: Sequence[Buffer]) -> None:
        """Append one frame, of :func:`pack_in_parts`. Raises OSError."""
        self._offsets.append(self.bytes)
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        self._put([_FRAME.pack(size_of(parts), checksum), *parts])

    def _put(self, parts: Sequence[Buffer]) -> None:
        left = [memoryview(part) for part in parts]
        while left:  # an unbuffered file may take less than it is given
            if hasattr(os, "writev"):
                written = os.writev(self._file.fileno(), left[:_PARTS_AT_ONCE])
            else:  # Windows
                written = self._file.write(left[0])
            self.bytes += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if left:
                left[0] = left[0][written:]

    def close(self) -> None:
        """Close the segment and write its index."""
        self._file.close()
        write_index(self.path, self._offsets)


def segments(directory: Path) -> list[Path]:
    """The segments of a recording, oldest first."""
    return sorted(
        (path for path in directory.glob("*.frames") if path.stem.isdigit()),
        key=lambda path: int(path.stem),
    )


def index_path(segment: Path) -> Path:
    return segment.with_suffix(".index")


def write_index(segment: Path, offsets: list[int]) -> None:
    """Write the offsets of a closed segment beside it."""
    content = {
        "version": 1,
        "segment_bytes": segment.stat().st_size,
        "offsets": np.array(offsets, "<u8").tobytes(),
    }
    temporary = segment.with_name(f".{segment.stem}.index.{os.getpid()}.tmp")
    temporary.write_bytes(pack(content))
    temporary.replace(index_path(segment))


def frame_offsets(segment: Path) -> list[int]:
    """Where the whole frames of a segment begin, header first; from its index or by walking."""
    return _indexed_offsets(segment) or scan_offsets(segment)


def _indexed_offsets(segment: Path) -> list[int]:
    try:
        content = unpack(index_path(segment).read_bytes(), max_bytes=MAX_RECORD_BYTES)
        if content["version"] == 1 and content["segment_bytes"] == segment.stat().st_size:
            return [int(offset) for offset in np.frombuffer(content["offsets"], "<u8")]
    except (OSError, CodecError, KeyError, TypeError, ValueError):
        pass  # an index is only a shortcut
    return []


def scan_offsets(segment: Path) -> list[int]:
    """Walk a segment; stops before a frame that is not whole. Raises CodecError: no segment."""
    offsets: list[int] = []
    with segment.open("rb") as file:
        _check_magic(segment, file)
        while True:
            offset = file.tell()
            if _read_frame(file) is None:
                return offsets
            offsets.append(offset)


def _check_magic(segment: Path, file: BinaryIO) -> None:
    if file.read(len(MAGIC)) != MAGIC:
        raise CodecError(f"{segment} is no segment of a recording")


def _read_frame(file: BinaryIO) -> bytes | None:
    """The payload of the frame at the file's position; None where none is whole."""
    head = file.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    length, checksum = _FRAME.unpack(head)
    if length > MAX_RECORD_BYTES:
        return None
    payload = file.read(length)
    return payload if len(payload) == length and zlib.crc32(payload) == checksum else None


class RecordedSegment:
    """A segment to read.

    Attributes:
        header: the server's handshake when it was written.
        torn: whether bytes of a frame that is not whole follow the last one.

    Raises CodecError: the file is no segment, or its header is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = frame_offsets(path)
        if not self._offsets:
            raise CodecError(f"{path} holds no whole frame")
        header, end = self._message(self._offsets[0])
        if not isinstance(header, Mapping) or "contract" not in header:
            raise CodecError(f"{path} has no header")
        self.header: Mapping[str, Any] = header
        if len(self) > 0:
            _, end = self._message(self._offsets[-1])
        self.torn = end != path.stat().st_size

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[RecordedExchange]:
        for offset in self._offsets[1:]:
            yield RecordedExchange.from_wire(self._message(offset)[0])

    def _message(self, offset: int) -> tuple[Any, int]:
        """The message at an offset, and where it ends."""
        with self.path.open("rb") as file:
            file.seek(offset)
            payload = _read_frame(file)
            end = file.tell()
        if payload is None:
            raise CodecError(f"{self.path}: the frame at byte {offset} is damaged")
        return unpack(payload, max_bytes=MAX_RECORD_BYTES), end

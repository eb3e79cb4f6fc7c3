"""Video files by path: open decoders, what headers say, and whether a file is whole.

Decoders stay open and where they stopped, a few a process (h264, AV1 and whatever ffmpeg reads).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import av
import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.data.lerobot.video_decoder import (
    AV_ERRORS,
    TOLERANCE,
    VideoDecoder,
    broken_video,
)

__all__ = ["DECODERS", "TOLERANCE", "DecoderCache", "VideoFacts", "check_whole", "video_facts"]

_OPEN_DECODERS = 8


@dataclass(frozen=True)
class VideoFacts:
    """What a file says of itself. ``frames`` is 0 where the container does not count them."""

    codec: str
    height: int
    width: int
    frames: int
    seconds: float


class DecoderCache:
    """The decoders that were used last. A forked worker opens its own."""

    def __init__(self, kept: int = _OPEN_DECODERS) -> None:
        self._kept = kept
        self._decoders: OrderedDict[Path, VideoDecoder] = OrderedDict()
        self._abandoned: list[OrderedDict[Path, VideoDecoder]] = []
        self._process = os.getpid()
        self._lock = Lock()

    def frames(
        self, path: Path, times: Sequence[float], tolerance: float = TOLERANCE
    ) -> npt.NDArray[np.uint8]:
        """See :meth:`VideoDecoder.frames`. Threads take turns at a file."""
        if self._process != os.getpid():
            # Freeing the parent's would wait for its threads, which a fork does not copy.
            self._abandoned.append(self._decoders)
            self._decoders, self._lock, self._process = OrderedDict(), Lock(), os.getpid()
        with self._lock:
            decoder = self._decoders.pop(path, None) or VideoDecoder(path)
            self._decoders[path] = decoder
            while len(self._decoders) > self._kept:
                # Closed when the last thread that reads from it lets go.
                self._decoders.popitem(last=False)
        return decoder.frames(times, tolerance)


DECODERS = DecoderCache()
"""Of this process."""


def video_facts(path: Path) -> VideoFacts:
    """Codec, size and length of a file, from its headers."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
            context = stream.codec_context
            return VideoFacts(
                # The name of the format, not of the library that decodes it.
                codec=av.codec.Codec(context.name, "r").canonical_name,
                height=context.height,
                width=context.width,
                frames=int(stream.frames),
                seconds=seconds,
            )
    except (*AV_ERRORS, IndexError) as error:
        raise broken_video(path, error) from error


def check_whole(path: Path, until: float, tolerance: float = TOLERANCE) -> None:
    """Read a file's headers and its last packets; decodes nothing.

    Args:
        until: seconds at which the last frame that is needed stands.

    Raises DatasetError for a file that does not open, ends before ``until``, or whose headers
    promise frames that are cut off.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            first = stream.start_time or 0
            container.seek(first + round(until / stream.time_base), stream=stream, backward=True)
            last = -1.0
            for packet in container.demux(stream):
                if packet.pts is None:
                    continue
                if packet.is_corrupt:
                    raise DatasetError(f"{path} is cut short within its last frames; copy it again")
                last = max(last, float((packet.pts - first) * stream.time_base))
    except (*AV_ERRORS, IndexError) as error:
        raise broken_video(path, error) from error
    if last < until - tolerance:
        raise DatasetError(
            f"{path} ends at {max(last, 0.0):.3f} s, its last frame should stand at {until:.3f} s; "
            "it is cut short: copy it again"
        )

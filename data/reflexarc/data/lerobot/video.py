"""Frames of video files by their time, decoded with PyAV (h264, AV1 and whatever ffmpeg reads).

Decoders stay open and where they stopped, a few a process: the next frame costs one decoding
step, and a frame elsewhere a seek to the keyframe before it.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from reflexarc.contract.errors import DatasetError

TOLERANCE = 1e-3
"""Seconds that a frame may lie from the time asked for. Containers round to 1 ms at most."""

_OPEN_DECODERS, _KEPT_FRAMES = 8, 8
_UNKNOWN_GROUP = 10.0
"""Seconds between keyframes that are assumed until two of them in a row were seen."""

_AV_ERRORS = (av.error.FFmpegError, OSError, ValueError, EOFError)


@dataclass(frozen=True)
class VideoFacts:
    """What a file says of itself. ``frames`` is 0 where the container does not count them."""

    codec: str
    height: int
    width: int
    frames: int
    seconds: float


class VideoDecoder:
    """One open file. Not safe to share between threads or processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (*_AV_ERRORS, IndexError) as error:
            raise _broken(path, error) from error
        self._stream.codec_context.thread_count = 1  # workers share the cores
        self._time_base = float(self._stream.time_base)
        self._first = (self._stream.start_time or 0) * self._time_base
        self._frames: Any = iter(())
        # One for all frames: a frame's own ``to_ndarray`` sets up the conversion anew each time.
        self._reformatter = VideoReformatter()
        self._recent: deque[tuple[float, Any]] = deque(maxlen=_KEPT_FRAMES)
        self._keyframe: float | None = None
        self._group = _UNKNOWN_GROUP
        self._at = float("inf")

    def close(self) -> None:
        self._container.close()

    def frames(self, times: Sequence[float], tolerance: float = TOLERANCE) -> npt.NDArray[np.uint8]:
        """``uint8 (n, H, W, 3)`` RGB at ``times`` in seconds, in their order.

        Raises DatasetError naming the file and the time for which no frame is near enough.
        """
        found: dict[float, npt.NDArray[np.uint8]] = {}
        for time in sorted(set(times)):
            try:
                frame = self._near(time, tolerance)
                colours = self._reformatter.reformat(frame, format="rgb24")
                found[time] = np.asarray(colours.to_ndarray(), dtype=np.uint8)
            except _AV_ERRORS as error:
                self._at = float("inf")
                raise _broken(self.path, error, f"at {time:.3f} s ") from error
        return np.stack([found[time] for time in times])

    def _near(self, time: float, tolerance: float) -> Any:
        kept = self._kept(time, tolerance)
        if kept is not None:
            return kept
        # A seek leads to the keyframe before: within a group, going on is never dearer.
        if not self._at < time + tolerance <= self._at + self._group + tolerance:
            self._seek(time)
        nearest = self._at
        for frame in self._frames:
            at = frame.pts * self._time_base - self._first
            if frame.key_frame:
                if self._keyframe is not None:
                    self._group = at - self._keyframe
                self._keyframe = at
            self._at = at
            self._recent.append((at, frame))
            if abs(at - time) < abs(nearest - time):
                nearest = at
            if at >= time - tolerance:
                break
        else:
            self._at = float("inf")
        kept = self._kept(time, tolerance)
        if kept is None:
            where = f"the nearest is at {nearest:.4f} s" if np.isfinite(nearest) else "it has none"
            raise DatasetError(
                f"{self.path} has no frame within {tolerance * 1000:g} ms of {time:.4f} s: {where};"
                " the video is cut short, or its frames are not at the timestamps of the data"
            )
        return kept

    def _kept(self, time: float, tolerance: float) -> Any:
        best = min(self._recent, key=lambda item: abs(item[0] - time), default=None)
        return best[1] if best is not None and abs(best[0] - time) <= tolerance else None

    def _seek(self, time: float) -> None:
        self._recent.clear()
        self._keyframe = None
        offset = max(0, round((time + self._first) / self._time_base))
        self._container.seek(offset, stream=self._stream, backward=True, any_frame=False)
        self._frames = self._container.decode(self._stream)
        self._at = float("inf")


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
        """See :meth:`VideoDecoder.frames`. Threads take turns."""
        if self._process != os.getpid():
            # Freeing the parent's would wait for its threads, which a fork does not copy.
            self._abandoned.append(self._decoders)
            self._decoders, self._lock, self._process = OrderedDict(), Lock(), os.getpid()
        with self._lock:
            decoder = self._decoders.pop(path, None) or VideoDecoder(path)
            self._decoders[path] = decoder
            while len(self._decoders) > self._kept:
                self._decoders.popitem(last=False)[1].close()
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
    except (*_AV_ERRORS, IndexError) as error:
        raise _broken(path, error) from error


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
    except (*_AV_ERRORS, IndexError) as error:
        raise _broken(path, error) from error
    if last < until - tolerance:
        raise DatasetError(
            f"{path} ends at {max(last, 0.0):.3f} s, its last frame should stand at {until:.3f} s; "
            "it is cut short: copy it again"
        )


def _broken(path: Path, error: BaseException, where: str = "") -> DatasetError:
    return DatasetError(
        f"{path} cannot be decoded {where}({error}); it is truncated, still being written or of "
        "another format: copy it again"
    )

"""Frames of one video file by their time, with as few decoding steps as the file allows.

Packets are cheap to read and dear to decode: those that no wanted frame needs are read and dropped.
A frame elsewhere costs a seek to the keyframe before it and the frames that it refers to; then the
decoder is drained, which gives the frame at once, where a decoder that may reorder frames would
first ask for the next ones. Who reads one frame after another is decoded without a break.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.data.lerobot.wanted_frames import Colours, WantedFrames
from reflexarc.data.presence import is_forbidden, not_allowed

TOLERANCE = 1e-3
"""Seconds that a frame may lie from the time asked for. Containers round to 1 ms at most."""

AV_ERRORS = (av.error.FFmpegError, OSError, ValueError, EOFError)

_KEPT_FRAMES = 8
_UNKNOWN_GROUP = 10.0
"""Seconds between keyframes that are assumed until two of them in a row were seen."""
_SOON = 1.0
"""Who asks for a frame at most so many seconds after the last one probably goes on so."""
_BELOW_HALF = 0.499
_SKIP_BY_PACKET = ("h264", "hevc")
"""Decoders that can be told with every packet to skip it if no other frame refers to it."""


class VideoDecoder:
    """One open file. Threads take turns; not to be used in a forked process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (*AV_ERRORS, IndexError) as error:
            raise broken_video(path, error) from error
        self._decoder: Any = self._stream.codec_context
        self._decoder.thread_count = 1  # workers share the cores
        self._skips = self._decoder.name in _SKIP_BY_PACKET
        self._time_base = float(self._stream.time_base)
        self._first = (self._stream.start_time or 0) * self._time_base
        self._period = 1.0 / float(self._stream.average_rate or 1e-3)
        self._colours = Colours()
        self._fed, self._begin = False, 0.0  # whether, and from what time on, it has decoded
        self._recent: deque[tuple[float, Any]] = deque(maxlen=_KEPT_FRAMES)
        self._packets: Iterator[Any] = iter(())
        self._at: float | None = None  # time of the last packet decoded, None: must seek
        self._asked = float("inf")  # last time asked for
        self._inside: set[float] = set()  # times of what the decoder holds back
        self._keyframe: float | None = None
        self._group = _UNKNOWN_GROUP
        self._lock = Lock()

    def close(self) -> None:
        with self._lock:
            self._container.close()

    def frames(self, times: Sequence[float], tolerance: float = TOLERANCE) -> npt.NDArray[np.uint8]:
        """``uint8 (n, H, W, 3)`` RGB of the frames nearest to ``times`` in seconds, in their order.

        Raises DatasetError naming the file and the time for which no frame is near enough.
        """
        with self._lock:
            # Within half a period only one frame can be near; a wider search would take the first.
            narrow = min(tolerance, _BELOW_HALF * self._period)
            try:
                return self._read(times, narrow)
            except DatasetError:
                if narrow == tolerance:
                    raise
                return self._read(times, tolerance)

    def _read(self, times: Sequence[float], tolerance: float) -> npt.NDArray[np.uint8]:
        wanted = WantedFrames(times, tolerance, self._colours)
        try:
            for at, frame in tuple(self._recent):
                wanted.place(at, frame)
            wanted.decoded.update(wanted.placed)
            for at in self._inside:
                wanted.note_decoded(at)
            if wanted.held_back:
                self._output(wanted, drain=False)
            while (time := wanted.next()) is not None:
                goes_on = self._asked < time <= self._asked + min(_SOON, self._group)
                if not self._reaches(time, tolerance):
                    self._seek(time, tolerance)
                self._asked = self._decode(wanted, tolerance)
                elsewhere = wanted.next() is not None
                self._output(wanted, drain=elsewhere or not goes_on)
        except BaseException as error:
            self._at = None
            if isinstance(error, AV_ERRORS):
                raise broken_video(self.path, error, f"near {times[0]:.3f} s ") from error
            raise
        return wanted.images()

    def _reaches(self, time: float, tolerance: float) -> bool:
        """Whether reading on leads to ``time`` and is no dearer than a seek."""
        return self._at is not None and self._at + tolerance < time <= self._at + self._group

    def _seek(self, time: float, tolerance: float) -> None:
        """Go to the last keyframe that is shown at ``time`` or before."""
        self._recent.clear()
        self._inside.clear()
        self._fed = False
        self._keyframe = self._at = None
        offset = max(0, round((time + self._first) / self._time_base))
        before: int | None = None
        while True:
            self._container.seek(offset, stream=self._stream, backward=True, any_frame=False)
            packets = self._container.demux(self._stream)
            packet = next(packets, None)
            self._packets = packets if packet is None else chain([packet], packets)
            at = None if packet is None or not packet.size else self._time(packet)
            if packet is None or at is None or at <= time + tolerance or packet.dts is None:
                return
            # Frames shown before a keyframe may stand after it and refer to the group before.
            if before is not None and packet.dts >= before:
                return
            offset, before = packet.dts - 1, packet.dts

    def _decode(self, wanted: WantedFrames, tolerance: float) -> float:
        """Decode what wanted frames need, until all are decoded or the next asks for a seek.

        Returns the last time whose frame was decoded.
        """
        done = float("inf")
        pending: list[tuple[float, Any]] = []
        nearest = float("inf")
        while (time := wanted.next()) is not None:
            if self._at is not None and time > self._at + self._group + tolerance and not pending:
                break
            packet = next(self._packets, None)
            if packet is None or not packet.size:  # the end
                raise self._no_frame(time, nearest, tolerance)
            at = self._time(packet)
            if at is None:  # of a container that does not say: decode and see
                at = nearest = time
            if packet.is_keyframe:
                self._note_keyframe(at)
                if at <= time + tolerance and pending:
                    pending.clear()  # nothing wanted lies before this frame
                    self._drain(wanted)
            pending.append((at, packet))
            nearest = min(nearest, at, key=lambda known: abs(known - time))
            if abs(at - time) <= tolerance:
                self._feed(pending, time, wanted)
                pending.clear()
                done, nearest = time, float("inf")
            elif packet.dts is not None and self._seconds(packet.dts) > time + tolerance:
                raise self._no_frame(time, nearest, tolerance)
        return done

    def _feed(self, packets: list[tuple[float, Any]], until: float, wanted: WantedFrames) -> None:
        """Decode packets; those shown before ``until`` that nothing refers to, if wanted."""
        for at, packet in packets:
            if not self._fed:
                self._begin = at
            elif at < self._begin:
                continue  # it refers to the group before, which was left out
            self._fed = True
            if not wanted.note_decoded(at) and at < until and self._skips:
                self._decoder.skip_frame = "NONREF"
                self._keep(self._decoder.decode(packet), wanted)
                self._decoder.skip_frame = "DEFAULT"
            else:
                self._inside.add(at)
                self._keep(self._decoder.decode(packet), wanted)
            self._at = at if self._at is None else max(self._at, at)

    def _output(self, wanted: WantedFrames, *, drain: bool) -> None:
        """Get the frames that were decoded and that the decoder still holds back."""
        while not drain and wanted.held_back:
            packet = next(self._packets, None)
            if packet is None or not packet.size:
                break
            at = self._time(packet)
            if at is not None and packet.is_keyframe:
                self._note_keyframe(at)
            self._feed([(self._begin if at is None else at, packet)], 0.0, wanted)
        if wanted.held_back or drain:
            self._drain(wanted)
            self._at = None
        if wanted.held_back:
            time = min(wanted.held_back)
            raise DatasetError(
                f"{self.path}: the frame at {time:.4f} s cannot be decoded; the file is damaged: "
                "copy it again"
            )

    def _drain(self, wanted: WantedFrames) -> None:
        if not self._fed:
            return
        self._fed = False
        self._keep(self._decoder.decode(None), wanted)
        self._inside.clear()
        self._decoder.flush_buffers()

    def _keep(self, frames: Sequence[Any], wanted: WantedFrames) -> None:
        for frame in frames:
            at = self._time(frame)
            if at is not None:
                self._inside.discard(at)
                self._recent.append((at, frame))
                wanted.place(at, frame)

    def _note_keyframe(self, at: float) -> None:
        if self._keyframe is not None and at > self._keyframe:
            self._group = at - self._keyframe
        self._keyframe = at

    def _time(self, item: Any) -> float | None:
        """Seconds since the beginning of a packet or a frame."""
        stamp = item.dts if item.pts is None else item.pts
        return None if stamp is None else self._seconds(stamp)

    def _seconds(self, stamp: int) -> float:
        return stamp * self._time_base - self._first

    def _no_frame(self, time: float, nearest: float, tolerance: float) -> DatasetError:
        where = f"the nearest is at {nearest:.4f} s" if np.isfinite(nearest) else "it has none"
        return DatasetError(
            f"{self.path} has no frame within {tolerance * 1000:g} ms of {time:.4f} s: {where};"
            " the video is cut short, or its frames are not at the timestamps of the data"
        )


def broken_video(path: Path, error: BaseException, where: str = "") -> DatasetError:
    """The error for a file that cannot be read as a video."""
    if is_forbidden(error):
        return not_allowed(path, error)
    return DatasetError(
        f"{path} cannot be decoded {where}({error}); it is truncated, still being written or of "
        "another format: copy it again"
    )

"""Frames of one video file by their time, with as few decoding steps as the file allows.

Packets are cheap to read and dear to decode: those that no wanted frame needs are read and dropped.
A frame elsewhere costs a seek to the keyframe before it and the frames that it refers to; then the
decoder is drained, which gives the frame at once, where a decoder that may reorder frames would
first ask for the next ones. Who reads one frame after another is decoded without a break.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
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

AV_ERRORS = (av.error.FFmpegError, OSError, ValueError, EOFError)

_KEPT_FRAMES = 8
_UNKNOWN_GROUP = 10.0
"""Seconds between keyframes that are assumed until two of them in a row were seen."""
_SOON = 1.0
"""Who asks for a frame at most so many seconds after the last one probably goes on so."""
_BELOW_HALF = 0.499


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
        self._time_base = float(self._stream.time_base)
        self._first = (self._stream.start_time or 0) * self._time_base
        self._period = 1.0 / float(self._stream.average_rate or 1e-3)
        self._colours = _Colours()
        self._fed = False
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
        wanted = _Wanted(times, tolerance, self._colours)
        try:
            for at, frame in tuple(self._recent):
                wanted.place(at, frame)
            wanted.decoded.update(wanted.placed)
            for at in self._inside:
                wanted.note_decoded(at)
            if wanted.held_back:
                self._output(wanted, drain=False)
            while (time := wanted.next()) is not None:
                goes_on = self._asked < time <= self._asked + _SOON
                if not self._reaches(time, tolerance):
                    self._seek(time)
                self._asked = self._decode(wanted, tolerance)
                self._output(wanted, drain=not goes_on)
        except BaseException as error:
            self._at = None
            if isinstance(error, AV_ERRORS):
                raise broken_video(self.path, error, f"near {times[0]:.3f} s ") from error
            raise
        return wanted.images()

    def _reaches(self, time: float, tolerance: float) -> bool:
        """Whether reading on leads to ``time`` and is no dearer than a seek."""
        return self._at is not None and self._at + tolerance < time <= self._at + self._group

    def _seek(self, time: float) -> None:
        self._recent.clear()
        self._inside.clear()
        self._fed = False
        self._keyframe = self._at = None
        offset = max(0, round((time + self._first) / self._time_base))
        self._container.seek(offset, stream=self._stream, backward=True, any_frame=False)
        self._packets = self._container.demux(self._stream)

    def _decode(self, wanted: _Wanted, tolerance: float) -> float:
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
                self._feed(pending, wanted)
                pending.clear()
                done, nearest = time, float("inf")
            elif packet.dts is not None and self._seconds(packet.dts) > time + tolerance:
                raise self._no_frame(time, nearest, tolerance)
        return done

    def _feed(self, packets: list[tuple[float, Any]], wanted: _Wanted) -> None:
        """Decode packets; those that nothing refers to only if they are wanted."""
        for at, packet in packets:
            is_wanted = wanted.note_decoded(at)
            self._decoder.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            if is_wanted:
                self._inside.add(at)
            self._fed = True
            self._keep(self._decoder.decode(packet), wanted)
        self._at = max(at for at, _ in packets)

    def _output(self, wanted: _Wanted, *, drain: bool) -> None:
        """Get the frames that were decoded and that the decoder still holds back."""
        while not drain and wanted.held_back:
            packet = next(self._packets, None)
            if packet is None or not packet.size:
                break
            at = self._time(packet)
            if at is not None:
                self._inside.add(at)
                self._at = at if self._at is None else max(self._at, at)
                if packet.is_keyframe:
                    self._note_keyframe(at)
            self._decoder.skip_frame = "DEFAULT"
            self._fed = True
            self._keep(self._decoder.decode(packet), wanted)
        if wanted.held_back or drain:
            self._drain(wanted)
            self._at = None
        if wanted.held_back:
            time = min(wanted.held_back)
            raise DatasetError(
                f"{self.path}: the frame at {time:.4f} s cannot be decoded; the file is damaged: "
                "copy it again"
            )

    def _drain(self, wanted: _Wanted) -> None:
        if not self._fed:
            return
        self._fed = False
        self._keep(self._decoder.decode(None), wanted)
        self._inside.clear()
        self._decoder.flush_buffers()

    def _keep(self, frames: Sequence[Any], wanted: _Wanted) -> None:
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


class _Colours:
    """Turns decoded frames into RGB.

    One for all frames of a file: a frame's own ``to_ndarray`` sets up the conversion anew.
    """

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._options: dict[str, Any] = {"format": "rgb24", "threads": 1}

    def of(self, frame: Any) -> npt.NDArray[np.uint8]:
        """``uint8 (H, W, 3)``."""
        try:
            converted = self._reformatter.reformat(frame, **self._options)
        except TypeError:  # an older PyAV, which knows no threads here
            del self._options["threads"]
            converted = self._reformatter.reformat(frame, **self._options)
        return np.asarray(converted.to_ndarray(), dtype=np.uint8)


class _Wanted:
    """The frames of one request.

    Attributes:
        decoded: times whose packet went into the decoder.
        placed: time to how far the frame lies that was put into its rows.
    """

    def __init__(self, times: Sequence[float], tolerance: float, colours: _Colours) -> None:
        self._rows: dict[float, list[int]] = {}
        for row, time in enumerate(times):
            self._rows.setdefault(time, []).append(row)
        self._times = sorted(self._rows)
        self._count, self._tolerance, self._colours = len(times), tolerance, colours
        self._images: npt.NDArray[np.uint8] | None = None
        self._first = 0
        self.decoded: set[float] = set()
        self.placed: dict[float, float] = {}

    @property
    def held_back(self) -> set[float]:
        return self.decoded - self.placed.keys()

    def next(self) -> float | None:
        """The first time whose packet was not decoded yet."""
        while self._first < len(self._times) and self._times[self._first] in self.decoded:
            self._first += 1
        return self._times[self._first] if self._first < len(self._times) else None

    def note_decoded(self, at: float) -> bool:
        """Whether a packet at this time is wanted."""
        near = self._near(at)
        self.decoded.update(near)
        return bool(near)

    def place(self, at: float, frame: Any) -> None:
        """Convert a frame into its rows, if it is the nearest so far."""
        for time in self._near(at):
            distance = abs(at - time)
            if distance < self.placed.get(time, float("inf")):
                self._put(self._rows[time], self._colours.of(frame))
                self.placed[time] = distance

    def images(self) -> npt.NDArray[np.uint8]:
        assert self._images is not None
        return self._images

    def _put(self, rows: list[int], image: npt.NDArray[np.uint8]) -> None:
        if self._images is None:
            self._images = np.empty((self._count, *image.shape), dtype=np.uint8)
        for row in rows:
            self._images[row] = image  # ValueError where a file changes its size

    def _near(self, at: float) -> list[float]:
        start = bisect_left(self._times, at - self._tolerance)
        found = []
        for time in self._times[start:]:
            if time > at + self._tolerance:
                break
            found.append(time)
        return found


def broken_video(path: Path, error: BaseException, where: str = "") -> DatasetError:
    """The error for a file that cannot be read as a video."""
    return DatasetError(
        f"{path} cannot be decoded {where}({error}); it is truncated, still being written or of "
        "another format: copy it again"
    )

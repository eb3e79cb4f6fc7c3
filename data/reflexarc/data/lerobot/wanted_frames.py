"""The frames that one request asks a video file for, converted as they are decoded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter


class Colours:
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


class WantedFrames:
    """The frames of one request.

    Attributes:
        decoded: times whose packet went into the decoder.
        placed: time to how far the frame lies that was put into its rows.
    """

    def __init__(self, times: Sequence[float], tolerance: float, colours: Colours) -> None:
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

"""Write frames as a video file, and say how far the file's frames lie from them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import ConfigError

CodecName = Literal["h264", "av1", "lossless"]
_GROUP = 2
"""Frames from keyframe to keyframe, LeRobot's own choice: a frame costs two decoding steps."""


@dataclass(frozen=True)
class Codec:
    """How videos are compressed.

    Attributes:
        quality: constant rate factor, less is better; ``None`` for the codec's default here.
    """

    name: CodecName = "h264"
    quality: int | None = None

    @property
    def encoder(self) -> str:
        return _ENCODERS[self.name].name

    @property
    def pixel_format(self) -> str:
        return _ENCODERS[self.name].pixel_format

    @property
    def options(self) -> dict[str, str]:
        """Of the encoder."""
        known = _ENCODERS[self.name]
        quality = known.quality if self.quality is None else self.quality
        if self.name == "lossless" and quality != 0:
            raise ConfigError(f"a lossless video has quality 0, not {quality}", field="quality")
        if not 0 <= quality <= known.worst:
            raise ConfigError(
                f"quality of {self.name} must lie in 0..{known.worst}, got {quality}",
                field="quality",
            )
        return {**known.options, "crf": str(quality), "g": str(_GROUP)}


@dataclass(frozen=True)
class _Encoder:
    name: str
    pixel_format: str
    quality: int
    worst: int
    options: dict[str, str]


_ENCODERS = {
    "h264": _Encoder("libx264", "yuv420p", 18, 51, {"preset": "medium"}),
    "av1": _Encoder("libsvtav1", "yuv420p", 24, 63, {"preset": "8", "svtav1-params": "lp=2"}),
    "lossless": _Encoder("libx264rgb", "rgb24", 0, 51, {"preset": "medium"}),
}


class VideoWriter:
    """Frames of one size at a constant rate, one after another."""

    def __init__(self, container: Any, codec: Codec, fps: float, size: tuple[int, int]) -> None:
        self._container = container
        self._rate = Fraction(fps).limit_denominator(1001)
        self._stream = container.add_stream(codec.encoder, rate=self._rate, options=codec.options)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = codec.pixel_format
        self._stream.time_base = 1 / self._rate
        self.count = 0

    @property
    def seconds(self) -> float:
        """Where the next frame will stand."""
        return float(self.count / self._rate)

    def add(self, image: npt.NDArray[np.uint8]) -> None:
        """Append one ``(H, W, 3)`` RGB image."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = self.count, 1 / self._rate
        self.count += 1
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))


@contextmanager
def video_writer(
    path: Path, codec: Codec, fps: float, size: tuple[int, int]
) -> Iterator[VideoWriter]:
    """A writer to ``path``, whose folder is made; the file is whole when the block ends."""
    if codec.pixel_format == "yuv420p" and (size[0] % 2 or size[1] % 2):
        raise ConfigError(
            f"codec {codec.name!r} needs even sides, images are {size[0]}x{size[1]}; choose "
            "lossless",
            field="codec",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SVT_LOG", "1")  # AV1's encoder: errors only
    try:
        av.codec.Codec(codec.encoder, "w")
    except (ValueError, av.error.FFmpegError) as error:
        raise ConfigError(
            f"this PyAV was built without {codec.encoder}, which codec {codec.name!r} needs; "
            f"choose another of {', '.join(_ENCODERS)}",
            field="codec",
        ) from error
    with av.open(str(path), "w", format="mp4") as container:
        writer = VideoWriter(container, codec, fps, size)
        yield writer
        writer.finish()


@dataclass
class ImageError:
    """Difference between images and what a codec made of them, in levels of 0 to 255.

    ``mean`` is of absolute differences over all values; ``largest_mean`` that of the worst image.
    """

    images: int = 0
    total: float = 0.0
    largest_mean: float = 0.0
    largest: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.images if self.images else 0.0

    def add(self, original: npt.NDArray[np.uint8], decoded: npt.NDArray[np.uint8]) -> None:
        """Count one image ``(H, W, 3)``."""
        difference = np.abs(original.astype(np.int16) - decoded)
        mean = float(difference.mean())
        self.images += 1
        self.total += mean
        self.largest_mean = max(self.largest_mean, mean)
        self.largest = max(self.largest, int(difference.max()))

    def merge(self, other: ImageError) -> None:
        self.images += other.images
        self.total += other.total
        self.largest_mean = max(self.largest_mean, other.largest_mean)
        self.largest = max(self.largest, other.largest)

    def to_json(self) -> dict[str, float]:
        return {
            "images": self.images,
            "mean": self.mean,
            "largest_mean": self.largest_mean,
            "largest": self.largest,
        }

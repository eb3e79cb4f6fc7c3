"""Filmstrips and videos of episodes, as data URIs up to a budget and as links beyond it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import av
from PIL import Image

from reflexarc.eval.results import EpisodeResult
from reflexarc.eval.videos import (
    CAPTION_HEIGHT,
    HOLD_LAST_FRAME_SECONDS,
    VIEWS,
    frame_rate,
)
from reflexarc.eval.worlds import world_of

VIDEOS = "videos"
STRIP_FRAMES = 8
STRIP_WIDTH = 160
VIDEO_BUDGET_BYTES = 8 * 2**20
STRIP_BUDGET_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Frame:
    """One picture of a filmstrip, both cameras one above the other."""

    step: int
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Film:
    """What the page shows of one filmed episode.

    Attributes:
        href: the video's address beside the page.
        frames: of the filmstrip; empty beyond the budget or when the video cannot be read.
        video_uri: the video inside the page, or None where it is only linked.
        problem: why there is no picture, or None.
    """

    href: str
    frames: tuple[Frame, ...]
    video_uri: str | None
    problem: str | None = None


class FilmLibrary:
    """Hands out films in the order in which they are asked for, until the budgets are spent."""

    def __init__(
        self,
        folder: Path,
        *,
        video_budget: int = VIDEO_BUDGET_BYTES,
        strip_budget: int = STRIP_BUDGET_BYTES,
    ) -> None:
        self._folder = folder / VIDEOS
        self._video_left, self._strip_left = video_budget, strip_budget

    def film(self, result: EpisodeResult) -> Film | None:
        """None for an episode that was not filmed."""
        if result.video is None:
            return None
        path = self._folder / result.video
        # A results file is foreign text: its names may not lead out of the folder.
        inside = path.name == result.video and path.suffix == ".mp4" and not path.is_symlink()
        if not inside:
            return Film("", (), None, "the results name a video outside the folder; left out")
        if not path.is_file():
            return Film("", (), None, f"{VIDEOS}/{path.name} is missing")
        href = f"{VIDEOS}/{quote(path.name)}"
        try:
            return Film(href, self._strip(path, result), self._embed(path))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            return Film(href, (), None, f"{VIDEOS}/{path.name} cannot be read: {error}")

    def _strip(self, path: Path, result: EpisodeResult) -> tuple[Frame, ...]:
        if self._strip_left <= 0:
            return ()
        frames = tuple(filmstrip(path, result))
        self._strip_left -= sum(len(frame.uri) for frame in frames)
        return frames

    def _embed(self, path: Path) -> str | None:
        size = path.stat().st_size
        if size > self._video_left:
            return None
        self._video_left -= size
        return data_uri("video/mp4", path.read_bytes())


def filmstrip(path: Path, result: EpisodeResult) -> Iterable[Frame]:
    """Up to ``STRIP_FRAMES`` pictures evenly over the episode, its first and last among them."""
    with av.open(str(path)) as container:
        pictures = list(container.decode(video=0))
    rate = frame_rate(result.replan_steps, world_of(result.suite).control_hz)
    held = max(1, round(rate * HOLD_LAST_FRAME_SECONDS))
    distinct = pictures[: max(1, len(pictures) - held + 1)]
    last = len(distinct) - 1
    count = min(STRIP_FRAMES, len(distinct))
    for index in sorted({round(i * last / max(1, count - 1)) for i in range(count)}):
        step = result.steps if index == last else min(index * result.replan_steps, result.steps)
        yield _thumbnail(distinct[index].to_image(), step)


def _thumbnail(picture: Image.Image, step: int) -> Frame:
    """The caption cut off, the cameras' views set one above the other."""
    width, height = picture.width // VIEWS, picture.height - CAPTION_HEIGHT
    view = (STRIP_WIDTH, max(1, round(STRIP_WIDTH * height / width)))
    canvas = Image.new("RGB", (view[0], view[1] * VIEWS))
    for number in range(VIEWS):
        left = number * width
        part = picture.crop((left, CAPTION_HEIGHT, left + width, picture.height))
        canvas.paste(part.resize(view, Image.Resampling.BILINEAR), (0, number * view[1]))
    out = io.BytesIO()
    canvas.save(out, "webp", quality=72, method=2)
    return Frame(step, data_uri("image/webp", out.getvalue()), canvas.width, canvas.height)


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

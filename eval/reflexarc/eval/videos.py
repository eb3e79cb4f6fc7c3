"""Videos of episodes: two cameras side by side, upright, with a caption, playable in a browser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from reflexarc.eval.libero.world import LiberoWorld

if TYPE_CHECKING:
    from reflexarc.eval.worlds import Simulator, World

UInt8Image = npt.NDArray[np.uint8]
Frames: TypeAlias = Sequence[tuple[int, Mapping[str, UInt8Image]]]
PLAYBACK_SPEED = 2
CAPTION_HEIGHT = 40
HOLD_LAST_FRAME_SECONDS = 1.0
VIEWS = 2
"""Cameras that a video shows side by side."""


class Film:
    """What one episode looked like at some of its steps.

    A policy's frames were rendered for it anyway and are kept. Where nobody rendered, a snapshot
    is kept, and drawn only if the video is written.

    Args:
        wanted: whether a video may be written; an unwanted film keeps nothing.
        every: steps between two frames; what comes at other steps is not kept.
        cameras: that a video shows.
    """

    def __init__(
        self, wanted: bool, every: int = 1, cameras: tuple[str, str] = LiberoWorld.video_cameras
    ) -> None:
        self.wanted, self._every, self._cameras = wanted, every, cameras
        self._frames: list[tuple[int, Mapping[str, UInt8Image] | Any]] = []

    def add(self, step: int, images: Mapping[str, UInt8Image]) -> None:
        """Keep ``images``, camera name to ``uint8 (S, S, 3)`` as the world renders them."""
        if self._keeps(step):
            self._frames.append((step, images))

    def see(self, step: int, images: Mapping[str, UInt8Image], simulator: Simulator) -> None:
        """Keep ``images``, or this moment where they lack a camera that the video shows."""
        if all(name in images for name in self._cameras):
            self.add(step, images)
        else:
            self.snap(step, simulator)

    def snap(self, step: int, simulator: Simulator) -> None:
        """Keep this moment without rendering it."""
        if self._keeps(step):
            self._frames.append((step, simulator.snapshot()))

    def finish(self, step: int, simulator: Simulator) -> None:
        """Keep the last moment, whatever its step."""
        if self.wanted:
            self._frames.append((step, simulator.snapshot()))

    def _keeps(self, step: int) -> bool:
        return self.wanted and step % self._every == 0

    def develop(self, simulator: Simulator) -> Frames:
        """The frames in order, each with its step; only a reset of the simulator may follow."""
        return [
            (step, frame if isinstance(frame, Mapping) else simulator.render_snapshot(frame))
            for step, frame in self._frames
        ]


def frame_rate(replan_steps: int, control_hz: float = LiberoWorld.control_hz) -> int:
    """Frames a second when one frame stands for ``replan_steps`` steps, sped up."""
    return max(1, round(control_hz / replan_steps * PLAYBACK_SPEED))


def write_video(
    path: Path,
    frames: Frames,
    title: str,
    outcome: str,
    *,
    good: bool,
    replan_steps: int,
    world: World | None = None,
) -> None:
    """Write frames as h264 in yuv420p, atomically.

    Args:
        frames: at least one, with their steps (:meth:`Film.develop`).
        title: first caption line: task, state and arm.
        outcome: shown on the last frame, which is held for a second.
        good: whether the outcome is shown in green.
        replan_steps: environment steps between two frames; sets the frame rate.
        world: that they show; LIBERO's by default.
    """
    world = world or LiberoWorld()
    rate = frame_rate(replan_steps, world.control_hz)
    speed = rate * replan_steps / world.control_hz
    pictures = [
        _picture(world, images, title, f"step {step}   {speed:.2g}x speed", "white")
        for step, images in frames[:-1]
    ]
    step, images = frames[-1]
    colour = "#7ee787" if good else "#ff7b72"
    last = _picture(world, images, title, f"step {step}   {outcome.upper()}", colour)
    pictures += [last] * max(1, round(rate * HOLD_LAST_FRAME_SECONDS))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    try:
        _encode(temporary, pictures, rate)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _picture(
    world: World, images: Mapping[str, UInt8Image], title: str, line: str, colour: str
) -> UInt8Image:
    """``uint8 (S + caption, 2 S, 3)``; rows are turned where the world has them upside-down."""
    rows = slice(None, None, -1 if world.upside_down else 1)
    views = np.concatenate([images[name][rows] for name in world.video_cameras], axis=1)
    height, width = views.shape[:2]
    # yuv420p halves both sides, so that both must be even.
    canvas = Image.new("RGB", (width + width % 2, height + height % 2 + CAPTION_HEIGHT))
    canvas.paste(Image.fromarray(np.ascontiguousarray(views)), (0, CAPTION_HEIGHT))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    draw.text((6, 4), _shorten(title, draw, font, width - 12), fill="white", font=font)
    draw.text((6, 21), line, fill=colour, font=font)
    return np.asarray(canvas)


def _shorten(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _encode(path: Path, pictures: Sequence[UInt8Image], rate: int) -> None:
    with av.open(str(path), mode="w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "23"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)

"""A picture to look at before training: first, middle and last frame of some episodes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

from reflexarc.data.dataset import DatasetEpisode, EpisodeDataset
from reflexarc.data.libero_writer import atomic_path

_MARGIN, _CAPTION = 4, 16


def write_contact_sheet(
    dataset: EpisodeDataset, output: Path, *, episodes: int = 8, tile: int = 160
) -> None:
    """Write a PNG: a row an episode, evenly spread over the data; three frames a camera."""
    count = min(episodes, len(dataset.episodes))
    places = np.linspace(0, len(dataset.episodes) - 1, count).round().astype(int)
    chosen = [dataset.episodes[i] for i in sorted(set(places.tolist()))]
    turned = "opengl" in dataset.orientations
    row_height = tile + 2 * _CAPTION + _MARGIN
    width = max(1, 3 * len(dataset.cameras)) * (tile + _MARGIN)
    sheet = Image.new("RGB", (width, len(chosen) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, episode in enumerate(chosen):
        top = row * row_height
        text = f"{episode.demo} | {episode.length} steps | {episode.instruction}"
        draw.text((_MARGIN, top + 2), _fitting(draw, text, width - 2 * _MARGIN), fill="black")
        for column, (label, frame) in enumerate(_frames(episode, dataset.cameras, turned)):
            larger = max(frame.shape[:2]) > tile
            how = Image.Resampling.BILINEAR if larger else Image.Resampling.NEAREST
            picture = ImageOps.contain(Image.fromarray(frame), (tile, tile), how)
            left = column * (tile + _MARGIN)
            draw.text((left + _MARGIN, top + _CAPTION), _fitting(draw, label, tile), fill="gray")
            sheet.paste(picture, (left, top + 2 * _CAPTION))
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        temporary.write_bytes(out.getvalue())


def _frames(
    episode: DatasetEpisode, cameras: Sequence[str], turned: bool
) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """Camera and step in words, and the image as it is seen."""
    last = len(episode.image_steps) - 1
    indices = [0, last // 2, last]
    # LIBERO's rows stand from the bottom up, as OpenGL renders.
    return [
        (
            f"{name}, step {int(episode.image_steps[index])}",
            np.ascontiguousarray(frame[::-1] if turned else frame),
        )
        for name in cameras
        for index, frame in zip(indices, episode.images(name, indices), strict=True)
    ]


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """``text``, or as much of its beginning as is that wide."""
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."

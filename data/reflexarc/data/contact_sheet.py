"""A picture to look at before training: first, middle and last frame of some episodes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

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
    row_height = tile + _CAPTION + _MARGIN
    width = max(1, 3 * len(dataset.cameras)) * (tile + _MARGIN)
    sheet = Image.new("RGB", (width, len(chosen) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, episode in enumerate(chosen):
        top = row * row_height
        text = f"{episode.demo} | {episode.length} steps | {episode.instruction}"
        draw.text((_MARGIN, top + 2), text, fill="black")
        for column, frame in enumerate(_frames(episode, dataset.cameras, turned)):
            picture = Image.fromarray(frame)
            picture.thumbnail((tile, tile), Image.Resampling.BILINEAR)
            sheet.paste(picture, (column * (tile + _MARGIN), top + _CAPTION))
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        temporary.write_bytes(out.getvalue())


def _frames(
    episode: DatasetEpisode, cameras: Sequence[str], turned: bool
) -> list[npt.NDArray[np.uint8]]:
    last = len(episode.image_steps) - 1
    shown = [frame for name in cameras for frame in episode.images(name, [0, last // 2, last])]
    # LIBERO's rows stand from the bottom up, as OpenGL renders.
    return [np.ascontiguousarray(frame[::-1] if turned else frame) for frame in shown]

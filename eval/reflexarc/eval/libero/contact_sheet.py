"""A picture to look at before training: first, middle and last frames of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from reflexarc.data.libero_episode import Episode
from reflexarc.data.libero_hdf5 import open_libero

_DEMOS_A_TASK = 3
_MARGIN, _CAPTION = 4, 16


def write_contact_sheet(paths: Sequence[Path], output: Path, *, tile: int = 160) -> None:
    """Write a PNG: a row for each of the first demonstrations of every file.

    A row shows the first, middle and last stored frame of both cameras, turned upright.
    """
    rows = [episode for path in paths for episode in open_libero([path]).episodes[:_DEMOS_A_TASK]]
    row_height = tile + _CAPTION + _MARGIN
    sheet = Image.new("RGB", (6 * (tile + _MARGIN), len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, episode in enumerate(rows):
        top = row * row_height
        draw.text((_MARGIN, top + 2), _caption(episode), fill="black")
        for column, frame in enumerate(_frames(episode)):
            picture = Image.fromarray(frame).resize((tile, tile), Image.Resampling.BILINEAR)
            sheet.paste(picture, (column * (tile + _MARGIN), top + _CAPTION))
    sheet.save(output, format="PNG")


def _frames(episode: Episode) -> list[npt.NDArray[np.uint8]]:
    last = len(episode.image_steps) - 1
    chosen = [0, last // 2, last]
    agentview, hand = (episode.images(name, chosen) for name in ("agentview", "eye_in_hand"))
    # Files hold rows from the bottom up, as OpenGL renders.
    return [np.ascontiguousarray(frame[::-1]) for frame in (*agentview, *hand)]


def _caption(episode: Episode) -> str:
    return f"{episode.instruction} | {episode.demo} | {episode.length} steps | seed {episode.seed}"

"""Images of many samples at once, in any order, each file read from its beginning to its end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.data.dataset import DatasetEpisode

Place = tuple[DatasetEpisode, int]
"""An episode, and an index into its ``image_steps``."""


def read_frames(wanted: Sequence[Place], camera: str) -> npt.NDArray[np.uint8]:
    """``uint8 (n, H, W, 3)`` RGB of a camera at ``wanted``, in its order; places may come twice.

    Inside, an episode is asked once for all of its frames, and episodes of one file follow one
    another: a video's frames are then decoded in order, each at most once. As with
    ``DatasetEpisode.images``, what stands turned in its file comes as a view that turns it back.

    Raises DatasetError for frames that are not there, and for images of different sizes.
    """
    if not wanted:
        raise DatasetError("no frames are wanted", field=camera)
    rows: dict[int, list[int]] = {}
    for row, (episode, _) in enumerate(wanted):
        rows.setdefault(id(episode), []).append(row)
    groups = sorted(rows.values(), key=lambda g: (str(wanted[g[0]][0].path), wanted[g[0]][0].demo))
    images: npt.NDArray[np.uint8] | None = None
    for group in groups:
        episode = wanted[group[0]][0]
        found = episode.images(camera, [wanted[row][1] for row in group])
        if len(groups) == 1:
            return found
        if images is None:
            images = _room_like(found, len(wanted))
        if found.shape[1:] != images.shape[1:]:
            first = wanted[groups[0][0]][0]
            raise DatasetError(
                f"{episode.path}, {episode.demo}: images of {camera} are "
                f"{found.shape[1]}x{found.shape[2]}, those of {first.demo} are "
                f"{images.shape[1]}x{images.shape[2]}; read them apart",
                field=camera,
            )
        for row, image in zip(group, found, strict=True):
            images[row] = image
    assert images is not None
    return images


def _room_like(found: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    """An array for ``count`` images, turned where ``found`` is a view that turns what is stored.

    Copying into an array that runs the same way costs a tenth of turning pixel by pixel.
    """
    images = np.empty((count, *found.shape[1:]), dtype=np.uint8)
    rows, columns = (-1 if stride < 0 else 1 for stride in found.strides[1:3])
    return images[:, ::rows, ::columns]

"""Write a mobile robot's episode in the layout that :mod:`reflexarc.data.mobile.layout` reads."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.data.libero_writer import atomic_path
from reflexarc.data.mobile import layout


def write_episode(
    path: Path,
    images: npt.NDArray[np.uint8],
    actions: npt.NDArray[np.floating],
    instruction: str,
    *,
    control_hz: float,
    expert_actions: npt.NDArray[np.floating] | None = None,
    attributes: dict[str, str | int | float] | None = None,
) -> None:
    """Write one file, atomically.

    Args:
        images: ``uint8 (T, H, W, 3)`` RGB, upright; row t precedes action t.
        actions: ``(T, >= 2)`` metres a second, as executed.
        instruction: what the episode does.
        expert_actions: ``(T, 2)``, what the driver meant where noise was injected.
        attributes: more of the file's root: seeds and the like.

    Raises DatasetError for shapes that do not fit together, and for values that are not finite.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(actions):
        raise DatasetError(
            f"{path}: images {images.dtype} {images.shape} and actions {actions.shape} do not fit: "
            "uint8 (T, H, W, 3) and (T, 2)"
        )
    if not np.isfinite(actions).all():
        raise DatasetError(f"{path}: actions are not finite", field=layout.ACTIONS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        # A frame a chunk; lzf makes flat pictures a tenth as large, and needs no filter plug-in.
        file.create_dataset(
            layout.IMAGES, data=images, chunks=(1, *images.shape[1:]), compression="lzf"
        )
        file[layout.ACTIONS] = np.asarray(actions, dtype=np.float32)
        if expert_actions is not None:
            file[layout.EXPERT] = np.asarray(expert_actions, dtype=np.float32)
        file[layout.INSTRUCTION] = instruction
        file.attrs[layout.CONTROL_HZ] = control_hz
        file.attrs.update(attributes or {})

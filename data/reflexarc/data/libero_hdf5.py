"""Find and open LIBERO's HDF5 demonstrations: names, attributes and shapes, nothing else.

Three kinds of file share one layout and differ in what an observation row means:

===========  ==========================================  =================================
kind         recognised by                               ``obs[t]`` stands
===========  ==========================================  =================================
own          attribute ``alignment`` of ``data``         as the attribute says
official     tag ``libero-v1``, or ``env_args`` and      *after* ``actions[t]``: row ``t``
             ``num_samples`` of the demos                precedes ``actions[t + 1]``
regenerated  neither ``env_args`` nor ``num_samples``    *before* ``actions[t]``
===========  ==========================================  =================================

An :class:`Episode` hides the difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import (
    ActionSpec,
    Orientation,
    StateSpec,
    libero_action,
)
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.data.libero_episode import Episode
from reflexarc.data.libero_layout import (
    ACTION_DIMENSION,
    CAMERA_DATASETS,
    STATE_PARTS,
    Alignment,
    FileKind,
    describe_file,
    libero_state_spec,
    natural_key,
    open_hdf5,
    read_dataset,
    require_dataset,
)
from reflexarc.data.presence import exists


@dataclass(frozen=True)
class LiberoDataset:
    """Episodes of one or more files, in natural order of file and demo."""

    episodes: list[Episode]
    orientations: tuple[Orientation, ...] = ("rotated_180", "opengl")
    cameras: tuple[str, ...] = tuple(CAMERA_DATASETS)

    def layout(self, wanted: str) -> str:
        """LIBERO gives the one that is wanted."""
        return wanted

    def subset(self, episodes: Sequence[DatasetEpisode]) -> LiberoDataset:
        """These of its episodes alone."""
        chosen = {id(episode) for episode in episodes}
        return LiberoDataset([episode for episode in self.episodes if id(episode) in chosen])

    def state_spec(self, layout: str) -> StateSpec:
        """The state in one of LIBERO's layouts; DatasetError for another."""
        return libero_state_spec(layout)

    def action_spec(self, horizon: int) -> ActionSpec:
        """LIBERO's action."""
        return libero_action(horizon)

    def check_images(self) -> None:
        """Nothing: opening has checked the shapes, and a cut file does not open."""

    @property
    def instructions(self) -> list[str]:
        """The distinct instructions, in order of first appearance."""
        return list(dict.fromkeys(episode.instruction for episode in self.episodes))

    def fingerprint(self) -> str:
        """sha256 over each episode's names, length, seed, image steps and size, and its actions.

        Pixels and states are not hashed, so that this takes milliseconds an episode: two renderings
        of the same demonstrations at the same size and steps have the same fingerprint.
        """
        digest = hashlib.sha256(b"reflexarc-libero-1\n")
        for episode in self.episodes:
            digest.update(json.dumps(episode.identity()).encode() + b"\n")
            digest.update(np.ascontiguousarray(episode.actions(), dtype="<f8").tobytes())
        return digest.hexdigest()


def open_libero(paths: Sequence[Path], *, alignment: Alignment | None = None) -> LiberoDataset:
    """Open files, or every ``*.hdf5`` below the directories given.

    Args:
        paths: files or directories; a directory's files come in natural order.
        alignment: overrules what the files say, for files that cannot be recognised.

    Raises:
        DatasetError: naming file, demo and key, for anything that does not read as it should.
    """
    episodes = [
        episode
        for path in find_files(paths)
        for episode in (read_episode(path, demo, alignment) for demo in list_demos(path))
    ]
    return LiberoDataset(episodes)


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The HDF5 files that ``paths`` name, directories searched, hidden files left out."""
    found: list[Path] = []
    for path in map(Path, paths):
        if exists(path) and path.is_dir():
            inside = [
                file
                for file in path.rglob("*.hdf5")
                if not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
            if not inside:
                raise DatasetError(
                    f"{path} holds no *.hdf5 file; collect demonstrations with "
                    "'reflexarc data collect', or name the folder of a LIBERO suite"
                )
            found.extend(sorted(inside, key=lambda file: natural_key(str(file))))
        elif path.is_file():
            found.append(path)
        else:
            raise DatasetError(f"{path} does not exist; name an HDF5 file or a folder of them")
    if not found:
        raise DatasetError("no data was named; give HDF5 files or folders of them")
    resolved = [path.resolve() for path in found]
    for path, real in zip(found, resolved, strict=True):
        if resolved.count(real) > 1:
            raise DatasetError(f"{path} is named twice; its demos would count twice")
    return found


def list_demos(path: Path) -> list[str]:
    """Names of a file's demos in numeric order; DatasetError when there are none."""
    with open_hdf5(path) as file:
        if "data" not in file or not hasattr(file["data"], "keys"):
            raise DatasetError(
                f"{path}: no group 'data'; this is not a file of LIBERO demonstrations",
                field="data",
            )
        demos = sorted(file["data"].keys(), key=natural_key)
    if not demos:
        raise DatasetError(f"{path}: group 'data' holds no demo; collect this task again")
    return demos


def read_episode(path: Path, demo: str, alignment: Alignment | None = None) -> Episode:
    """Read one demo's attributes and shapes, and check that they agree with each other."""
    with open_hdf5(path) as file:
        kind = describe_file(file, path, demo, alignment)
        group = file["data"][demo]
        stored = require_dataset(file, path, demo, "actions", (None, ACTION_DIMENSION)).shape[0]
        shift = 1 if kind.alignment == "after_action" else 0
        length = stored - shift
        if length < 1:
            raise DatasetError(
                f"{path}, {demo}: actions has {stored} rows, too few for one aligned step; "
                "remove this demo",
                field="actions",
            )
        _check_low_dimensional(file, path, demo, stored)
        steps, shape = _image_layout(file, path, demo, kind, stored)
        seed = group.attrs.get("seed")
        return Episode(
            path=path,
            demo=demo,
            task_name=kind.task_name,
            instruction=kind.instruction,
            length=length,
            alignment=kind.alignment,
            recognised_by=kind.recognised_by,
            render_stride=kind.render_stride,
            image_steps=steps[steps < length],
            image_shape=shape,
            seed=None if seed is None else int(seed),
        )


def _check_low_dimensional(file: Any, path: Path, demo: str, stored: int) -> None:
    for key, width in dict(part for parts in STATE_PARTS.values() for part in parts).items():
        require_dataset(file, path, demo, f"obs/{key}", (stored, width))


def _image_layout(
    file: Any, path: Path, demo: str, kind: FileKind, stored: int
) -> tuple[npt.NDArray[np.int64], tuple[int, int, int]]:
    """``(steps of the images, (H, W, 3))``, the same for both cameras."""
    steps: npt.NDArray[np.int64] = np.arange(stored, dtype=np.int64)
    if "image_steps" in file["data"][demo]["obs"]:
        dataset = require_dataset(file, path, demo, "obs/image_steps", (None,))
        raw = read_dataset(dataset, path, demo, "obs/image_steps", slice(None))
        steps = np.asarray(raw, dtype=np.int64)
        ordered = bool((np.diff(steps) > 0).all())
        if steps.size and not (ordered and steps[0] >= 0 and steps[-1] < stored):
            raise DatasetError(
                f"{path}, {demo}: obs/image_steps must increase within 0..{stored - 1}, "
                f"got {steps[:5].tolist()}...; collect this demo again",
                field="obs/image_steps",
            )
    elif kind.render_stride != 1:
        raise DatasetError(
            f"{path}, {demo}: render_stride is {kind.render_stride} but obs/image_steps is missing",
            field="obs/image_steps",
        )
    if steps.size == 0:
        raise DatasetError(
            f"{path}, {demo}: no frames; remove this demo or collect it again",
            field="obs/image_steps",
        )
    shapes = [
        require_dataset(file, path, demo, key, (len(steps), None, None, 3), "uint8").shape[1:]
        for key in CAMERA_DATASETS.values()
    ]
    if shapes[0] != shapes[1]:
        raise DatasetError(
            f"{path}, {demo}: the cameras' images differ in size: {shapes[0]}, {shapes[1]}"
        )
    return steps, shapes[0]

"""The feature store: what the frozen front of a policy makes of every frame, once, on disk.

A frozen backbone gives the same features in every epoch, so they are computed once and kept as
memory-mapped ``.npy`` files of float16 (pixels, which a policy that trains its own patches keeps,
as uint8) under a key of dataset, front and cameras. An interrupted computation continues where it
stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from reflexarc.contract import Camera, PolicyContract
from reflexarc.contract.images import prepare_image
from reflexarc.data.libero_episode import Episode
from reflexarc.policy.interface import Policy, Task, Tensors

_FORMAT = 1
_PROGRESS = "progress.json"
_MANIFEST = "manifest.json"
FeatureArray: TypeAlias = npt.NDArray[np.float16] | npt.NDArray[np.uint8]
# Older numpy, the newest for Python 3.10, leaves it untyped.
_open_memmap: Callable[..., FeatureArray] = np.lib.format.open_memmap


@dataclass(frozen=True)
class FrameFeatures:
    """Features of every frame of a list of episodes.

    Attributes:
        arrays: name to memory-mapped ``float16 (F, ...)``, or ``uint8`` for pixels.
        first_rows: row of each episode's first frame.
        path: the folder they lie in.
        hit: whether all of it was there already.
    """

    arrays: dict[str, FeatureArray]
    first_rows: list[int]
    path: Path
    hit: bool

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


@torch.inference_mode()
def feature_key(policy: Policy, episodes: Sequence[Episode], dataset_fingerprint: str) -> str:
    """sha256 over all that the features depend on: data, frozen front, cameras, format.

    The dataset's fingerprint does not cover pixels, so the first frame of every episode is
    hashed here: another rendering of the same demonstrations is another key.
    """
    policy.eval()
    digest = hashlib.sha256()
    first = np.zeros(1, dtype=np.int64)
    for episode in episodes:
        digest.update(json.dumps([episode.path.name, episode.demo]).encode())
        digest.update(np.ascontiguousarray(episode.image_steps).data)
        for camera in policy.contract.cameras:
            digest.update(np.ascontiguousarray(_recorded(episode, camera, first)).data)
    rows = embed_episode(policy, episodes[0], first)
    parts = {
        "format": _FORMAT,
        "dataset": dataset_fingerprint,
        "episodes": digest.hexdigest(),
        "family": policy.family,
        "front": _frozen_front(policy),
        "shapes": {name: list(values.shape[1:]) for name, values in rows.items()},
        "cameras": [camera.model_dump() for camera in policy.contract.cameras],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _frozen_front(policy: Policy) -> dict[str, str]:
    """Of each frozen backbone: its identity, and a sha256 of its weights as they are."""
    fronts = {}
    for path, backbone in policy.frozen_backbones().items():
        digest = hashlib.sha256(f"{backbone.name}:{backbone.sha256}".encode())
        module = policy.get_submodule(path)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().data)
        fronts[path] = digest.hexdigest()
    return fronts


def prepare_frames(
    contract: PolicyContract, episode: Episode, frames: npt.NDArray[np.int64]
) -> Tensors:
    """Camera name to ``uint8 (n, H, W, 3)`` as the contract wants it, from the recorded frames."""
    prepared = {}
    for camera in contract.cameras:
        images = _recorded(episode, camera, frames)
        stacked = np.stack([prepare_image(camera, image) for image in images])
        prepared[camera.name] = torch.from_numpy(stacked)
    return prepared


def _recorded(
    episode: Episode, camera: Camera, frames: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    # The reader refuses a name that is none of its cameras.
    return episode.images(cast(Literal["agentview", "eye_in_hand"], camera.name), frames)


@torch.inference_mode()
def embed_episode(policy: Policy, episode: Episode, frames: npt.NDArray[np.int64]) -> Tensors:
    """``embed_frames`` of some frames of one episode, on the CPU."""
    device = policy.device
    task = policy.embed_task([Task(instruction=episode.instruction)])
    rows = {name: t.to(device).expand(len(frames), *t.shape[1:]) for name, t in task.items()}
    prepared = prepare_frames(policy.contract, episode, frames)
    images = {name: values.to(device) for name, values in prepared.items()}
    embedded = policy.embed_frames(images, rows)
    return {
        name: (t if t.dtype == torch.uint8 else t.float()).cpu() for name, t in embedded.items()
    }


def stored_dtype(rows: Tensor) -> type[np.float16] | type[np.uint8]:
    """What the store keeps of rows of ``embed_frames``: pixels as they are, features in half."""
    return np.uint8 if rows.dtype == torch.uint8 else np.float16


def find_features(cache: Path, key: str) -> Path | None:
    """The folder of the features of ``key`` when they have been computed, else None."""
    folder = cache / key[:32]
    return folder if (folder / _MANIFEST).is_file() else None


def frame_features(
    policy: Policy,
    episodes: Sequence[Episode],
    key: str,
    cache: Path,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> FrameFeatures:
    """Features of every frame of ``episodes``, from the store or computed into it.

    Args:
        policy: its ``embed_frames`` must depend on frozen weights only.
        key: of :func:`feature_key`.
        cache: folder of the store; made when it is absent.
        batch_size: frames a pass, and at most how many an interruption loses.
    """
    counts = [len(episode.image_steps) for episode in episodes]
    first_rows = np.concatenate([[0], np.cumsum(counts)])[:-1].tolist()
    complete = cache / key[:32]
    hit = find_features(cache, key) is not None
    if not hit:
        policy.eval()
        cache.mkdir(parents=True, exist_ok=True)
        partial = complete.with_name(complete.name + ".partial")
        with FileLock(complete.with_name(complete.name + ".lock")):
            if not complete.exists():  # another run may have finished it meanwhile
                _compute(policy, episodes, counts, partial, batch_size, progress)
                partial.replace(complete)
    names = json.loads((complete / _MANIFEST).read_text())["names"]
    arrays = {name: np.load(complete / f"{name}.npy", mmap_mode="r") for name in names}
    return FrameFeatures(arrays, first_rows, complete, hit)


def _compute(
    policy: Policy,
    episodes: Sequence[Episode],
    counts: Sequence[int],
    partial: Path,
    batch_size: int,
    progress: bool,
) -> None:
    """Fill ``partial`` from the row that its progress file names to the end."""
    partial.mkdir(exist_ok=True)
    done = _rows_done(partial)
    total = sum(counts)
    arrays: dict[str, FeatureArray] = {}
    row = 0
    with tqdm(
        total=total, initial=done, desc="frame features", unit="frame", disable=not progress
    ) as bar:
        for episode, count in zip(episodes, counts, strict=True):
            for start in range(0, count, batch_size):
                frames = np.arange(start, min(start + batch_size, count))
                if row + len(frames) <= done:
                    row += len(frames)
                    continue
                rows = embed_episode(policy, episode, frames)
                arrays = arrays or _open_arrays(partial, rows, total, resume=done > 0)
                for name, values in rows.items():
                    arrays[name][row : row + len(frames)] = values.numpy()
                row += len(frames)
                bar.update(len(frames))
            _flush(partial, arrays, row)
    names = sorted(path.stem for path in partial.glob("*.npy"))
    _write_json(partial / _MANIFEST, {"format": _FORMAT, "names": names, "rows": total})


def _open_arrays(
    partial: Path, rows: Tensors, total: int, *, resume: bool
) -> dict[str, FeatureArray]:
    return {
        name: _open_memmap(
            partial / f"{name}.npy",
            mode="r+" if resume else "w+",
            dtype=None if resume else stored_dtype(values),
            shape=None if resume else (total, *values.shape[1:]),
        )
        for name, values in rows.items()
    }


def _rows_done(partial: Path) -> int:
    """Rows of whole episodes that an earlier, interrupted computation has written."""
    path = partial / _PROGRESS
    return int(json.loads(path.read_text())["rows"]) if path.is_file() else 0


def _flush(partial: Path, arrays: dict[str, FeatureArray], rows: int) -> None:
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()
    if arrays:
        _write_json(partial / _PROGRESS, {"rows": rows})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)

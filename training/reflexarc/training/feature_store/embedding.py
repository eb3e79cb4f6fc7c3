"""From recorded frames to rows of ``embed_frames``, as the store, training and probes want them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reflexarc.contract import Camera, PolicyContract
from reflexarc.contract.images import prepare_image
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.interface import Policy, Task, Tensors

Frames = npt.NDArray[np.int64]


def recorded_frames(
    episode: DatasetEpisode, camera: Camera, frames: Frames
) -> npt.NDArray[np.uint8]:
    """``uint8 (n, H, W, 3)`` as they lie in the dataset."""
    return episode.images(camera.name, frames)


def prepare_frames(contract: PolicyContract, episode: DatasetEpisode, frames: Frames) -> Tensors:
    """Camera name to ``uint8 (n, H, W, 3)`` as the contract wants it, from the recorded frames."""
    prepared = {}
    for camera in contract.cameras:
        images = recorded_frames(episode, camera, frames)
        stacked = np.stack([prepare_image(camera, image) for image in images])
        prepared[camera.name] = torch.from_numpy(stacked)
    return prepared


@torch.inference_mode()
def embed_episode(
    policy: Policy, episode: DatasetEpisode, frames: Frames, *, batch_size: int | None = None
) -> Tensors:
    """``embed_frames`` of some frames of one episode, on the CPU; pixels stay uint8.

    Args:
        batch_size: frames that pass through the front at once; None for all of them.
    """
    device = policy.device
    task = policy.embed_task([Task(instruction=episode.instruction)])
    prepared = prepare_frames(policy.contract, episode, frames)
    size = batch_size or len(frames)
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(frames), size):
        images = {name: t[start : start + size].to(device) for name, t in prepared.items()}
        count = len(next(iter(images.values())))
        rows = {name: t.to(device).expand(count, *t.shape[1:]) for name, t in task.items()}
        for name, t in policy.embed_frames(images, rows).items():
            parts.setdefault(name, []).append((t if t.dtype == torch.uint8 else t.float()).cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}

"""From recorded frames to rows of ``embed_frames``, as the store, training and probes want them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from reflexarc.contract import Camera, PolicyContract
from reflexarc.contract.images import prepare_image
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.interface import Policy, Task, Tensors
from reflexarc.training.time_windows import frame_rows, window_steps, window_valid

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

    For a policy that embeds clips: ``stored_clips`` of the clips that end with these frames.

    Args:
        batch_size: frames that pass through the front at once; None for all of them.
    """
    if policy.embeds_clips:
        return _embed_clips(policy, episode, frames, batch_size)
    return _embed_frames(policy, episode, frames, batch_size)


def _embed_frames(
    policy: Policy, episode: DatasetEpisode, frames: Frames, batch_size: int | None
) -> Tensors:
    device = policy.device
    # Which goal a sample is given is chosen later, so no frame is embedded in the light of one.
    goal = policy.contract.needs_goal_image
    task = {} if goal else policy.embed_task([Task(instruction=episode.instruction)])
    prepared = prepare_frames(policy.contract, episode, frames)
    size = batch_size or len(frames)
    parts: list[Tensors] = []
    for start in range(0, len(frames), size):
        images = {name: t[start : start + size].to(device) for name, t in prepared.items()}
        count = len(next(iter(images.values())))
        rows = {name: t.to(device).expand(count, *t.shape[1:]) for name, t in task.items()}
        parts.append(_on_cpu(policy.embed_frames(images, rows)))
    return _joined(parts)


def _embed_clips(
    policy: Policy, episode: DatasetEpisode, frames: Frames, batch_size: int | None
) -> Tensors:
    """Each frame is prepared once, however many of the clips it is part of."""
    history, device = policy.contract.history, policy.device
    steps = np.asarray(episode.image_steps, dtype=np.int64)[frames]
    seen = frame_rows(episode, window_steps(steps, history.frames, history.stride))
    valid = torch.from_numpy(window_valid(steps, history.frames, history.stride))
    unique, places = np.unique(seen, return_inverse=True)
    rows = _embed_frames(policy, episode, unique, batch_size)
    wanted = torch.from_numpy(places.reshape(seen.shape))
    size = max(1, (batch_size or len(frames)) // history.frames)
    parts = []
    for start in range(0, len(frames), size):
        part = slice(start, start + size)
        clips = {name: values[wanted[part]].to(device) for name, values in rows.items()}
        parts.append(_on_cpu(policy.stored_clips(clips, valid[part].to(device))))
    return _joined(parts)


def _on_cpu(rows: Tensors) -> Tensors:
    return {n: (t if t.dtype == torch.uint8 else t.float()).cpu() for n, t in rows.items()}


def _joined(parts: list[Tensors]) -> Tensors:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

"""What features depend on, field by field, so that a store can say in which it differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from reflexarc.contract import Camera
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.interface import Policy
from reflexarc.training.config_base import FeatureDtype
from reflexarc.training.feature_store.dtypes import stored_name
from reflexarc.training.feature_store.embedding import embed_episode
from reflexarc.training.feature_store.first_frames import FirstFrames

FORMAT = 2


class StrictModel(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderKey(StrictModel):
    """A frozen encoder: its name, its files' revision where they have one, its weights' sha256."""

    id: str
    revision: str
    sha256: str


class ArrayKey(StrictModel):
    """One array: how its rows are stored (``fp16``, ``bf16``, ``fp32``, ``uint8``), their shape."""

    dtype: str
    row_shape: tuple[int, ...]


class KeyFields(StrictModel):
    """Everything but the frames themselves.

    Attributes:
        format: of the store.
        dataset: the dataset's fingerprint.
        family: of the policy.
        encoders: by module path.
        preprocessing: camera to its image steps, from the recorded size to the policy's.
        dtype: of features; pixels are always uint8.
        arrays: by name.
        clip: which frames a row is made of, where it is more than one.
    """

    format: int
    dataset: str
    family: str
    encoders: dict[str, EncoderKey]
    preprocessing: dict[str, str]
    dtype: str
    arrays: dict[str, ArrayKey]
    clip: str | None = None


@dataclass(frozen=True)
class FeatureKey:
    """Which features are wanted.

    Attributes:
        fields: what they depend on.
        episodes: a sha256 of each episode (names, image steps, first frames), as they are listed.
        counts: frames of each.
    """

    fields: KeyFields
    episodes: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @cached_property
    def digest(self) -> str:
        """Names the store's folder. The order of the episodes does not count."""
        parts = {
            "fields": self.fields.model_dump(exclude_none=True),
            "episodes": sorted(self.episodes),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@torch.inference_mode()
def feature_key(
    policy: Policy,
    episodes: Sequence[DatasetEpisode],
    dataset_fingerprint: str,
    dtype: FeatureDtype = "fp16",
    first_frames: FirstFrames | None = None,
) -> FeatureKey:
    """The key of the features of every frame of ``episodes``.

    The dataset's fingerprint does not cover pixels, so the first frame of every episode is
    hashed here: another rendering of the same demonstrations is another key. Those that
    ``first_frames`` knows are not read.
    """
    frames = first_frames or FirstFrames()
    policy.eval()
    cameras = policy.contract.cameras
    rows = embed_episode(policy, episodes[0], np.zeros(1, dtype=np.int64))
    fields = KeyFields(
        format=FORMAT,
        dataset=dataset_fingerprint,
        family=policy.family,
        encoders=_encoders(policy),
        preprocessing={camera.name: _steps(camera) for camera in cameras},
        dtype=dtype,
        arrays={
            name: ArrayKey(dtype=stored_name(values, dtype), row_shape=tuple(values.shape[1:]))
            for name, values in rows.items()
        },
        clip=_clip(policy),
    )
    return FeatureKey(
        fields,
        tuple(frames.digest(episode, cameras) for episode in episodes),
        tuple(len(episode.image_steps) for episode in episodes),
    )


def differences(wanted: KeyFields, found: KeyFields) -> list[str]:
    """``field: value found, value wanted``, one for each field that differs.

    Arrays that are not wanted, and the encoders that made them, are no difference: policies that
    read different parts of the same frames share a store.
    """
    found = found.model_copy(
        update={
            "arrays": {n: array for n, array in found.arrays.items() if n in wanted.arrays},
            "encoders": {n: one for n, one in found.encoders.items() if n in wanted.encoders},
        }
    )
    one, two = _flat(wanted.model_dump(mode="json")), _flat(found.model_dump(mode="json"))
    one["cameras"], two["cameras"] = (", ".join(key.preprocessing) for key in (wanted, found))
    return [
        f"{name}: {two.get(name, 'absent')} in the store, {one.get(name, 'absent')} wanted"
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    ]


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(values, dict):
        return {prefix: str(values)}
    flat: dict[str, str] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _clip(policy: Policy) -> str | None:
    history = policy.contract.history
    return f"{history.frames} frames, stride {history.stride}" if policy.embeds_clips else None


def _steps(camera: Camera) -> str:
    """The contract's image steps in words: ``256x256 -> rotate_180 -> … -> 224x224``."""
    source = f"{camera.source_height}x{camera.source_width}"
    return " -> ".join([source, *camera.steps, f"{camera.height}x{camera.width}"])


def _encoders(policy: Policy) -> dict[str, EncoderKey]:
    """Of each stored backbone: its identity, and a sha256 of its weights as they are."""
    found = {}
    for path, backbone in policy.stored_backbones().items():
        digest = hashlib.sha256(f"{backbone.name}:{backbone.sha256}".encode())
        module = policy.get_submodule(path)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().data)
        found[path] = EncoderKey(
            id=backbone.name, revision=backbone.revision, sha256=digest.hexdigest()
        )
    return found

"""Frozen backbones whose weights a checkpoint carries, so that it loads without their package.

``reflexarc checkpoint export --merge-frozen`` writes ``frozen.safetensors``, tensors by module
path, and ``frozen.json``: path to ``settings``, what the backbone's architecture needs beside its
config. While such a checkpoint is built, :func:`merged` tells the backbone where its weights are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from reflexarc.contract.errors import CheckpointError
from reflexarc.policy.interface import FrozenBackbone

WEIGHTS_FILE = "frozen.safetensors"
SETTINGS_FILE = "frozen.json"


@dataclass(frozen=True)
class MergedBackbone:
    """One backbone as a checkpoint carries it; ``weights`` by name inside its module."""

    identity: FrozenBackbone
    weights: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    def load_into(self, module: nn.Module) -> None:
        """Raises CheckpointError where names or shapes are not the module's."""
        try:
            module.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise CheckpointError(
                f"{WEIGHTS_FILE} does not fit {self.identity.name}: {error}; export it again"
            ) from error


_merged: ContextVar[Mapping[str, MergedBackbone]] = ContextVar("merged")


def merged_backbone(name: str) -> MergedBackbone | None:
    """The backbone of this name that the checkpoint being built carries; None where none does."""
    return _merged.get({}).get(name)


@contextmanager
def merged(backbones: Mapping[str, MergedBackbone]) -> Iterator[None]:
    """Within the block, backbones of these names are built from these weights."""
    token = _merged.set(backbones)
    try:
        yield
    finally:
        _merged.reset(token)


def to_files(policy: nn.Module, paths: Mapping[str, FrozenBackbone]) -> dict[str, bytes]:
    """The two files of a policy's frozen backbones, by name; none where it has none."""
    if not paths:
        return {}
    weights = {
        f"{path}.{name}": tensor.detach().cpu().contiguous()
        for path in paths
        for name, tensor in policy.get_submodule(path).state_dict().items()
    }
    settings = {path: getattr(policy.get_submodule(path), "settings", {}) for path in paths}
    return {
        WEIGHTS_FILE: safetensors.torch.save(weights),
        SETTINGS_FILE: json.dumps(settings, indent=2).encode(),
    }


def from_files(
    content: Mapping[str, bytes], paths: Mapping[str, FrozenBackbone]
) -> dict[str, MergedBackbone]:
    """The inverse of :func:`to_files`, by the backbones' names; empty where nothing is merged.

    Raises CheckpointError for a file that cannot be read.
    """
    if WEIGHTS_FILE not in content:
        return {}
    try:
        tensors = safetensors.torch.load(content[WEIGHTS_FILE])
        settings = json.loads(content[SETTINGS_FILE])
        return {
            identity.name: MergedBackbone(
                identity,
                {n.removeprefix(f"{path}."): t for n, t in tensors.items()
                 if n.startswith(f"{path}.")},
                settings[path],
            )
            for path, identity in paths.items()
        }  # fmt: skip
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the merged backbones cannot be read: {error}") from error

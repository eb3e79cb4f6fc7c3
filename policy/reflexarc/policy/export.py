"""A checkpoint's folder fit to publish: what serving needs, no training state, verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy.checkpoint import (
    HALF,
    LoadedPolicy,
    load_checkpoint,
    save_checkpoint,
    trained_weights,
)


@dataclass(frozen=True)
class Change:
    """The largest change of a weight by rounding; all zero and empty where none was rounded.

    Attributes:
        tensor: where it is.
        absolute: its size.
        relative: its size over the largest weight of that tensor.
    """

    tensor: str = ""
    absolute: float = 0.0
    relative: float = 0.0


@dataclass(frozen=True)
class Exported:
    """What :func:`export_checkpoint` wrote.

    Attributes:
        source: the checkpoint that was exported.
        directory, fingerprint: of the new one; its fingerprint is another.
        bytes_before, bytes_after: of the two folders.
        change: the largest of any weight.
    """

    source: LoadedPolicy
    directory: Path
    fingerprint: str
    bytes_before: int
    bytes_after: int
    change: Change


def export_checkpoint(
    source: Path,
    destination: Path,
    *,
    half: Literal["fp16", "bf16"] | None = None,
    merge_frozen: bool = False,
) -> Exported:
    """Write a copy without training state, at once and whole, after it was loaded back.

    Frozen backbones stay named, not copied, unless they are merged. Weights in half precision are
    brought to the policy's own when they are loaded; its buffers keep theirs.

    Args:
        source: a checkpoint's folder, or a run's with its ``best`` or ``last``.
        destination: must not exist.
        half: the precision to store weights in; not those of merged backbones.
        merge_frozen: carry frozen backbones' weights too, so that it loads without their package.

    Raises:
        ConfigError: the destination exists, or a weight is beyond the range of ``fp16``.
        CheckpointError: the source does not load, or what was written does not load back equal.
    """
    if destination.exists() or destination.is_symlink():
        raise ConfigError(f"{destination} exists; name a folder that does not", field="output")
    loaded = load_checkpoint(source)
    before = trained_weights(loaded.policy)
    after, change = (before, Change()) if half is None else _rounded(loaded.policy, before, half)
    fingerprint = ""

    def verify(unfinished: Path) -> None:
        nonlocal fingerprint
        again = load_checkpoint(unfinished)
        found = trained_weights(again.policy)
        wrong = [n for n, t in after.items() if not torch.equal(found[n], t.to(found[n].dtype))]
        if wrong:
            raise CheckpointError(f"the export does not load back equal: {wrong[0]} differs")
        fingerprint = again.fingerprint

    origin = {"from": loaded.fingerprint, "weights": half or "as trained",
              "largest_change": change.absolute}  # fmt: skip
    save_checkpoint(
        destination,
        loaded.policy,
        loaded.statistics,
        {**loaded.provenance, "exported": origin},
        weights=after,
        merge_frozen=merge_frozen,
        write_also=verify,
    )
    return Exported(
        source=loaded,
        directory=destination,
        fingerprint=fingerprint,
        bytes_before=folder_bytes(loaded.directory),
        bytes_after=folder_bytes(destination),
        change=change,
    )


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _rounded(
    policy: torch.nn.Module, weights: dict[str, Tensor], half: str
) -> tuple[dict[str, Tensor], Change]:
    """Parameters in half precision, buffers as they are, and the largest change."""
    parameters = {name for name, _ in policy.named_parameters()}
    rounded, largest = dict(weights), Change()
    for name, tensor in weights.items():
        if name not in parameters or tensor.dtype is not torch.float32:
            continue
        rounded[name] = tensor.to(HALF[half])
        if not torch.isfinite(rounded[name]).all():
            raise ConfigError(
                f"{name} holds {tensor.abs().max().item():.3g}, beyond the range of {half}; "
                "use --half bf16",
                field="half",
            )
        absolute = (rounded[name].float() - tensor).abs().max().item() if tensor.numel() else 0.0
        if absolute > largest.absolute:
            largest = Change(name, absolute, absolute / tensor.abs().max().item())
    return rounded, largest

"""Save a policy as a folder, and load it with every byte accounted for.

``policy.json`` names the sha256 of every other file, so its own hash, the fingerprint, stands for
the whole checkpoint. Frozen backbones are named by id and sha256 and verified at load. Nothing is
unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from reflexarc.contract import NormalizationStatistics
from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy import checkpoint_files as files
from reflexarc.policy.backbones import merged as merged_backbones
from reflexarc.policy.devices import resolve_device
from reflexarc.policy.interface import FrozenBackbone, Policy
from reflexarc.policy.processing import Processor
from reflexarc.policy.registry import policy_class

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""What weights may be stored in beside the policy's own precision, to which they are brought."""

_SHOWN_TENSORS = 5


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy in eval mode on its device, and what belongs to it.

    ``policy.contract`` carries the fingerprint and the sha256 of the statistics.
    """

    policy: Policy
    statistics: NormalizationStatistics
    processor: Processor
    provenance: Mapping[str, Any]
    fingerprint: str
    directory: Path


def trained_weights(policy: Policy) -> dict[str, Tensor]:
    """The policy's state without its frozen backbones, on the CPU, contiguous."""
    return {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in policy.state_dict().items()
        if policy.is_trained(name)
    }


def save_checkpoint(
    directory: Path,
    policy: Policy,
    statistics: NormalizationStatistics,
    provenance: Mapping[str, Any],
    *,
    weights: Mapping[str, Tensor] | None = None,
    merge_frozen: bool = False,
    write_also: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint's folder atomically, in the place of an earlier one; returns it.

    Args:
        provenance: JSON values: recipe, dataset fingerprint, versions, seed, metrics.
        weights: in the place of the policy's own ``trained_weights``: the same in half precision.
        merge_frozen: carry the weights of frozen backbones too, beside their names.
        write_also: called with the unfinished folder, to add files that the server never
            reads (``training_state/``); it appears together with the rest.
    """
    directory = Path(directory)
    Processor(policy.contract, statistics)  # refuses statistics of another layout
    content = {
        files.MODEL_FILE: safetensors.torch.save(dict(weights or trained_weights(policy))),
        files.STATISTICS_FILE: statistics.to_json().encode(),
        **policy.extra_files(),
        **(merged_backbones.to_files(policy, policy.frozen_backbones()) if merge_frozen else {}),
    }
    contract = policy.contract.model_copy(
        update={"statistics_sha256": statistics.sha256(), "checkpoint_fingerprint": ""}
    )
    manifest = files.Manifest(
        format_version=files.FORMAT_VERSION,
        family=policy.family,
        config=policy.config.model_dump(mode="json"),
        contract=contract,
        provenance=dict(provenance),
        frozen_backbones={
            path: files.BackboneEntry(name=backbone.name, sha256=backbone.sha256)
            for path, backbone in policy.frozen_backbones().items()
        },
        files={
            name: files.FileEntry(sha256=files.sha256(data), bytes=len(data))
            for name, data in content.items()
        },
    )
    files.write_folder(directory, content, manifest.model_dump_json(indent=2).encode(), write_also)
    return directory


def load_checkpoint(directory: Path, device: str | torch.device = "cpu") -> LoadedPolicy:
    """Load a checkpoint's folder, or that of a run whose ``best`` or ``last`` names one.

    Raises:
        CheckpointError: naming the file, tensor or version that is wrong, and the mend.
        MissingExtraError: a frozen backbone's package is not installed.
    """
    folder = files.resolve_checkpoint(Path(directory))
    manifest, fingerprint = files.read_manifest(folder)
    content = files.read_files(folder, manifest)
    for name in (files.MODEL_FILE, files.STATISTICS_FILE):
        if name not in content:
            raise CheckpointError(f"{folder / files.MANIFEST_FILE} lists no {name}; train again")
    statistics = _statistics(folder, manifest, content[files.STATISTICS_FILE])
    policy = _build(folder, manifest, fingerprint, content)
    _check_backbones(folder, manifest, policy)
    _load_weights(folder, policy, content[files.MODEL_FILE])
    policy.requires_grad_(False).eval()
    policy.to(resolve_device(str(device)))
    return LoadedPolicy(
        policy=policy,
        statistics=statistics,
        processor=Processor(policy.contract, statistics),
        provenance=manifest.provenance,
        fingerprint=fingerprint,
        directory=folder,
    )


def _statistics(folder: Path, manifest: files.Manifest, content: bytes) -> NormalizationStatistics:
    try:
        statistics = NormalizationStatistics.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(f"{folder / files.STATISTICS_FILE}: {error}") from error
    if statistics.sha256() != manifest.contract.statistics_sha256:
        raise CheckpointError(
            f"{folder / files.STATISTICS_FILE} is not what the contract names: "
            f"{statistics.sha256()[:12]}… instead of {manifest.contract.statistics_sha256[:12]}…"
        )
    return statistics


def _build(
    folder: Path, manifest: files.Manifest, fingerprint: str, content: Mapping[str, bytes]
) -> Policy:
    try:
        family = policy_class(manifest.family)
        config = family.config_class.model_validate(manifest.config)
        contract = manifest.contract.model_copy(update={"checkpoint_fingerprint": fingerprint})
        with merged_backbones.merged(_carried(manifest, content)):
            return family.build(config, contract, content)
    except (ConfigError, ValidationError) as error:
        raise CheckpointError(f"{folder / files.MANIFEST_FILE}: {error}") from error


def _carried(
    manifest: files.Manifest, content: Mapping[str, bytes]
) -> dict[str, merged_backbones.MergedBackbone]:
    paths = {
        path: FrozenBackbone(entry.name, entry.sha256)
        for path, entry in manifest.frozen_backbones.items()
    }
    return merged_backbones.from_files(content, paths)


def _check_backbones(folder: Path, manifest: files.Manifest, policy: Policy) -> None:
    found = {
        path: files.BackboneEntry(name=backbone.name, sha256=backbone.sha256)
        for path, backbone in policy.frozen_backbones().items()
    }
    for path in sorted(found.keys() | manifest.frozen_backbones.keys()):
        wanted, here = manifest.frozen_backbones.get(path), found.get(path)
        if wanted != here:
            raise CheckpointError(
                f"{folder} was trained with the frozen {path} {_backbone(wanted)}, "
                f"installed is {_backbone(here)}; install the weights it was trained with"
            )


def _backbone(entry: files.BackboneEntry | None) -> str:
    return f"{entry.name} ({entry.sha256[:12]}…)" if entry is not None else "none"


def _load_weights(folder: Path, policy: Policy, content: bytes) -> None:
    path = folder / files.MODEL_FILE
    try:
        weights = safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    expected = trained_weights(policy)
    weights = {name: _widened(tensor, expected.get(name)) for name, tensor in weights.items()}
    problems = [
        *_listed("lacks", expected.keys() - weights.keys()),
        *_listed("has the unexpected", weights.keys() - expected.keys()),
        *_listed(
            "has another shape or dtype of",
            {
                name
                for name in expected.keys() & weights.keys()
                if (expected[name].shape, expected[name].dtype)
                != (weights[name].shape, weights[name].dtype)
            },
        ),
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the config in {files.MANIFEST_FILE}: it {'; it '.join(problems)}"
        )
    policy.load_state_dict({**policy.state_dict(), **weights})


def _widened(tensor: Tensor, expected: Tensor | None) -> Tensor:
    """Weights of ``reflexarc checkpoint export --half`` in the precision of the policy."""
    if expected is not None and expected.dtype is torch.float32 and tensor.dtype in HALF.values():
        return tensor.float()
    return tensor


def _listed(what: str, names: set[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(sorted(names)[:_SHOWN_TENSORS])
    more = f" and {len(names) - _SHOWN_TENSORS} more" if len(names) > _SHOWN_TENSORS else ""
    return [f"{what} {shown}{more}"]

"""How features are stored, and how stored rows are read: bfloat16 lies on disk as uint16."""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reflexarc.contract.errors import ConfigError
from reflexarc.training.config_base import FeatureDtype

FeatureArray: TypeAlias = npt.NDArray[Any]
"""Rows as they lie on disk: float16, float32, uint16 (bfloat16's bits) or uint8 (pixels)."""
FeatureRows: TypeAlias = Tensor | FeatureArray

NUMPY_DTYPES: dict[str, type[np.generic]] = {
    "fp16": np.float16,
    "bf16": np.uint16,
    "fp32": np.float32,
    "uint8": np.uint8,
}
_TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def torch_dtype(dtype: FeatureDtype) -> torch.dtype:
    """The dtype in memory."""
    return _TORCH_DTYPES[dtype]


def stored_name(rows: Tensor, dtype: FeatureDtype) -> str:
    """A key of ``NUMPY_DTYPES``: pixels stay ``uint8``, everything else becomes ``dtype``."""
    return "uint8" if rows.dtype == torch.uint8 else dtype


def to_stored(rows: Tensor, dtype: FeatureDtype, name: str = "features") -> FeatureArray:
    """Rows as they are written; pixels stay uint8.

    Raises ConfigError where a value is not finite, or beyond the range of ``dtype``.
    """
    plain = rows.detach().cpu().contiguous()
    if plain.dtype == torch.uint8:
        return plain.numpy()
    stored = plain.to(_TORCH_DTYPES[dtype])
    if not bool(torch.isfinite(stored).all()):
        _refuse_values(plain, dtype, name)
    if dtype == "bf16":
        bits: FeatureArray = stored.view(torch.int16).numpy().view(np.uint16)
        return bits
    return stored.numpy()


def as_rows(rows: FeatureRows) -> Tensor:
    """A tensor over the same memory, mapped or not; uint16 is read as bfloat16. Never written."""
    if isinstance(rows, Tensor):
        return rows
    bits = rows.view(np.int16) if rows.dtype == np.uint16 else rows
    with warnings.catch_warnings():
        # A map is read-only, so that one larger than the memory needs no room for copies.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensor = torch.from_numpy(bits)
    return tensor.view(torch.bfloat16) if rows.dtype == np.uint16 else tensor


def _refuse_values(rows: Tensor, dtype: FeatureDtype, name: str) -> None:
    if not bool(torch.isfinite(rows).all()):
        raise ConfigError(
            f"the frozen front gives {name} that are not finite; look at its weights and at the "
            "images with: reflexarc data inspect",
            field=name,
        )
    raise ConfigError(
        f"{name} reach {float(rows.float().abs().max()):.4g}, beyond the range of {dtype}; store "
        "them with --dtype bf16 (data.feature_dtype: bf16)",
        field="data.feature_dtype",
    )

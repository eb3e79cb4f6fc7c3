"""Rows of stored features as a batch wants them."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_BLOCK_BYTES = 2**19
"""Half-precision rows that are gathered before they are widened: they stay in a core's cache."""


def gather_rows(rows: Tensor, wanted: Tensor) -> Tensor:
    """``rows[wanted]``, features as float32, pixels as uint8; on the device of ``rows``.

    Args:
        rows: ``(F, ...)`` in memory or over a memory map, float16, bfloat16, float32 or uint8.
        wanted: ``int64 (N,)``.
    """
    wanted = wanted.to(rows.device)
    if rows.dtype not in _HALF:
        return rows.index_select(0, wanted)
    if rows.device.type != "cpu":
        return rows.index_select(0, wanted).float()
    widened = torch.empty((len(wanted), *rows.shape[1:]), dtype=torch.float32)
    block = max(1, _BLOCK_BYTES // max(1, rows[0].nbytes)) if len(rows) else 1
    for start in range(0, len(wanted), block):
        some = wanted[start : start + block]
        widened[start : start + block].copy_(rows.index_select(0, some))
    return widened

"""Rows of stored features as a batch wants them."""

from __future__ import annotations

import torch
from torch import Tensor

from reflexarc.training.feature_store.row_cache import RowCache

_HALF = (torch.float16, torch.bfloat16)
_LARGE_ROW = 2**14
_BLOCK_BYTES = 2**20


def gather_rows(rows: Tensor | RowCache, wanted: Tensor) -> Tensor:
    """``rows[wanted]``, features as float32, pixels as uint8; on the device of ``rows``.

    Args:
        rows: ``(F, ...)`` in memory or over a memory map, float16, bfloat16, float32 or uint8;
            or what keeps some of them in memory.
        wanted: ``int64 (N,)``.
    """
    if isinstance(rows, RowCache):
        found = rows.gather(wanted)
        return found.float() if found.dtype in _HALF else found
    wanted = wanted.to(rows.device)
    if rows.dtype not in _HALF:
        return rows.index_select(0, wanted)
    if rows.device.type != "cpu":
        return rows.index_select(0, wanted).float()
    widened = torch.empty((len(wanted), *rows.shape[1:]), dtype=torch.float32)
    # Not gathered whole before they are widened: what was just read is still in a core's cache.
    row_bytes = rows.element_size() * rows[:1].numel()
    if row_bytes >= _LARGE_ROW:
        for into, row in zip(widened.unbind(), wanted.tolist(), strict=True):
            into.copy_(rows[row])
        return widened
    block = _BLOCK_BYTES // max(1, row_bytes)
    for start in range(0, len(wanted), block):
        some = wanted[start : start + block]
        widened[start : start + block].copy_(rows.index_select(0, some))
    return widened

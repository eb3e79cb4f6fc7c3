"""Shapes, dtypes and devices of a scan's tensors, and whether they are finite."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from reflexarc.policy.layers.selective_scan.errors import ScanInputError

CHECK_VARIABLE = "REFLEXARC_SCAN_CHECK"


def check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    gate: Tensor | None,
) -> None:  # fmt: skip
    """Every tensor has the shape that ``u`` and ``A`` ask for, and their device.

    Raises:
        ScanInputError: naming the tensor, what it is and what it should be.
    """
    if u.ndim != 3:
        raise _wrong("u", "shape", tuple(u.shape), "(batch, length, channels)")
    if A.ndim != 2 or A.shape[0] != u.shape[2]:
        raise _wrong("A", "shape", tuple(A.shape), f"(channels, state) = ({u.shape[2]}, N)")
    per_step, per_state = tuple(u.shape), (*u.shape[:2], A.shape[1])
    wanted = {
        "u": (u, per_step), "delta": (delta, per_step), "A": (A, tuple(A.shape)),
        "B": (B, per_state), "C": (C, per_state), "D": (D, per_step[2:]), "gate": (gate, per_step),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise _wrong(name, "shape", tuple(tensor.shape), shape)
        if tensor.device != u.device:
            raise _wrong(name, "device", tensor.device, u.device)
        if not tensor.is_floating_point():
            raise _wrong(name, "dtype", tensor.dtype, "a floating dtype")


def checks_values() -> bool:
    """Whether every scan looks for values that are not finite (``REFLEXARC_SCAN_CHECK=1``)."""
    return os.environ.get(CHECK_VARIABLE, "0") not in ("", "0")


def check_finite(**tensors: Tensor | None) -> None:
    """No tensor holds a NaN or an infinity. It waits for an accelerator.

    Raises:
        ScanInputError: naming the tensor, how many values, and the index of the first.
    """
    for name, tensor in tensors.items():
        # A sum is finite only if every value is, and costs a quarter of looking at each; a sum
        # that overflows is looked at again.
        if tensor is None or bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
            continue
        bad = ~torch.isfinite(tensor.detach())
        if not bool(bad.any()):
            continue
        index = tuple(bad.nonzero()[0].tolist())
        raise ScanInputError(
            f"{name} {tuple(tensor.shape)} holds {int(bad.sum())} values that are not finite, the "
            f"first is {float(tensor.detach()[index])} at {index}; look at the data, the "
            f"statistics and the learning rate, or set {CHECK_VARIABLE}=1 to find the layer",
            field=name,
        )


def check_lengths(lengths: Tensor, tokens: Tensor) -> None:
    """``lengths (B,)`` are integers of 1 to L for ``tokens (B, L, D)``.

    Raises:
        ScanInputError: they are not; the range is looked at on the CPU alone.
    """
    if tuple(lengths.shape) != (len(tokens),):
        raise _wrong("lengths", "shape", tuple(lengths.shape), f"({len(tokens)},)")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise _wrong("lengths", "dtype", lengths.dtype, "an integer dtype")
    if lengths.device.type != "cpu" or not len(lengths) or torch.compiler.is_compiling():
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 1 or high > tokens.shape[1]:
        raise _wrong("lengths", "range", f"{low} to {high}", f"within 1 to {tokens.shape[1]}")


def may_look_at(tensor: Tensor) -> bool:
    """Whether its values may be read now: not while compiling or capturing, not on ``meta``."""
    if tensor.is_meta or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _wrong(name: str, what: str, found: object, wanted: object) -> ScanInputError:
    return ScanInputError(f"{what} of {name} is {found}, it must be {wanted}", field=name)

"""The scan and the convolution of ``native.cpp``: C++ on the CPU, forward and backward.

Optional: :func:`load` raises where it cannot be compiled. Results are the same whatever the
number of threads and whether gradients are wanted, and differ from the blocked scan's by rounding.
ctypes releases the interpreter's lock, so several threads may scan at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reflexarc.policy.layers.selective_scan.errors import ScanUnavailableError
from reflexarc.policy.layers.selective_scan.native_build import load_library

# States kept for the backward pass: one every so many steps, the others are computed anew.
CHUNK = 16
_SUFFIX = {torch.float32: "float", torch.float64: "double"}
_Function = Callable[[Any], None]


class _Rows(ctypes.Structure):
    """``Rows`` of native.cpp: a tensor (batch, length, width) with unit stride in width."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("step_stride", ctypes.c_int64),
    )


def _structure(name: str, integers: str, rest: str) -> type[ctypes.Structure]:
    """A structure of integers, then of rows (names with a colon) and pointers, in this order."""
    fields: list[tuple[str, Any]] = [(field, ctypes.c_int64) for field in integers.split()]
    for field in rest.split():
        kind: Any = _Rows if field.endswith(":") else ctypes.c_void_p
        fields.append((field.rstrip(":"), kind))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Scan = _structure(
    "_Scan",
    "batch length channels state chunk threads softplus",
    "u: delta: B: C: gate: A D y: checkpoints "
    "grad_y: grad_u: grad_delta: grad_gate: grad_B grad_C grad_A grad_D",
)
_Convolution = _structure(
    "_Convolution",
    "batch length channels taps threads",
    "x: weight bias y: grad_y: grad_x: grad_weight grad_bias",
)


class _Library:
    """The compiled functions by name and dtype, and how they divide channels."""

    def __init__(self) -> None:
        self._library = load_library()
        self.vector_bytes = int(self._library.vector_bytes())
        self._blocks_in_group = int(self._library.blocks_in_group())
        self.has_threads = bool(self._library.has_threads())

    def function(self, name: str, dtype: torch.dtype) -> _Function:
        function: _Function = getattr(self._library, f"{name}_{_SUFFIX[dtype]}")
        return function

    def lanes(self, dtype: torch.dtype) -> int:
        return self.vector_bytes // dtype.itemsize

    def groups(self, channels: int, dtype: torch.dtype) -> int:
        return -(-channels // (self.lanes(dtype) * self._blocks_in_group))


@cache
def load() -> _Library:
    """Compile or load the library, and see that it computes what it should.

    Raises:
        ScanUnavailableError: it cannot be compiled or loaded, or computes something else.
    """
    library = _Library()
    u = torch.linspace(-1.0, 1.0, 40).view(1, 2, 20)
    ones, A = torch.ones(1, 2, 1), -torch.ones(20, 1)
    found = _run_forward(library, (u, u + 2.0, A, ones, ones, None, None), False, None)
    first = (u[:, 0] + 2.0) * u[:, 0]
    second = torch.exp(-u[:, 1] - 2.0) * first + (u[:, 1] + 2.0) * u[:, 1]
    if not torch.allclose(found, torch.stack([first, second], 1), atol=1e-5):
        raise ScanUnavailableError("what was compiled gives wrong results")
    return library


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    gate: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """As :func:`reflexarc.policy.layers.selective_scan.selective_scan`; all fp32 or all fp64."""
    inputs = (u, delta, A, B, C, D, gate)
    wanted = (tensor is not None and tensor.requires_grad for tensor in inputs)
    if torch.is_grad_enabled() and any(wanted):
        y: Tensor = _NativeScan.apply(*inputs, softplus)  # type: ignore[no-untyped-call]
        return y
    return _run_forward(load(), inputs, softplus, None)


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``silu`` of the causal convolution: ``x (B, L, D)``, ``weight (D, K)``, ``bias (D,)``."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        y: Tensor = _NativeConvolution.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return _run_convolution(x, weight, bias)


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _run_forward(
    library: _Library, inputs: _Inputs, softplus: bool, checkpoints: Tensor | None
) -> Tensor:
    y = inputs[0].new_empty(inputs[0].shape)
    keep, structure = _scan_arguments(inputs, softplus)
    structure.y = _rows(y)
    structure.checkpoints = None if checkpoints is None else checkpoints.data_ptr()
    library.function("scan_forward", y.dtype)(ctypes.byref(structure))
    del keep
    return y


def _scan_arguments(inputs: _Inputs, softplus: bool) -> tuple[list[Tensor], Any]:
    """The structure of the inputs, and the tensors that it points into, to be kept alive."""
    u, delta, A, B, C, D, gate = inputs
    u, delta, B, C = (_unit_stride(tensor) for tensor in (u, delta, B, C))
    A = A.t().contiguous()
    structure = _Scan(
        *u.shape, A.shape[0], CHUNK, torch.get_num_threads(), int(softplus),
        u=_rows(u), delta=_rows(delta), B=_rows(B), C=_rows(C), A=A.data_ptr(),
    )  # fmt: skip
    keep = [u, delta, A, B, C]
    if D is not None:
        keep.append(D.contiguous())
        structure.D = keep[-1].data_ptr()
    if gate is not None:
        keep.append(_unit_stride(gate))
        structure.gate = _rows(keep[-1])
    return keep, structure


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> _Rows:
    return _Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class _NativeScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        gate: Tensor | None, softplus: bool,
    ) -> Tensor:  # fmt: skip
        library, (batch, length, channels) = load(), u.shape
        chunks, lanes = -(-length // CHUNK), library.lanes(u.dtype)
        blocks = -(-channels // lanes)
        checkpoints = u.new_empty(batch, blocks, max(0, chunks - 1), A.shape[1], lanes)
        inputs = (u, delta, A, B, C, D, gate)
        ctx.save_for_backward(*inputs, checkpoints)
        ctx.softplus = softplus
        return _run_forward(library, inputs, softplus, checkpoints)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, checkpoints = ctx.saved_tensors
        u, _, A, _, _, D, gate = inputs
        library, (batch, length, channels), state = load(), u.shape, A.shape[1]
        keep, structure = _scan_arguments(tuple(inputs), ctx.softplus)
        grad_y = _unit_stride(grad_y)
        grad_u, grad_delta = u.new_empty(u.shape), u.new_empty(u.shape)
        groups = library.groups(channels, u.dtype)
        grad_B, grad_C = u.new_empty(2, groups, batch, length, state)
        grad_A = u.new_empty(batch, state, channels)
        structure.checkpoints = checkpoints.data_ptr()
        structure.grad_y, structure.grad_u = _rows(grad_y), _rows(grad_u)
        structure.grad_delta, structure.grad_A = _rows(grad_delta), grad_A.data_ptr()
        structure.grad_B, structure.grad_C = grad_B.data_ptr(), grad_C.data_ptr()
        grad_D = None if D is None else u.new_empty(batch, channels)
        if grad_D is not None:
            structure.grad_D = grad_D.data_ptr()
        grad_gate = None if gate is None else u.new_empty(u.shape)
        if grad_gate is not None:
            structure.grad_gate = _rows(grad_gate)
        library.function("scan_backward", u.dtype)(ctypes.byref(structure))
        del keep
        to_A = grad_A.sum(0).t()
        to_D = None if grad_D is None else grad_D.sum(0)
        return grad_u, grad_delta, to_A, grad_B.sum(0), grad_C.sum(0), to_D, grad_gate, None


def _run_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    keep, structure = _convolution_arguments(x, weight, bias)
    structure.y = _rows(y)
    load().function("convolve", x.dtype)(ctypes.byref(structure))
    del keep
    return y


def _convolution_arguments(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[list[Tensor], Any]:
    x, taps, bias = _unit_stride(x), weight.t().contiguous(), bias.contiguous()
    structure = _Convolution(
        *x.shape, len(taps), torch.get_num_threads(),
        x=_rows(x), weight=taps.data_ptr(), bias=bias.data_ptr(),
    )  # fmt: skip
    return [x, taps, bias], structure


class _NativeConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _run_convolution(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        keep, structure = _convolution_arguments(x, weight, bias)
        grad_y, grad_x = _unit_stride(grad_y), x.new_empty(x.shape)
        grad_weight = x.new_empty(len(x), weight.shape[1], len(weight))
        grad_bias = x.new_empty(len(x), len(weight))
        structure.grad_y, structure.grad_x = _rows(grad_y), _rows(grad_x)
        structure.grad_weight, structure.grad_bias = grad_weight.data_ptr(), grad_bias.data_ptr()
        load().function("convolve_backward", x.dtype)(ctypes.byref(structure))
        del keep
        return grad_x, grad_weight.sum(0).t(), grad_bias.sum(0)

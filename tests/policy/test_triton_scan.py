"""The Triton scan against a plain loop, on a GPU or in Triton's interpreter.

Without a GPU: ``pip install triton``, then
``TRITON_INTERPRET=1 pytest tests/policy/test_triton_scan.py`` (minutes).
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from reflexarc.policy.layers.selective_scan import ScanUnavailableError, selective_scan
from reflexarc.policy.layers.selective_scan.choice import Backend, backend_for, make

from .scan_reference import loop_scan, relative_error, scan_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NAMES = ("u", "delta", "A", "B", "C", "D", "gate")

if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip(
        "no GPU; with triton installed: TRITON_INTERPRET=1 pytest tests/policy/test_triton_scan.py",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def backend() -> Backend:
    try:
        return make("triton")
    except ScanUnavailableError as error:
        pytest.skip(error.message)


@pytest.mark.parametrize("shift", [-4.0, 2.0])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "state"),
    [
        (1, 1, 1, 1),
        (2, 3, 5, 3),
        (3, 33, 4, 2),  # one step into a second tile of 32
        (1, 70, 6, 16),
        (2, 11, 3, 64),  # the action head's state
        (1, 5, 2, 130),
    ],
)
def test_values_and_gradients_against_a_loop_in_double(
    backend: Backend, batch: int, length: int, channels: int, state: int, shift: float
) -> None:
    exact = scan_inputs(batch, length, channels, state, torch.float64, shift=shift)
    single = [tensor.detach().float().to(DEVICE).requires_grad_() for tensor in exact]
    wanted = loop_scan(*exact, softplus=True)
    found = selective_scan(*single, softplus=True, backend=backend)
    assert relative_error(found.cpu(), wanted) < 1e-5
    grad_y = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    reference = torch.autograd.grad(wanted, exact, grad_y.double().cpu())
    gradients = torch.autograd.grad(found, single, grad_y)
    for name, gradient, exactly in zip(NAMES, gradients, reference, strict=True):
        assert relative_error(gradient.cpu(), exactly) < 1e-4, name


def test_without_gate_weight_and_softplus(backend: Backend) -> None:
    u, raw, A, B, C, _, _ = scan_inputs(2, 9, 5, 3, torch.float64)
    exact = [u, raw.detach().exp().requires_grad_(), A, B, C]
    single = [tensor.detach().float().to(DEVICE).requires_grad_() for tensor in exact]
    wanted, found = loop_scan(*exact), selective_scan(*single, backend=backend)
    assert relative_error(found.cpu(), wanted) < 1e-5
    expected = torch.autograd.grad(wanted.square().sum(), exact)
    gradients = torch.autograd.grad(found.square().sum(), single)
    for name, gradient, exactly in zip(NAMES, gradients, expected, strict=False):
        assert relative_error(gradient.cpu(), exactly) < 1e-4, name


def test_strides_and_half_precision(backend: Backend) -> None:
    inputs = [tensor.detach().to(DEVICE) for tensor in scan_inputs(2, 7, 5, 4)]
    wanted = selective_scan(*inputs, softplus=True, backend=backend)
    B, C = torch.cat([inputs[3], inputs[4]], dim=-1).split(4, dim=-1)
    first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (inputs[0], inputs[6])]
    strided = [first[0], inputs[1], inputs[2].t().contiguous().t(), B, C, inputs[5], first[1]]
    assert torch.equal(selective_scan(*strided, softplus=True, backend=backend), wanted)
    half = [tensor.to(torch.bfloat16) for tensor in inputs]
    found = selective_scan(*half, softplus=True, backend=backend)
    again = selective_scan(*(t.float() for t in half), softplus=True, backend=backend)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, again.to(torch.bfloat16))


def test_repeated_results_and_those_without_gradients_are_the_same(backend: Backend) -> None:
    def run() -> tuple[Tensor, ...]:
        inputs = [t.detach().to(DEVICE).requires_grad_() for t in scan_inputs(2, 35, 6, 4)]
        y = selective_scan(*inputs, softplus=True, backend=backend)
        with torch.no_grad():
            assert torch.equal(selective_scan(*inputs, softplus=True, backend=backend), y)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), inputs))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_nan_is_carried_into_the_output(backend: Backend) -> None:
    inputs = [tensor.detach().to(DEVICE) for tensor in scan_inputs(1, 5, 2, 2)]
    inputs[1][0, 0, 0] = float("nan")
    y = selective_scan(*inputs, softplus=True, backend=backend)
    assert torch.isnan(y[0, :, 0]).all()
    assert torch.isfinite(y[0, :, 1]).all()


def test_double_precision_is_left_to_the_blocked_scan(backend: Backend) -> None:
    if DEVICE == "cuda":
        assert backend_for(torch.device(DEVICE), torch.float64).name == "blocked"
    inputs = scan_inputs(1, 4, 2, 2, torch.float64)
    tensors = [tensor.detach().to(DEVICE) for tensor in inputs]
    found = selective_scan(*tensors, softplus=True)
    assert relative_error(found.cpu(), loop_scan(*inputs, softplus=True)) < 1e-12

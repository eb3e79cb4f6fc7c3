"""The blocked scan against a plain loop: values, gradients, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from reflexarc.policy.layers import selective_scan as scan_module
from reflexarc.policy.layers.selective_scan import selective_scan


def loop_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for u_t, d_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True):
        state = torch.exp(d_t[..., None] * A) * state + (d_t * u_t)[..., None] * B_t[:, None]
        outputs.append((state * C_t[:, None]).sum(-1))
    return torch.stack(outputs, 1)


def scan_inputs(
    batch: int, length: int, channels: int, state: int, dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tensors = [
        draw(batch, length, channels),
        torch.nn.functional.softplus(draw(batch, length, channels)),
        -torch.exp(draw(channels, state)),
        draw(batch, length, state),
        draw(batch, length, state),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows and four steps a block at 3 channels and 2 states, so that blocks do not fit."""
    monkeypatch.setattr(scan_module, "CPU_STEP_VALUES", 12)
    monkeypatch.setattr(scan_module, "CPU_BUFFER_VALUES", 48)


@pytest.mark.parametrize(
    ("batch", "length", "channels", "state"),
    [(1, 1, 1, 1), (3, 2, 4, 2), (5, 101, 24, 16), (64, 11, 96, 16), (2, 300, 384, 16)],
)
def test_values_and_gradients_equal_a_plain_loop(
    batch: int, length: int, channels: int, state: int
) -> None:
    inputs = scan_inputs(batch, length, channels, state)
    found, wanted = selective_scan(*inputs), loop_scan(*inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    grad_y = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, inputs, grad_y)
    expected = torch.autograd.grad(wanted, inputs, grad_y)
    for gradient, reference in zip(gradients, expected, strict=True):
        scale = reference.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, reference / scale, atol=2e-5, rtol=0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("batch", "length"), [(1, 4), (2, 5), (3, 9), (5, 12)])
def test_gradients_are_exact_across_block_borders(batch: int, length: int) -> None:
    inputs = scan_inputs(batch, length, 3, 2, torch.float64)
    torch.testing.assert_close(selective_scan(*inputs), loop_scan(*inputs), atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(selective_scan, inputs)


def test_strong_decay_neither_overflows_nor_vanishes() -> None:
    u, delta, A, B, C = scan_inputs(2, 64, 8, 4, torch.float64)
    y = selective_scan(u, delta * 50, A * 20, B, C)
    torch.testing.assert_close(y, loop_scan(u, delta * 50, A * 20, B, C))
    assert torch.isfinite(y).all()


def test_the_same_with_and_without_gradients() -> None:
    inputs = scan_inputs(3, 50, 16, 8)
    with_gradients = selective_scan(*inputs)
    with torch.no_grad():
        assert torch.equal(selective_scan(*inputs), with_gradients)
    with torch.inference_mode():
        assert torch.equal(selective_scan(*inputs), with_gradients)


def test_strided_inputs_are_accepted() -> None:
    inputs = scan_inputs(3, 20, 8, 4)
    strided = [tensor.detach().transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    torch.testing.assert_close(selective_scan(*strided), selective_scan(*inputs))


def test_only_the_inputs_that_want_a_gradient_need_one() -> None:
    u, delta, A, B, C = (tensor.detach() for tensor in scan_inputs(2, 10, 4, 2))
    A.requires_grad_()
    (found,) = torch.autograd.grad(selective_scan(u, delta, A, B, C).sum(), A)
    (wanted,) = torch.autograd.grad(loop_scan(u, delta, A, B, C).sum(), A)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_threads_do_not_share_scratch() -> None:
    def forward_and_backward(seed: int) -> list[Tensor]:
        inputs = scan_inputs(4, 80, 96, 16, seed=seed)
        y = selective_scan(*inputs)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]

    alone = [forward_and_backward(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(forward_and_backward, range(8)))
    for tensors, others in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))

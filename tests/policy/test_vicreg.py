"""VICReg's terms against a plain numpy implementation, and what they are for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reflexarc.policy.layers.reductions import masked_mean
from reflexarc.policy.layers.vicreg import EPSILON, column_deviation, vicreg_terms


def naive(rows: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Both terms, one dimension and one pair of dimensions after the other."""
    dimensions = rows.shape[1]
    hinge = penalty = 0.0
    for i in range(dimensions):
        hinge += max(0.0, 1.0 - np.sqrt(rows[:, i].var(ddof=1) + EPSILON)) / dimensions
        for j in range(dimensions):
            if i != j:
                penalty += np.cov(rows[:, i], rows[:, j], ddof=1)[0, 1] ** 2 / dimensions
    return hinge, penalty


def random_rows(
    seed: int, count: int, dimensions: int, scale: float = 0.8, shift: float = 0.0
) -> torch.Tensor:
    """Correlated float64 rows with a mean that is not zero."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(dimensions, dimensions)) / dimensions**0.5
    rows = random.normal(size=(count, dimensions)) @ mixing * scale
    return torch.from_numpy(rows + random.normal(size=dimensions) + shift)


def whitened(count: int, dimensions: int) -> torch.Tensor:
    """Rows whose covariance is the identity."""
    rows = random_rows(7, count, dimensions)
    rows = rows - rows.mean(0)
    orthonormal, _ = torch.linalg.qr(rows)
    return orthonormal * (count - 1) ** 0.5


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(2, 24),
    dimensions=st.integers(1, 6),
    scale=st.floats(1e-3, 10.0),
    shift=st.floats(-20.0, 20.0),
)
def test_terms_equal_the_plain_implementation(
    seed: int, count: int, dimensions: int, scale: float, shift: float
) -> None:
    rows = random_rows(seed, count, dimensions, scale, shift)
    hinge, penalty = vicreg_terms(rows)
    wanted_hinge, wanted_penalty = naive(rows.numpy())
    assert hinge.item() == pytest.approx(wanted_hinge, rel=1e-6, abs=1e-9)
    assert penalty.item() == pytest.approx(wanted_penalty, rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), count=st.integers(3, 20), padding=st.integers(0, 8))
def test_padding_and_the_order_of_rows_and_dimensions_change_nothing(
    seed: int, count: int, padding: int
) -> None:
    rows = random_rows(seed, count, 5)
    wanted = vicreg_terms(rows)
    padded = torch.cat([rows, torch.full((padding, 5), 1e3, dtype=rows.dtype)])
    mask = torch.arange(count + padding) < count
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count + padding, generator=generator)
    columns = torch.randperm(5, generator=generator)
    shuffled = padded[order][:, columns]
    torch.testing.assert_close(vicreg_terms(shuffled, mask[order]), wanted)
    torch.testing.assert_close(
        column_deviation(shuffled, mask[order]), rows.std(0)[columns], atol=1e-9, rtol=1e-6
    )


def test_whitened_rows_cost_nothing_and_twice_their_width_neither() -> None:
    for factor in (1.0, 2.0):
        hinge, penalty = vicreg_terms(whitened(64, 8) * factor)
        assert hinge.item() == 0
        assert penalty.item() == pytest.approx(0, abs=1e-20)


def test_collapse_is_seen_and_undone() -> None:
    """Equal rows cost nearly 1, and a step along the gradient moves nearly equal ones apart."""
    point = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    collapsed = point.repeat(16, 1)
    assert vicreg_terms(collapsed)[0].item() == pytest.approx(1 - EPSILON**0.5, abs=1e-6)
    assert column_deviation(collapsed).max().item() == pytest.approx(0, abs=1e-6)

    noise = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    nearly = (collapsed + 1e-3 * noise).requires_grad_()
    hinge, _ = vicreg_terms(nearly)
    (gradient,) = torch.autograd.grad(hinge, nearly)
    assert torch.isfinite(gradient).all()
    assert (column_deviation(nearly - gradient) > 1.5 * column_deviation(nearly)).all()


def test_copies_of_one_dimension_are_penalised() -> None:
    rows = whitened(64, 2)
    copied = torch.cat([rows[:, :1]] * 3, dim=1)
    hinge, penalty = vicreg_terms(copied)
    assert hinge.item() == pytest.approx(0, abs=1e-9)
    assert penalty.item() == pytest.approx(6 * 1.0 / 3)  # six pairs of covariance 1, over D


def test_the_gradient_is_exact_although_the_mean_carries_none() -> None:
    rows = random_rows(3, 7, 3, scale=0.4).requires_grad_()
    mask = torch.tensor([True] * 5 + [False] * 2)
    assert torch.autograd.gradcheck(lambda r: vicreg_terms(r, mask), rows)
    sum(vicreg_terms(rows, mask)).backward()  # type: ignore[union-attr]
    assert rows.grad is not None
    assert rows.grad[:5].abs().min() > 0
    assert rows.grad[5:].abs().max() == 0


@pytest.mark.parametrize("real", [0, 1])
def test_less_than_two_real_rows_cost_nothing(real: int) -> None:
    rows = random_rows(0, 4, 3).requires_grad_()
    hinge, penalty = vicreg_terms(rows, torch.arange(4) < real)
    assert hinge.item() == 0 and penalty.item() == 0
    (hinge + penalty).backward()
    assert rows.grad is not None and rows.grad.abs().max() == 0


def test_autocast_does_not_coarsen_the_products() -> None:
    rows = random_rows(5, 64, 16, scale=0.1, shift=3.0).float()
    wanted = vicreg_terms(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vicreg_terms(rows)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_a_masked_mean_ignores_what_is_masked_and_is_zero_over_nothing() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 500.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    mean = masked_mean(values, mask)
    assert mean.item() == 2.0
    mean.backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, mask.float() / 3)
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0

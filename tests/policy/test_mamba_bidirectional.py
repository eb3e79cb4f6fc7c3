"""Mamba in both directions: who sees whom, what padding touches, sizes; and bad tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reflexarc.policy.layers.mamba import Mamba, MambaStack
from reflexarc.policy.layers.selective_scan import ScanInputError


def make_stack(bidirectional: bool = True) -> MambaStack:
    torch.manual_seed(0)
    return MambaStack(16, depth=2, d_state=4, mlp_hidden=16, bidirectional=bidirectional)


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_second_direction_has_what_lies_between_the_projections() -> None:
    one, both = Mamba(256), Mamba(256, bidirectional=True)
    extra = {n: p.numel() for n, p in both.named_parameters() if n.startswith("reverse.")}
    assert set(extra) == {
        "reverse.A_log", "reverse.D", "reverse.conv1d.weight", "reverse.conv1d.bias",
        "reverse.x_proj.weight", "reverse.dt_proj.weight", "reverse.dt_proj.bias",
    }  # fmt: skip
    assert sum(extra.values()) == 44_544
    assert sum(p.numel() for p in both.parameters()) == 437_760 + 44_544
    assert {n for n, p in both.named_parameters() if hasattr(p, "_no_weight_decay")} == {
        prefix + name for prefix in ("", "reverse.") for name in ("A_log", "D", "dt_proj.bias")
    }
    assert [n for n, _ in one.named_parameters()] == [
        n for n, _ in both.named_parameters() if not n.startswith("reverse.")
    ]


def test_every_token_sees_every_other() -> None:
    tokens = tokens_of(1, 12, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(make_stack()(tokens)[0, 7].square().sum(), tokens)
    assert (gradient[0].abs().sum(-1) > 0).all()


def test_with_both_directions_alike_a_mirrored_row_gives_mirrored_outputs() -> None:
    torch.manual_seed(0)
    mixer = Mamba(16, d_state=4, bidirectional=True)
    assert mixer.reverse is not None
    own = dict(mixer.state_dict())
    shared = {name: own[name] for name in mixer.reverse.state_dict()}
    mixer.reverse.load_state_dict(shared)
    tokens = tokens_of(2, 9, 16)
    torch.testing.assert_close(mixer(tokens.flip(1)), mixer(tokens).flip(1))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_reaches_no_real_token(bidirectional: bool) -> None:
    stack, lengths = make_stack(bidirectional), torch.tensor([7, 1, 10])
    tokens, others = tokens_of(3, 10, 16), tokens_of(3, 10, 16, seed=1)
    real = torch.arange(10) < lengths[:, None]
    changed = torch.where(real[..., None], tokens, 100 * others)
    found, again = stack(tokens, lengths), stack(changed, lengths)
    assert torch.equal(found[real], again[real])
    for row, length in enumerate(lengths.tolist()):
        alone = stack(tokens[row : row + 1, :length])
        torch.testing.assert_close(found[row, :length], alone[0], atol=1e-5, rtol=1e-5)


def test_no_gradient_flows_into_padding() -> None:
    stack, lengths = make_stack(), torch.tensor([4, 6])
    tokens = tokens_of(2, 6, 16).requires_grad_()
    outputs = stack(tokens, lengths)[torch.arange(6) < lengths[:, None]]
    (gradient,) = torch.autograd.grad(outputs.square().sum(), tokens)
    assert (gradient[0, :4].abs().sum(-1) > 0).all()
    assert (gradient[0, 4:] == 0).all()


def test_full_lengths_are_no_lengths() -> None:
    stack, tokens = make_stack(), tokens_of(2, 6, 16)
    assert torch.equal(stack(tokens, torch.tensor([6, 6])), stack(tokens))


def test_the_same_bits_with_and_without_gradients() -> None:
    stack, tokens = make_stack(), tokens_of(3, 11, 16)
    with_gradients = stack(tokens)
    with torch.inference_mode():
        assert torch.equal(stack(tokens), with_gradients)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([3]), r"shape of lengths is \(1,\), it must be \(2,\)"),
        (torch.tensor([3.0, 2.0]), r"dtype of lengths is torch\.float32"),
        (torch.tensor([0, 2]), "range of lengths is 0 to 2, it must be within 1 to 6"),
        (torch.tensor([1, 7]), "range of lengths is 1 to 7, it must be within 1 to 6"),
    ],
)
def test_wrong_lengths_are_named(lengths: Tensor, message: str) -> None:
    with pytest.raises(ScanInputError, match=message):
        make_stack()(tokens_of(2, 6, 16), lengths)


def test_tokens_that_are_not_finite_are_named_before_the_first_step() -> None:
    stack, tokens = make_stack(), tokens_of(2, 6, 16)
    tokens[1, 2, 3] = float("nan")
    with pytest.raises(ScanInputError, match=r"tokens \(2, 6, 16\) holds 1 .* at \(1, 2, 3\)"):
        stack(tokens)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_double_precision_stays_double(bidirectional: bool) -> None:
    torch.manual_seed(0)
    mixer = Mamba(4, d_state=2, bidirectional=bidirectional).double()
    tokens = tokens_of(2, 5, 4).double().requires_grad_()
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(lambda x: mixer(x, lengths), tokens, fast_mode=True)


def test_export_sees_one_operator_a_scan() -> None:
    stack, tokens = make_stack().eval(), tokens_of(2, 6, 16)
    with torch.no_grad():
        wanted = stack(tokens)
        exported = torch.export.export(stack, (tokens,))
        assert torch.equal(exported.module()(tokens), wanted)
    names = [str(node.target) for node in exported.graph.nodes]
    assert names.count("reflexarc.selective_scan.default") == 4  # two blocks, two directions

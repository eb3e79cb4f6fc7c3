"""The Mamba block: names, sizes, initialisation, parity with transformers, causality."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reflexarc.policy.layers.mamba import Mamba, MambaStack


def test_parameter_names_and_shapes_are_those_of_mamba_ssm() -> None:
    shapes = {name: tuple(p.shape) for name, p in Mamba(256).named_parameters()}
    assert shapes == {
        "A_log": (512, 16),
        "D": (512,),
        "in_proj.weight": (1024, 256),
        "conv1d.weight": (512, 1, 4),
        "conv1d.bias": (512,),
        "x_proj.weight": (48, 512),
        "dt_proj.weight": (512, 16),
        "dt_proj.bias": (512,),
        "out_proj.weight": (256, 512),
    }
    assert sum(p.numel() for p in Mamba(256).parameters()) == 437_760


def test_initialisation_spreads_step_sizes_and_decays() -> None:
    block = Mamba(64, d_state=8)
    dt = F.softplus(block.dt_proj.bias)
    assert dt.min() >= 1e-3 * 0.99
    assert dt.max() <= 0.1 * 1.01
    assert dt.log().std() > 1.0  # of a log-uniform over [1e-3, 0.1]: 1.33
    torch.testing.assert_close(block.A_log.exp()[5], torch.arange(1.0, 9.0))
    assert {name for name, p in block.named_parameters() if hasattr(p, "_no_weight_decay")} == {
        "A_log",
        "D",
        "dt_proj.bias",
    }


@pytest.mark.parametrize("length", [1, 3, 50])
def test_parity_with_transformers(length: int) -> None:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    reference = MambaMixer(
        MambaConfig(hidden_size=32, state_size=16, expand=2, conv_kernel=4, num_hidden_layers=1), 0
    ).eval()
    block = Mamba(32)
    block.load_state_dict(reference.state_dict())
    tokens = torch.randn(3, length, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(block(tokens), reference(tokens), atol=1e-5, rtol=0)


def test_a_token_sees_the_past_only_and_all_of_it() -> None:
    torch.manual_seed(0)
    stack = MambaStack(16, depth=2, d_state=4, mlp_hidden=16)
    tokens = torch.randn(1, 12, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(stack(tokens)[0, 7].square().sum(), tokens)
    reach = gradient[0].abs().sum(-1)
    assert (reach[:8] > 0).all()
    assert (reach[8:] == 0).all()


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    stack = MambaStack(16, depth=2, d_state=4, mlp_hidden=16)
    stack(torch.randn(2, 9, 16)).square().sum().backward()
    for name, parameter in stack.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_half_precision_scans_in_single() -> None:
    torch.manual_seed(0)
    block = Mamba(32)
    tokens = torch.randn(2, 20, 32)
    with torch.no_grad():
        wanted = block(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = block(tokens)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0.05)

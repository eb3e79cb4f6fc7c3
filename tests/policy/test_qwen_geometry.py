"""The head, the compressors and what joins them: sizes, equalities, masks, and bad settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_EEF,
    History,
    libero_action,
    libero_cameras,
)
from reflexarc.policy.decisions import make_decisions
from reflexarc.policy.half_precision import check_precision, serve_in_bf16
from reflexarc.policy.interface import Task, Tensors
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.qwen_geometry.compressors import build_compressor, cells_of, pool_cells
from reflexarc.policy.qwen_geometry.config import HeadConfig, QwenGeometryConfig
from reflexarc.policy.qwen_geometry.head import DiffusionHead
from reflexarc.policy.qwen_geometry.model import QwenGeometry
from reflexarc.policy.statevla.model import StateVLA

SIZE, HORIZON = 64, 6
HEAD = {
    "layers": 2, "heads": 4, "head_dimension": 8, "feed_forward": 2, "future_tokens": 3,
    "positions": 8, "output_dimension": 40, "output_hidden": 24, "state_hidden": 24,
}  # fmt: skip
ARMS = ("none", "pool", "per_layer", "qformer", "control")
INSTRUCTIONS = ("pick up the red block", "open the drawer")


def contract(**fields: Any) -> PolicyContract:
    cameras = tuple(
        camera.model_copy(update={"height": SIZE, "width": SIZE}) for camera in libero_cameras()
    )
    return PolicyContract(
        family="qwen_geometry", cameras=fields.pop("cameras", cameras), state=LIBERO_STATE_EEF,
        action=libero_action(fields.pop("horizon", HORIZON)), **fields,
    )  # fmt: skip


def config(compressor: str = "pool", **fields: Any) -> QwenGeometryConfig:
    head = {**HEAD, **fields.pop("head", {})}
    return QwenGeometryConfig.model_validate(
        {
            "semantic": {"name": "compact", "vision": {"name": "tiny_random", "pool": 1},
                         "keypoints": {"number": 8, "hidden": 8, "tokens": 2}, "width": 24},
            "geometry": {"name": "rays"}, "head": head, "compressor": compressor,
            "geometry_tokens": 4, "qformer_heads": 4, "language_dimension": 12, **fields,
        }
    )  # fmt: skip


def build(compressor: str = "pool", **fields: Any) -> QwenGeometry:
    torch.manual_seed(0)
    language = LanguageEmbeddings(INSTRUCTIONS, torch.randn(2, 12), "hashed")
    made = QwenGeometry.build(config(compressor, **fields), contract(), language.to_files())
    return made.eval()


def decision(policy: QwenGeometry, rows: int = 2) -> tuple[Tensors, Tensors, Tensor]:
    """Arguments of ``encode``, from random images."""
    generator = torch.Generator().manual_seed(1)
    frames = {
        name: torch.randint(0, 256, (rows, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
        for name in policy.contract.camera_names
    }
    task = policy.embed_task([Task(INSTRUCTIONS[row % 2]) for row in range(rows)])
    window = {name: t[:, None] for name, t in policy.embed_frames(frames, task).items()}
    window["state"] = torch.randn(rows, 1, 8, generator=generator)
    return task, window, torch.ones(rows, 1, dtype=torch.bool)


def chunk(policy: QwenGeometry, context: Tensors, **options: Any) -> Tensor:
    noise = torch.randn(len(context["mask"]), HORIZON, 7,
                        generator=torch.Generator().manual_seed(2))  # fmt: skip
    with torch.no_grad():
        return policy.sample_actions(context, noise, steps=4, **options)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("form", ["pool", "per_layer"])
@pytest.mark.parametrize("grid", [(16, 16), (14, 14)])
def test_pooling_and_projecting_commute(
    form: Any, grid: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(3)
    made = build_compressor(form, 96, 64, layers=3, tokens=16, heads=4).to(dtype)
    tokens = torch.randn(2, 2, *grid, 96, dtype=dtype)
    cells = cells_of(grid, 2, 16)
    first_pooled = made(pool_cells(tokens, cells))
    for layer, found in enumerate(first_pooled):
        linear = made.projection if form == "pool" else made.projections[layer]
        assert torch.allclose(found, pool_cells(linear(tokens), cells), rtol=0, atol=tolerance)


def test_cells_are_those_of_each_view_in_rows() -> None:
    tokens = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4, 1)
    cells = pool_cells(tokens, cells_of((4, 4), 2, 8))
    assert cells.flatten().tolist() == [2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5]
    assert cells_of((16, 16), 2, 16) == (2, 4)


@pytest.mark.parametrize("self_attention", [False, True])
def test_keys_and_values_once_give_the_same_velocity(self_attention: bool) -> None:
    """Cross-attention written out, with keys and values made anew from the contexts."""
    torch.manual_seed(4)
    head = DiffusionHead(
        HeadConfig.model_validate({**HEAD, "self_attention": self_attention}),
        source=24, state=8, horizon=HORIZON, actions=7,
    ).eval()  # fmt: skip
    contexts = [torch.randn(2, 9, 24) for _ in range(2)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    state, noise = torch.randn(2, 8), torch.randn(2, HORIZON, 7)
    once = head.context(contexts, mask, state)
    x = noise
    for step in range(4):
        fresh = head.context(contexts, mask, state)
        x = x - head(fresh, x, torch.full((2,), 1 - step / 4)) / 4
    assert torch.allclose(head.sample(once, noise, 4), x, atol=1e-5)
    # What is masked is as if it were not there.
    short = head.context([c[1:, :5] for c in contexts], mask[1:, :5], state[1:])
    assert torch.allclose(head.sample(short, noise[1:], 4), x[1:], atol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_actions_move_with_what_an_arm_is_to_see(arm: str) -> None:
    policy = build(arm, head={"self_attention": True})
    task, window, valid = decision(policy)
    before = chunk(policy, policy.encode(task, window, valid))
    assert before.shape == (2, HORIZON, 7) and set(before[..., 6].unique().tolist()) <= {-1.0, 1.0}
    others = {"language": {"language": task["language"].flip(0)}}
    seen = [name for name in window if name != "state"]
    assert seen == {"none": ["semantic"], "qformer": ["semantic", "geometry"]}.get(
        arm, ["semantic", "cells"]
    )
    for name in ("state", *seen):
        others[name] = {name: window[name] + torch.randn(window[name].shape)}
    for name, changed in others.items():
        context = policy.encode({**task, **{k: v for k, v in changed.items() if k in task}},
                                {**window, **{k: v for k, v in changed.items() if k in window}},
                                valid)  # fmt: skip
        moved = float((chunk(policy, context) - before).abs().max())
        if arm == "control" and name == "cells":
            assert moved == 0.0, "the control does not see the encoder's tokens"
        else:
            assert moved > 1e-4, name


def test_without_self_attention_no_action_sees_the_state() -> None:
    """As in the document: why self-attention is an option."""
    policy = build("none")
    task, window, valid = decision(policy)
    one = chunk(policy, policy.encode(task, window, valid))
    two = chunk(policy, policy.encode(task, {**window, "state": -window["state"]}, valid))
    assert torch.equal(one, two)


def test_a_control_is_as_large_as_what_it_controls() -> None:
    for form in ("pool", "per_layer", "qformer"):
        control, arm = build("control", control_of=form), build(form)
        assert control.component_parameters() == arm.component_parameters()
        assert control._stored() == arm._stored()


def test_rows_of_a_batch_do_not_mix() -> None:
    policy = build("qformer", head={"self_attention": True})
    task, window, valid = decision(policy, rows=3)
    noise = torch.randn(3, HORIZON, 7)
    with torch.no_grad():
        together = policy.sample_actions(policy.encode(task, window, valid), noise, steps=2)
        for row in range(3):
            only = slice(row, row + 1)
            alone = policy.encode({n: t[only] for n, t in task.items()},
                                  {n: t[only] for n, t in window.items()}, valid[only])  # fmt: skip
            one = policy.sample_actions(alone, noise[only], steps=2)
            assert torch.allclose(one, together[only], atol=1e-5)


def test_a_chunk_goes_on_from_what_is_committed() -> None:
    policy = build("pool", head={"self_attention": True})
    context = policy.encode(*decision(policy))
    free = chunk(policy, context)
    prefix = free[:, :2].flip(0)
    kept = chunk(policy, context, prefix=prefix)
    assert torch.equal(kept[:, :2], prefix)
    near = chunk(policy, context, prefix=prefix, guide=prefix.flip(1))
    assert torch.equal(near[:, :2], prefix) and not torch.equal(near, kept)


def test_every_storage_gives_what_each_compressor_stores() -> None:
    every = build("qformer", stored_geometry="every")
    _, window, _ = decision(every)
    for arm in ("none", "pool", "qformer"):
        _, own, _ = decision(build(arm))
        for name in own:
            assert torch.equal(own[name], window[name])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"geometry_tokens": 5}, "2 cameras cannot share evenly; choose a multiple of 2"),
        ({"geometry_tokens": 1024}, "whose tokens are 14x14; choose fewer"),
        ({"head": {"positions": 4}}, "contract.horizon is 6, but the head has positions for 4"),
        ({"compressor": "qformer", "qformer_heads": 5}, "does not divide the width 24"),
        ({"language_dimension": 13}, "language_dimension is 13, but the embeddings of hashed"),
    ],
)
def test_settings_that_do_not_fit_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(**fields)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"history": History(frames=2, states=1, stride=1)}, "one frame and one state"),
        ({"needs_language": False}, "set contract.needs_language: true"),
        ({"cameras": tuple(libero_cameras()[0].model_copy(update={"height": 32 * (i + 1)})
                           for i in range(1)) + libero_cameras()[1:]}, "one image size"),
    ],
)  # fmt: skip
def test_contracts_that_do_not_fit_are_named(fields: dict[str, Any], said: str) -> None:
    language = LanguageEmbeddings(INSTRUCTIONS, torch.randn(2, 12), "hashed")
    with pytest.raises(ConfigError, match=said):
        QwenGeometry.build(config(), contract(**fields), language.to_files())


def test_noise_of_another_horizon_is_named() -> None:
    policy = build()
    context = policy.encode(*decision(policy))
    with pytest.raises(ConfigError, match="chunks of 6 steps, got 8"):
        policy.sample_actions(context, torch.randn(2, 8, 7), steps=1)
    with pytest.raises(ConfigError, match="chunks of 6 steps, got 16"):
        policy.velocity(context, torch.randn(2, 16, 7), torch.ones(2))


def test_configs_that_contradict_themselves_are_refused() -> None:
    for fields, said in (
        ({"geometry": None}, "needs geometry"),
        ({"compressor": "none", "geometry": None, "stored_geometry": "every"}, "needs geometry"),
        ({"geometry": {"name": "dinov2"}}, "dinov2 needs path"),
        ({"geometry": {"name": "rays", "path": "x"}}, "do not belong to rays"),
        ({"semantic": {"name": "qwen2_5_vl"}}, "needs path"),
        ({"semantic": {"name": "compact"}}, "compact needs vision"),
    ):
        with pytest.raises(ValidationError, match=said):
            config(**fields)


def test_bf16_halves_the_weights_and_moves_actions_little() -> None:
    """The same chunk to the eye, by the path that ``serve-policy --precision bf16`` takes."""
    policy = build("pool", head={"self_attention": True})
    task, window, valid = decision(policy)
    given = {"noise": torch.randn(2, HORIZON, 7, generator=torch.Generator().manual_seed(5))}
    with torch.inference_mode():
        exact = make_decisions(policy).sample(task, window, valid, 4, given)
        before = sum(p.numel() * p.element_size() for p in policy.head.parameters())
        serve_in_bf16(policy)
        rounded = make_decisions(policy).sample(task, window, valid, 4, given)
    assert sum(p.numel() * p.element_size() for p in policy.head.parameters()) < 0.55 * before
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact)[..., :6].abs().max()) < 0.1


def test_only_families_that_can_are_served_in_bf16() -> None:
    assert check_precision("bf16", QwenGeometry) == "bf16"
    with pytest.raises(ConfigError, match="the family statevla computes in fp32 alone"):
        check_precision("bf16", StateVLA)
    with pytest.raises(ConfigError, match="one of fp32, bf16, got 'fp8'"):
        check_precision("fp8")

"""What is hidden from the context encoder: by modality, by token, by block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.statevla.token_layout import TokenLayout
from reflexarc.training.config_objectives import MaskedJEPAConfig
from reflexarc.training.objectives.masks import check_masks, draw_masks
from reflexarc.training.objectives.packing import pack

CAMERAS = ("agentview", "eye_in_hand")
PATCHES = TokenLayout(CAMERAS, 196, (14, 14), latent_tokens=1, d_model=256)
KEYPOINTS = TokenLayout(CAMERAS, 4, None, latent_tokens=4, d_model=128)


def config(**values: object) -> MaskedJEPAConfig:
    return MaskedJEPAConfig.model_validate(values)


def draw(chosen: MaskedJEPAConfig, layout: TokenLayout, rows: int, seed: int = 0) -> Tensor:
    return draw_masks(chosen, layout, rows, torch.Generator().manual_seed(seed))


def by_modality(mask: Tensor, layout: TokenLayout) -> Tensor:
    """``bool (rows, modalities)``; every modality is hidden as a whole or not at all."""
    columns = []
    for name in layout.modalities:
        own = mask[:, layout.span(name)]
        assert torch.equal(own.any(1), own.all(1))
        columns.append(own.any(1))
    return torch.stack(columns, dim=1)


layouts = st.builds(
    lambda cameras, grid, latents: TokenLayout(
        tuple(f"camera{i}" for i in range(cameras)), grid[0] * grid[1], grid, latents, 8
    ),
    st.integers(1, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 4),
)


@settings(deadline=None, max_examples=80)
@given(
    layout=layouts,
    strategy=st.sampled_from(["modality_aware", "random", "block"]),
    probabilities=st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=5, max_size=5),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_every_row_has_a_visible_and_a_hidden_token(
    layout: TokenLayout, strategy: str, probabilities: list[float], ratio: float, seed: int
) -> None:
    of_modality = dict(zip(layout.modalities, probabilities, strict=False))
    if not any(of_modality.values()):
        of_modality["state"] = 0.1
    chosen = config(masking_strategy=strategy, mask_ratio=ratio, mask_probabilities=of_modality)
    mask = draw(chosen, layout, 40, seed)
    assert mask.shape == (40, layout.inputs) and mask.dtype == torch.bool
    assert torch.equal(mask, draw(chosen, layout, 40, seed))
    assert mask.any(1).all() and not mask.all(1).any()
    if strategy == "modality_aware":
        hidden = by_modality(mask, layout)
        assert hidden.sum(1).max() <= 2
        never = torch.tensor([of_modality[name] == 0 for name in layout.modalities])
        assert not hidden[:, never].any()
    if strategy == "block":
        assert not mask[:, :2].any()  # language and state


def test_modalities_are_hidden_about_as_often_as_their_probabilities_say() -> None:
    hidden = by_modality(draw(config(), PATCHES, 40_000), PATCHES).float()
    # language, state, agentview, eye_in_hand; what "one or two" changes is computed by hand.
    torch.testing.assert_close(
        hidden.mean(0), torch.tensor([0.215, 0.215, 0.505, 0.505]), atol=0.008, rtol=0
    )
    count = hidden.sum(1)
    # none is made one (0.16), three and four are made two (0.11)
    assert (count == 1).float().mean() == pytest.approx(0.56, abs=0.008)
    assert (count == 2).float().mean() == pytest.approx(0.44, abs=0.008)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_single_tokens_are_hidden_by_the_ratio(ratio: float) -> None:
    chosen = config(masking_strategy="random", mask_ratio=ratio)
    assert draw(chosen, PATCHES, 500).float().mean() == pytest.approx(ratio, abs=0.005)


def test_a_block_has_the_area_and_shape_that_were_asked_for() -> None:
    chosen = config(
        masking_strategy="block", blocks=1, block_scale=(0.15, 0.4), block_aspect=(0.75, 1.5)
    )
    images = draw(chosen, PATCHES, 400)[:, 2:].reshape(-1, 14, 14)
    heights, widths = images.any(2).sum(1), images.any(1).sum(1)
    assert torch.equal(heights * widths, images.sum((1, 2)))  # one whole rectangle
    # Sides are rounded to whole patches, half a patch at most.
    area, shape = (heights * widths) / 196, heights / widths
    assert 0.12 < area.min() < 0.17 and 0.37 < area.max() < 0.44
    assert 0.65 < shape.min() < 0.8 and 1.4 < shape.max() < 1.8
    assert images.any(0).all()  # they come everywhere
    four = draw(config(masking_strategy="block"), PATCHES, 400)[:, 2:]
    assert 2 * images.float().mean() < four.float().mean() < 0.8


def test_a_block_fits_a_grid_that_is_no_square() -> None:
    layout = TokenLayout(("front",), 24, (3, 8), latent_tokens=1, d_model=8)
    chosen = config(masking_strategy="block", blocks=1, block_scale=(1.0, 1.0))
    assert draw(chosen, layout, 50)[:, 2:].float().mean() > 0.5


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 6), inputs=st.integers(2, 12), latents=st.integers(1, 3), data=st.data())
def test_packing_puts_visible_tokens_first_then_latent_ones_then_hidden_ones(
    rows: int, inputs: int, latents: int, data: st.DataObject
) -> None:
    hidden = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=inputs, max_size=inputs),
                           min_size=rows, max_size=rows))
    )  # fmt: skip
    packing = pack(hidden, latents)
    for row, order, length in zip(hidden, packing.order.tolist(), packing.lengths, strict=True):
        visible = (~row).nonzero()[:, 0].tolist()
        after = row.nonzero()[:, 0].tolist()
        assert order == [*visible, *range(inputs, inputs + latents), *after]
        assert length == len(visible) + latents
    tokens = torch.arange(inputs + latents).float().expand(rows, -1)[..., None]
    packed = packing.visible(tokens + 1)
    assert packed.shape[1] == packing.lengths.max()
    for row, length in zip(packed, packing.lengths, strict=True):
        assert (row[:length] > 0).all() and (row[length:] == 0).all()


REFUSED = {
    "ratio leaves nothing hidden": (
        KEYPOINTS, {"masking_strategy": "random", "mask_ratio": 0.05}, "nothing hidden.*0.1 and",
    ),
    "ratio leaves nothing visible": (
        KEYPOINTS, {"masking_strategy": "random", "mask_ratio": 0.95}, "nothing visible",
    ),
    "all modalities hidden": (PATCHES, {"max_masked_modalities": 4}, "nothing visible of the 4"),
    "no modality hidden": (
        PATCHES, {"mask_probabilities": dict.fromkeys(PATCHES.modalities, 0.0)}, "are all 0",
    ),
    "a modality is missing": (
        PATCHES, {"mask_probabilities": {"agentview": 0.5, "language": 0.1}},
        "says nothing of eye_in_hand, state; give one for each of language, state, agentview",
    ),
    "a modality is not there": (
        TokenLayout(("front",), 4, (2, 2), 1, 8), {},
        "names agentview, eye_in_hand, which the policy does not see and says nothing of front",
    ),
    "blocks without patches": (KEYPOINTS, {"masking_strategy": "block"}, "leaves no patches"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "values", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_masks_that_cannot_be_are_refused(
    layout: TokenLayout, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_masks(config(**values), layout)
    assert caught.value.field and caught.value.field.startswith("objective.m")


def test_masks_that_can_be_are_not_refused() -> None:
    check_masks(config(), PATCHES)
    check_masks(config(masking_strategy="random", mask_ratio=0.1), KEYPOINTS)
    check_masks(config(masking_strategy="block"), PATCHES)

"""Which tokens are hidden from the context encoder: three strategies, drawn on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.statevla.token_layout import TokenLayout
from reflexarc.training.config_objectives import MaskedJEPAConfig


def draw_masks(
    config: MaskedJEPAConfig, layout: TokenLayout, rows: int, generator: torch.Generator
) -> Tensor:
    """``bool (rows, M)``, True where a token is hidden; a pure function of the generator.

    Every row has a hidden and a visible token. Latent tokens, which are not counted, are visible.
    """
    if config.masking_strategy == "modality_aware":
        return _whole_modalities(config, layout, rows, generator)
    if config.masking_strategy == "random":
        return _single_tokens(config.mask_ratio, layout.inputs, rows, generator)
    return _blocks(config, layout, rows, generator)


def check_masks(config: MaskedJEPAConfig, layout: TokenLayout) -> None:
    """Raise ConfigError for masks that this policy's tokens cannot have.

    That is where nothing would be hidden or nothing visible, for probabilities that name a
    modality that is not there or leave one out, and for blocks without patches.
    """
    if config.masking_strategy == "modality_aware":
        _check_modalities(config, layout)
    elif config.masking_strategy == "random":
        _check_ratio(config.mask_ratio, layout.inputs)
    elif layout.grid is None:
        raise ConfigError(
            "objective.masking_strategy block hides rectangles of patches, but policy.keypoints "
            "leaves no patches; take modality_aware or random, or policy.keypoints=null",
            field="objective.masking_strategy",
        )


def _whole_modalities(
    config: MaskedJEPAConfig, layout: TokenLayout, rows: int, generator: torch.Generator
) -> Tensor:
    """Each modality by its own probability; of too many some are shown again, of none one is hid.

    Which one is as likely for all of them, so that the probabilities hold nearly: by default
    0.505 for each camera and 0.215 for language and state.
    """
    probabilities = torch.tensor([config.mask_probabilities[name] for name in layout.modalities])
    drawn = torch.rand(rows, len(probabilities), generator=generator) < probabilities
    order = torch.rand(rows, len(probabilities), generator=generator)
    # Drawn ones first, in a random order, and last what is never hidden: rank 0 is in any case.
    order = order + (~drawn).float() + (probabilities == 0).float()
    rank = order.argsort(dim=1).argsort(dim=1)
    hidden = (drawn & (rank < config.max_masked_modalities)) | (rank == 0)
    return hidden.repeat_interleave(torch.tensor(layout.sizes), dim=1)


def _single_tokens(ratio: float, tokens: int, rows: int, generator: torch.Generator) -> Tensor:
    """Each token by itself; where none or all were drawn, the nearest is changed."""
    drawn = torch.rand(rows, tokens, generator=generator)
    mask = drawn < ratio
    places = torch.arange(tokens)
    mask |= places == drawn.argmin(dim=1, keepdim=True)
    return mask & (places != drawn.argmax(dim=1, keepdim=True))


def _blocks(
    config: MaskedJEPAConfig, layout: TokenLayout, rows: int, generator: torch.Generator
) -> Tensor:
    """The union of a few rectangles in each image; language and state stay visible."""
    assert layout.grid is not None, "check_masks refuses it"
    height, width = layout.grid
    shape = (rows, len(layout.cameras), config.blocks)

    def uniform(least: float, largest: float) -> Tensor:
        return least + (largest - least) * torch.rand(shape, generator=generator)

    area = height * width * uniform(*config.block_scale)
    aspect = uniform(*config.block_aspect)
    spans = []
    for side, length in ((height, (area * aspect).sqrt()), (width, (area / aspect).sqrt())):
        whole = length.round().clamp(1, side)
        start = (uniform(0.0, 1.0) * (side - whole + 1)).floor().clamp(max=side - 1)
        places = torch.arange(side)
        spans.append((places >= start[..., None]) & (places < (start + whole)[..., None]))
    in_a_block = spans[0][..., :, None] & spans[1][..., None, :]
    of_images = in_a_block.any(dim=2).flatten(1)
    return torch.cat([torch.zeros(rows, 2, dtype=torch.bool), of_images], dim=1)


def _check_modalities(config: MaskedJEPAConfig, layout: TokenLayout) -> None:
    given, wanted = set(config.mask_probabilities), set(layout.modalities)
    if given != wanted:
        unknown, missing = sorted(given - wanted), sorted(wanted - given)
        said = [f"names {', '.join(unknown)}, which the policy does not see"] if unknown else []
        said += [f"says nothing of {', '.join(missing)}"] if missing else []
        raise ConfigError(
            f"objective.mask_probabilities {' and '.join(said)}; give one for each of "
            f"{', '.join(layout.modalities)}",
            field="objective.mask_probabilities",
        )
    if not any(config.mask_probabilities.values()):
        raise ConfigError(
            "objective.mask_probabilities are all 0, which leaves nothing hidden to predict; "
            "raise one of them",
            field="objective.mask_probabilities",
        )
    if config.max_masked_modalities >= len(layout.modalities):
        raise ConfigError(
            f"objective.max_masked_modalities {config.max_masked_modalities} may leave nothing "
            f"visible of the {len(layout.modalities)} modalities "
            f"{', '.join(layout.modalities)}; give at most {len(layout.modalities) - 1}",
            field="objective.max_masked_modalities",
        )


def _check_ratio(ratio: float, tokens: int) -> None:
    hidden = ratio * tokens
    if hidden >= 1 and tokens - hidden >= 1:
        return
    what = "hidden" if hidden < 1 else "visible"
    raise ConfigError(
        f"objective.mask_ratio {ratio:g} of {tokens} tokens leaves nothing {what}; choose one "
        f"between {1 / tokens:.3g} and {1 - 1 / tokens:.3g}",
        field="objective.mask_ratio",
    )

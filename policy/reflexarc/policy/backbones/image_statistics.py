"""How a pretrained model's images are normalised, as its folder says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from reflexarc.contract.errors import CheckpointError
from reflexarc.policy.backbones.vision import Rgb

IMAGENET: tuple[Rgb, Rgb] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def image_statistics(
    folder: Path, default: tuple[Rgb, Rgb], names: Sequence[str] = ("preprocessor_config.json",)
) -> tuple[Rgb, Rgb]:
    """Mean and deviation of images in [0, 1]: of the first file of ``names`` that is there.

    ``default`` where the folder has none, and for what a file leaves out. Raises CheckpointError
    for a file that cannot be read or does not hold three numbers each, deviations above zero.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return default
    try:
        fields = json.loads(path.read_text())
        fields = fields.get("image_processor", fields)  # of a processor for text and images
        mean, std = (
            tuple(float(value) for value in fields.get(key, known))
            for key, known in zip(("image_mean", "image_std"), default, strict=True)
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise CheckpointError(
            f"{path}: image_mean and image_std must be three numbers each, deviations above zero, "
            f"got {mean} and {std}"
        )
    return mean, std

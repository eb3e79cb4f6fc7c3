"""SigLIP's vision tower, frozen, from a local folder or a hub id.

At 224 pixels the base model gives 196 patches of 768 channels. Images are scaled with the mean
and deviation of the folder's ``preprocessor_config.json``, or 0.5 where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from reflexarc.contract.errors import CheckpointError, ConfigError, MissingExtraError
from reflexarc.policy.backbones.image_statistics import image_statistics
from reflexarc.policy.backbones.merged import merged_backbone
from reflexarc.policy.backbones.model_folder import (
    WantedModel,
    model_folder,
    revision_of,
    weights_sha256,
)
from reflexarc.policy.backbones.vision import Rgb, VisionBackbone
from reflexarc.policy.interface import FrozenBackbone

_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
_WANTED = WantedModel("vision.path", "a SigLIP model", "google/siglip-base-patch16-224", _FILES)
_HALF: Rgb = (0.5, 0.5, 0.5)


class SiglipVision(VisionBackbone):
    """``SiglipVisionModel`` of transformers up to its last norm, without the pooling head."""

    mean = _HALF
    std = _HALF

    def __init__(self, path: str, pool: int = 1):
        if find_spec("transformers") is None:
            raise MissingExtraError("the vision encoder siglip", "train", "transformers")
        super().__init__(pool)
        carried = merged_backbone("siglip")
        if carried is None:
            self._load_from(model_folder(path, _WANTED))
        else:
            self.identity = carried.identity
            image = carried.settings["image"]
            self._normalise_by(image["image_mean"], image["image_std"])
            self.model = _empty(carried.settings["model"])
            carried.load_into(self)
        config = self.model.config
        self.channels = int(config.hidden_size)
        self.stride = int(config.patch_size)
        self.image_size = int(config.image_size)
        self.freeze()

    def _load_from(self, folder: Path) -> None:
        self._normalise_by(*image_statistics(folder, (_HALF, _HALF)))
        self.identity = FrozenBackbone("siglip", weights_sha256(folder), revision_of(folder))
        self.model = _load(folder)

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint that carries the weights says of the architecture."""
        image = {"image_mean": self.mean, "image_std": self.std}
        return {"model": self.model.config.to_dict(), "image": image}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Raises ConfigError for a size that the position embeddings were not trained for."""
        if (height, width) != (self.image_size, self.image_size):
            raise ConfigError(
                f"this SigLIP sees images of {self.image_size}x{self.image_size}, the contract's "
                f"are {height}x{width}; set contract.image_size to {self.image_size}",
                field="cameras",
            )
        side = self.image_size // self.stride // self.pool
        return side, side

    def features(self, pixels: Tensor) -> Tensor:
        hidden: Tensor = self.model(pixel_values=pixels).last_hidden_state
        side = self.image_size // self.stride
        return hidden.transpose(1, 2).reshape(len(pixels), self.channels, side, side)


def _load(folder: Path) -> Any:  # transformers is untyped here
    """The model in fp32. Raises CheckpointError for another model, or one that lacks weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists every tensor of the parts that are not loaded
    try:
        config = SiglipVisionConfig.from_pretrained(folder, local_files_only=True)
        config.vision_use_head = False
        model, found = SiglipVisionModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, by version
        raise CheckpointError(
            f"{folder} cannot be loaded as a SigLIP vision model: {str(error)[:400]}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of a SigLIP vision model, the first is "
            f"{missing[0]}; copy the whole folder again"
        )
    return model.float()


def _empty(fields: Mapping[str, Any]) -> Any:
    """The same architecture with weights to be loaded."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig.from_dict(dict(fields))
    config.vision_use_head = False
    return SiglipVisionModel(config).float()

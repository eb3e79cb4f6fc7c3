"""V-JEPA 2's encoder, frozen, from a local folder or a hub id.

Of the model that ``transformers`` saves the encoder alone is built and read: the predictor is
never used. Images are scaled and normalised here; nothing is cropped, so that a clip shows what
the contract's camera shows. With 16 frames of 256 pixels a clip has 8·16·16 tokens, the one of
tubelet t, row r and column c at ``t·256 + r·16 + c``; their mean over time, pooled, is the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reflexarc.contract.errors import CheckpointError, ConfigError, MissingExtraError
from reflexarc.policy.backbones.clip_encoder import ClipEncoder, check_grid, pool_grid
from reflexarc.policy.backbones.image_statistics import IMAGENET, image_statistics
from reflexarc.policy.backbones.merged import merged_backbone
from reflexarc.policy.backbones.model_folder import (
    WantedModel,
    model_folder,
    read_config,
    revision_of,
    weights_sha256,
)
from reflexarc.policy.backbones.vision import Rgb
from reflexarc.policy.interface import FrozenBackbone

_PREPROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")
_FILES = ("config.json", *_PREPROCESSORS, "*.safetensors", "*.safetensors.index.json")
_WANTED = WantedModel(
    "clips.path", "a V-JEPA 2 model", "facebook/vjepa2-vitg-fpc64-256", _FILES
)  # fmt: skip
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of VJEPA2Model, and of VJEPA2ForVideoClassification.
_PREFIXES = ("encoder.", "vjepa2.encoder.")


class VJEPA2Clips(ClipEncoder):
    """See the module. Frames are kept as pixels, because the encoder mixes them over time.

    Attributes:
        identity: of the folder's weights.
        encoder: ``VJEPA2Encoder`` of transformers.
    """

    _shift: Tensor
    _scale: Tensor

    def __init__(self, path: str, side: int, *, precision: str = "fp32") -> None:
        if find_spec("transformers") is None:
            raise MissingExtraError("the video encoder vjepa2", "train", "transformers")
        super().__init__(side)
        self.precision = precision
        carried = merged_backbone("vjepa2")
        if carried is None:
            folder = model_folder(path, _WANTED)
            self._normalise_by(*image_statistics(folder, IMAGENET, _PREPROCESSORS))
            self.identity = FrozenBackbone("vjepa2", weights_sha256(folder), revision_of(folder))
            self.encoder = load_encoder(folder)
        else:
            self.identity = carried.identity
            image = carried.settings["image"]
            self._normalise_by(image["image_mean"], image["image_std"])
            self.encoder = build_encoder(carried.settings["model"])
            carried.load_into(self)
        self.encoder.to(_DTYPES[precision])
        config = self.encoder.config
        self.channels = int(config.hidden_size)
        self.requires_grad_(False)
        self.eval()

    def _normalise_by(self, mean: Rgb, std: Rgb) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("_shift", torch.tensor(self.mean), persistent=False)
        self.register_buffer("_scale", torch.tensor(self.std), persistent=False)

    @property
    def identities(self) -> Mapping[str, FrozenBackbone]:
        return {"": self.identity}

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint that carries the weights says of the architecture."""
        image = {"image_mean": self.mean, "image_std": self.std}
        return {"model": self.encoder.config.to_dict(), "image": image}

    def check_clip(self, height: int, width: int, frames: int) -> None:
        config = self.encoder.config
        size, tubelet = int(config.crop_size), int(config.tubelet_size)
        if (height, width) != (size, size):
            raise ConfigError(
                f"this V-JEPA 2 sees images of {size}x{size}, the contract's are "
                f"{height}x{width}; set contract.image_size to {size}",
                field="contract.image_size",
            )
        if frames % tubelet:
            raise ConfigError(
                f"V-JEPA 2 joins {tubelet} frames at a time, contract.history.frames is {frames}; "
                f"make it a multiple of {tubelet}",
                field="contract.history.frames",
            )
        cells = size // int(config.patch_size)
        check_grid(cells, cells, self.side, "V-JEPA 2")

    def frame_rows(self, images: Tensor) -> Tensor:
        """The pixels themselves."""
        return images

    @torch.no_grad()
    def clip_tokens(self, rows: Tensor) -> Tensor:
        tubelet = int(self.encoder.config.tubelet_size)
        if rows.shape[1] < tubelet:  # a single frame stands still for one tubelet
            rows = rows.repeat_interleave(tubelet, dim=1)[:, :tubelet]
        cells = int(self.encoder.config.crop_size) // int(self.encoder.config.patch_size)
        tokens = self.tokens(rows)
        by_time = tokens.view(len(tokens), -1, cells, cells, self.channels)
        return pool_grid(by_time.float().mean(1).permute(0, 3, 1, 2), self.side)

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """``uint8 (N, F, H, W, 3)`` to ``(N, F / tubelet · rows · columns, C)``."""
        scaled = (pixels.to(self._shift.dtype) / 255.0 - self._shift) / self._scale
        video = scaled.permute(0, 1, 4, 2, 3)
        hidden: Tensor = self.encoder(pixel_values_videos=video).last_hidden_state
        return hidden


def build_encoder(fields: Mapping[str, Any]) -> Any:  # transformers is untyped here
    """The encoder of such a ``config.json``, its weights random."""
    from transformers import VJEPA2Config
    from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Encoder

    config = VJEPA2Config.from_dict(dict(fields))
    # Chosen by the whole model as a rule, which is never built here.
    config._attn_implementation = "sdpa"
    return VJEPA2Encoder(config)


def load_encoder(folder: Path) -> Any:
    """The encoder of a saved model. CheckpointError for another model, or one that lacks weights.

    It is built without memory and takes the tensors as they are read.
    """
    fields = read_config(folder, "vjepa2", _WANTED)
    try:
        with torch.device("meta"):
            encoder = build_encoder(fields)
        encoder.load_state_dict(_encoder_weights(folder), assign=True)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded as V-JEPA 2's encoder: {str(error)[:400]}; copy the whole "
            "folder again"
        ) from error
    return encoder.float()


def _encoder_weights(folder: Path) -> dict[str, Tensor]:
    """Its tensors by name inside the encoder, from every ``*.safetensors`` of the folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
                if prefix is not None:
                    found[name.removeprefix(prefix)] = file.get_tensor(name)
    return found

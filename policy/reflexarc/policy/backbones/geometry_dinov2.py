"""DINOv2, and Depth-Anything's backbone, as encoders of geometry; each view by itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from reflexarc.contract.errors import CheckpointError, MissingExtraError
from reflexarc.policy.backbones.geometry_encoder import GeometryEncoder, check_patches
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

_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Dinov2Geometry(GeometryEncoder):
    """``Dinov2Model``'s last hidden state without its class token."""

    name: ClassVar[str] = "dinov2"
    licence = "Apache-2.0 (DINOv2's code and weights)"
    model_type: ClassVar[str] = "dinov2"
    example: ClassVar[str] = "facebook/dinov2-giant"
    _shift: Tensor
    _scale: Tensor

    def __init__(self, path: str, *, precision: str = "fp32") -> None:
        if find_spec("transformers") is None:
            raise MissingExtraError(f"the geometry encoder {self.name}", "train", "transformers")
        super().__init__()
        carried = merged_backbone(self.name)
        if carried is None:
            folder = model_folder(path, self._wanted())
            self._normalise_by(*image_statistics(folder, IMAGENET))
            self.identity = FrozenBackbone(self.name, weights_sha256(folder), revision_of(folder))
            self.model = self._load(folder)
        else:
            self.identity = carried.identity
            image = carried.settings["image"]
            self._normalise_by(image["image_mean"], image["image_std"])
            self.model = _build(carried.settings["model"])
            carried.load_into(self)
        self.model.to(_DTYPES[precision])
        self.channels = int(self.model.config.hidden_size)
        self.patch = int(self.model.config.patch_size)
        self.freeze()

    def _normalise_by(self, mean: Rgb, std: Rgb) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("_shift", torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_scale", torch.tensor(self.std).view(3, 1, 1), persistent=False)

    @property
    def identities(self) -> Mapping[str, FrozenBackbone]:
        return {"": self.identity}

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint that carries the weights says of the architecture."""
        image = {"image_mean": self.mean, "image_std": self.std}
        return {"model": self.model.config.to_dict(), "image": image}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return check_patches(height, width, self.patch, f"geometry.name {self.name}")

    def tokens(self, images: Tensor) -> Tensor:
        rows, columns = self.grid(images.shape[-2], images.shape[-1])
        pixels = ((images - self._shift) / self._scale).flatten(0, 1)
        dtype = next(self.model.parameters()).dtype
        hidden = self.model(pixel_values=pixels.to(dtype)).last_hidden_state.float()
        patches = hidden[:, -rows * columns :].unflatten(1, (rows, columns))
        return cast(Tensor, patches.unflatten(0, images.shape[:2]).contiguous())

    def _wanted(self) -> WantedModel:
        return WantedModel("geometry.path", f"a {self.model_type} model", self.example, _FILES)

    def _load(self, folder: Path) -> Any:
        read_config(folder, self.model_type, self._wanted())
        return self._pretrained(folder)

    def _pretrained(self, folder: Path) -> Any:
        from transformers import Dinov2Model

        return load_whole(Dinov2Model, folder)


class DepthAnythingGeometry(Dinov2Geometry):
    """The DINOv2 inside a Depth-Anything model, which was trained on to see depth."""

    name = "depth_anything"
    licence = (
        "Depth-Anything-V2 small: Apache-2.0; base, large and giant: CC-BY-NC-4.0 (no commercial "
        "use)"
    )
    model_type = "depth_anything"
    example = "depth-anything/Depth-Anything-V2-Small-hf"

    def _pretrained(self, folder: Path) -> Any:
        from transformers import DepthAnythingForDepthEstimation, Dinov2Model

        whole = load_whole(DepthAnythingForDepthEstimation, folder)
        model = Dinov2Model(whole.backbone.config)
        inside = {
            name: tensor
            for name, tensor in whole.backbone.state_dict().items()
            if name in model.state_dict()
        }
        missing = model.load_state_dict(inside, strict=False).missing_keys
        if missing:
            raise CheckpointError(
                f"{folder} holds no DINOv2 inside its Depth-Anything: it lacks "
                f"{', '.join(missing[:3])}"
            )
        return model


def _build(fields: Mapping[str, Any]) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config.from_dict(dict(fields)))


def load_whole(model: Any, folder: Path) -> Any:
    """A transformers model from a folder; CheckpointError where weights are missing."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded, found = model.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # damaged files raise whatever the reader of the day raises
        raise CheckpointError(
            f"{folder} cannot be loaded as {model.__name__}: {str(error)[:300]}; copy the whole "
            "folder again"
        ) from error
    missing = [*sorted(found["missing_keys"]), *map(str, found["mismatched_keys"])]
    # Made for masked training alone: some folders leave it out.
    missing = [name for name in missing if not name.endswith("mask_token")]
    if missing:
        raise CheckpointError(
            f"{folder} lacks weights of {model.__name__}: {', '.join(missing[:5])}; copy the whole "
            "folder again"
        )
    return loaded.float()

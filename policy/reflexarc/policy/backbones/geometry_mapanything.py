"""MapAnything as an encoder of geometry: what its views have told each other.

It is a package of its own, from git and not from a registry, and is imported when it is asked for.
Its forward pass runs as it is; a hook takes what leaves ``info_sharing``, the transformer over all
views, before any head turns it into depth or points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy.backbones.geometry_encoder import GeometryEncoder, check_patches
from reflexarc.policy.backbones.model_folder import weights_sha256
from reflexarc.policy.interface import FrozenBackbone

INSTALL = "pip install 'git+https://github.com/facebookresearch/map-anything.git'"
PARAMETERS = 1_228_490_000
"""As the document counts it; the weights are not at hand where this is developed."""
_PATCH = 14
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _FeaturesTakenError(Exception):
    """Ends a forward pass once the features are there: the heads behind them are not needed."""


class MapAnythingGeometry(GeometryEncoder):
    """Tokens of every view after its transformer over views; the order of views counts.

    Args:
        path: a local folder, as ``MapAnything.save_pretrained`` or the hub's download leaves it.
        precision: of the weights.
    """

    name: ClassVar[str] = "mapanything"
    licence = (
        "code Apache-2.0; weights facebook/map-anything CC-BY-NC-4.0 (no commercial use), "
        "facebook/map-anything-apache Apache-2.0"
    )

    def __init__(self, path: str, *, precision: str = "fp32") -> None:
        folder = Path(path).expanduser()
        if find_spec("mapanything") is None:
            raise ConfigError(
                "geometry.name mapanything needs the package 'mapanything', which no registry "
                f"has: {INSTALL}",
                field="policy.geometry.name",
            )
        if not folder.is_dir():
            raise CheckpointError(
                f"geometry.path: there is no folder {path}; download MapAnything with: "
                f"hf download facebook/map-anything --local-dir {path}"
            )
        super().__init__()
        self.identity = FrozenBackbone(self.name, weights_sha256(folder))
        self.model = _load(folder).to(_DTYPES[precision])
        sharing = getattr(self.model, "info_sharing", None)
        if sharing is None:
            raise CheckpointError(
                f"{folder} loads as a MapAnything without `info_sharing`, whose outputs are the "
                f"tokens; install the release that has it: {INSTALL}"
            )
        self.channels = int(sharing.dim)
        self.register_buffer("_shift", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("_scale", torch.tensor(_STD).view(3, 1, 1), persistent=False)
        self._shift: Tensor
        self._scale: Tensor
        self.freeze()

    @property
    def identities(self) -> Mapping[str, FrozenBackbone]:
        return {"": self.identity}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return check_patches(height, width, _PATCH, "geometry.name mapanything")

    def tokens(self, images: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        pixels = ((images - self._shift) / self._scale).to(dtype)
        norm = ["dinov2"] * len(pixels)
        views = [{"img": view, "data_norm_type": norm} for view in pixels.unbind(1)]
        taken: list[Sequence[Tensor]] = []

        def take(module: Any, arguments: Any, output: Any) -> None:
            # The final features, alone or before those of layers in between.
            final = output[0] if isinstance(output, tuple) else output
            taken.append(final.features)
            raise _FeaturesTakenError

        hook = self.model.info_sharing.register_forward_hook(take)
        try:
            self.model(views)
        except _FeaturesTakenError:
            pass
        finally:
            hook.remove()
        features = torch.stack(list(taken[0]), dim=1)  # (B, V, D, h, w)
        return features.permute(0, 1, 3, 4, 2).float().contiguous()


def _load(folder: Path) -> Any:
    try:
        return import_module("mapanything.models").MapAnything.from_pretrained(str(folder))
    except Exception as error:  # another project's code, of any version
        raise CheckpointError(
            f"{folder} cannot be loaded as MapAnything: {type(error).__name__}: "
            f"{str(error)[:300]}; copy the whole folder again, or install: {INSTALL}"
        ) from error

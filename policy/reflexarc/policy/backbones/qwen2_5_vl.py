"""Qwen2.5-VL from a local folder or a hub id, and the states of its layers.

What this adds to transformers' modules is a forward pass for one layout of the sequence (chat
prefix, the views' images, the instruction): positions, windows and masks are constants, so that a
step never waits for the device to learn them. The language model's own output layer is not built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflexarc.contract.errors import CheckpointError, ConfigError, MissingExtraError
from reflexarc.policy.backbones.image_statistics import image_statistics
from reflexarc.policy.backbones.model_folder import WantedModel, model_folder, read_config
from reflexarc.policy.backbones.vision import Rgb

MODEL_FILE = "qwen2_5_vl.json"
TOKENIZER_FILE = "qwen2_5_vl_tokenizer.json"
_FILES = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
_WANTED = WantedModel(
    "semantic.path", "a Qwen2.5-VL model", "Qwen/Qwen2.5-VL-3B-Instruct", _FILES
)  # fmt: skip
# OpenAI's CLIP, as Qwen2.5-VL's preprocessor has it.
_CLIP: tuple[Rgb, Rgb] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class QwenFiles:
    """What a model is built of beside its weights.

    Attributes:
        config: of ``config.json``.
        image: mean and deviation of images in [0, 1].
        tokenizer: the bytes of ``tokenizer.json``.
    """

    config: dict[str, Any]
    image: tuple[Rgb, Rgb]
    tokenizer: bytes

    def to_files(self) -> dict[str, bytes]:
        """As a checkpoint carries it."""
        fields = {"config": self.config, "image_mean": self.image[0], "image_std": self.image[1]}
        return {MODEL_FILE: json.dumps(fields, indent=1).encode(), TOKENIZER_FILE: self.tokenizer}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> QwenFiles | None:
        """The inverse; None where a checkpoint carries none."""
        if MODEL_FILE not in files or TOKENIZER_FILE not in files:
            return None
        try:
            fields = json.loads(files[MODEL_FILE])
            image = (_rgb(fields["image_mean"]), _rgb(fields["image_std"]))
            return cls(dict(fields["config"]), image, files[TOKENIZER_FILE])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{MODEL_FILE} cannot be read: {error}; copy the checkpoint again"
            ) from error


def read_folder(path: str) -> tuple[QwenFiles, Path]:
    """What a folder or hub id holds. CheckpointError naming the file that is wrong or absent."""
    require_transformers()
    folder = model_folder(path, _WANTED)
    config = read_config(folder, "qwen2_5_vl", _WANTED)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; copy the tokenizer's files into the model's folder, "
            "or write them there with its save_pretrained"
        )
    image = image_statistics(folder, _CLIP)
    return QwenFiles(config, image, tokenizer.read_bytes()), folder


def build_qwen(fields: Mapping[str, Any]) -> Any:  # transformers is untyped here
    """``Qwen2_5_VLModel`` of such a ``config.json``, its weights random."""
    require_transformers()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig.from_dict(dict(fields))
    config._attn_implementation = "sdpa"
    return Qwen2_5_VLModel(config)


def load_qwen(folder: Path, precision: str) -> Any:
    """``Qwen2_5_VLModel`` with a folder's weights; CheckpointError where some are missing."""
    from transformers import Qwen2_5_VLModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no *.safetensors; save the model with save_pretrained (files such as "
            "pytorch_model.bin hold pickled objects and are not read)"
        )
    try:
        model, found = Qwen2_5_VLModel.from_pretrained(
            str(folder),
            local_files_only=True,
            dtype=_DTYPES[precision],
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files raise whatever the reader of the day raises
        raise CheckpointError(
            f"{folder} cannot be loaded as Qwen2.5-VL: {str(error)[:300]}; copy the whole folder "
            "again"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing or found["mismatched_keys"]:
        raise CheckpointError(
            f"{folder} lacks weights of Qwen2.5-VL: {', '.join(missing[:5]) or 'other shapes'}; "
            "copy the whole folder again"
        )
    return model


def require_transformers() -> None:
    """Raise MissingExtraError where transformers is not installed."""
    if find_spec("transformers") is None:
        raise MissingExtraError("the language-vision model Qwen2.5-VL", "train", "transformers")


class VisionTower(nn.Module):
    """Images through ``visual``, all of one size, windows as rows of a batch.

    Args:
        visual: ``Qwen2_5_VLModel.visual``; it stays the owner of the weights.
        height, width: of the images in pixels.
        image: mean and deviation.
    """

    shift: Tensor
    scale: Tensor
    order: Tensor
    back: Tensor
    together: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, visual: Any, height: int, width: int, image: tuple[Rgb, Rgb]) -> None:
        super().__init__()
        config = visual.config
        self.patch, self.merge = int(config.patch_size), int(config.spatial_merge_size)
        self.frames = int(config.temporal_patch_size)
        factor = self.patch * self.merge
        if height % factor or width % factor:
            raise ConfigError(
                f"Qwen2.5-VL cuts images into cells of {factor} pixels, the contract's are "
                f"{height}x{width}; set contract.image_size to a multiple of {factor}, such as "
                f"{max(factor, round(height / factor) * factor)}",
                field="contract.image_size",
            )
        self.grid = (height // self.patch, width // self.patch)
        self.cells = self.grid[0] * self.grid[1] // self.merge**2
        window = int(config.window_size) // factor
        order, lengths = _windows(self.grid[0] // self.merge, self.grid[1] // self.merge, window)
        patches = [length * self.merge**2 for length in lengths]
        self.window = patches[0] if len(set(patches)) == 1 else 0
        self.heads, self.full = int(config.num_heads), set(config.fullatt_block_indexes)
        self._constant("shift", torch.tensor(image[0]).view(3, 1, 1))
        self._constant("scale", torch.tensor(image[1]).view(3, 1, 1))
        self._constant("order", order)
        self._constant("back", order.argsort())
        number = torch.arange(len(patches)).repeat_interleave(torch.tensor(patches))
        self._constant("together", number[:, None] == number[None])
        cos, sin = _rotations(visual, self.grid, self.merge, order)
        self._constant("cos", cos)
        self._constant("sin", sin)

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def patches(self, images: Tensor) -> Tensor:
        """``uint8 (N, H, W, 3)`` to ``(N, P, 3 · frames · patch²)``, as the PIL processor gives."""
        pixels = images.permute(0, 3, 1, 2).float().div(255.0)
        pixels = (pixels - self.shift) / self.scale
        rows, columns = (side // self.merge for side in self.grid)
        m, p = self.merge, self.patch
        cut = pixels.reshape(len(images), 3, rows, m, p, columns, m, p)
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        cut = cut.expand(-1, -1, -1, -1, -1, -1, self.frames, -1, -1)
        return cut.reshape(len(images), self.grid[0] * self.grid[1], -1)

    def forward(self, visual: Any, images: Tensor) -> Tensor:
        """``uint8 (N, H, W, 3)`` to embeddings ``(N, cells, C)`` in the language model's width."""
        count, unit = len(images), self.merge**2
        x = visual.patch_embed(self.patches(images).flatten(0, 1)).unflatten(0, (count, -1))
        x = x.unflatten(1, (-1, unit))[:, self.order].flatten(1, 2)
        for number, block in enumerate(visual.blocks):
            x = x + self._attend(block.attn, block.norm1(x), whole=number in self.full)
            x = x + block.mlp(block.norm2(x))
        merged = visual.merger(x.flatten(0, 1)).unflatten(0, (count, -1))
        found: Tensor = merged[:, self.back]
        return found

    def _attend(self, attention: Any, x: Tensor, *, whole: bool) -> Tensor:
        query, key, value = attention.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key = self._rotated(query), self._rotated(key)
        windows = not whole and self.window > 0
        parts = (query, key, value.to(query.dtype))
        if windows:
            parts = tuple(t.unflatten(1, (-1, self.window)).flatten(0, 1) for t in parts)
        mask = None if whole or windows else self.together
        query, key, value = (t.transpose(1, 2) for t in parts)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out = out.transpose(1, 2).flatten(2).reshape(x.shape)
        projected: Tensor = attention.proj(out)
        return projected

    def _rotated(self, x: Tensor) -> Tensor:
        """``(N, P, heads, d)`` rotated by its place, computed in fp32 as the model's own code."""
        wide = x.float()
        one, two = wide.chunk(2, dim=-1)
        turned = wide * self.cos[:, None] + torch.cat([-two, one], dim=-1) * self.sin[:, None]
        return turned.to(x.dtype)


def layer_states(
    model: Any, embeddings: Tensor, positions: Tensor, valid: Tensor, last: int
) -> list[Tensor]:
    """The last ``last`` hidden states ``(B, L, C)`` of the language model, the final one normed.

    Args:
        embeddings: ``(B, L, C)``.
        positions: ``int64 (3, L)``: time, row, column.
        valid: ``bool (B, L)``, False at padding, which stands at the end.
    """
    text = model.language_model
    length = embeddings.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=embeddings.device).tril()
    mask = causal & valid[:, None, None]
    rotations = text.rotary_emb(embeddings, positions[:, None].expand(-1, len(embeddings), -1))
    hidden, states = embeddings, [embeddings]
    for layer in text.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotations, use_cache=False)
        states.append(hidden)
    states[-1] = text.norm(hidden)
    return states[-last:]


def sequence_positions(parts: Sequence[int | tuple[int, int]]) -> Tensor:
    """``int64 (3, L)``: Qwen2.5-VL's positions of a row of parts.

    A part is a number of text tokens, or the rows and columns of an image's cells.
    """
    found, start = [], 0
    for part in parts:
        if isinstance(part, int):
            steps = torch.arange(part) + start
            found.append(steps.expand(3, -1))
            start += part
        else:
            rows, columns = part
            row = torch.arange(rows).repeat_interleave(columns) + start
            column = torch.arange(columns).repeat(rows) + start
            found.append(torch.stack([torch.full_like(row, start), row, column]))
            start += max(part)
    return torch.cat(found, dim=1)


def _windows(rows: int, columns: int, window: int) -> tuple[Tensor, list[int]]:
    """The order of cells in which each window's stand together, and how many each has."""
    cells = torch.arange(rows * columns).view(rows, columns)
    parts = [
        cells[top : top + window, left : left + window].flatten()
        for top in range(0, rows, window)
        for left in range(0, columns, window)
    ]
    return torch.cat(parts), [len(part) for part in parts]


def _rotations(
    visual: Any, grid: tuple[int, int], merge: int, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(P, d)`` of all patches, in the order in which blocks see them."""
    shape = (grid[0] // merge, merge, grid[1] // merge, merge)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places = [axis.reshape(shape).transpose(1, 2).flatten() for axis in (rows, columns)]
    rotary = type(visual.rotary_pos_emb)(visual.config)  # the model's own may be without memory
    turns = rotary(torch.empty(0), torch.stack(places, dim=-1))
    cos, sin = (turn.unflatten(0, (-1, merge**2))[order].flatten(0, 1) for turn in turns)
    return cos, sin


def _rgb(values: Sequence[float]) -> Rgb:
    red, green, blue = (float(value) for value in values)
    return red, green, blue

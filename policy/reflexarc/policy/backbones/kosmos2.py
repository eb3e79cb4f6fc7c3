"""Kosmos-2 from a local folder or a hub id: its vision tower frozen, adapters in its text model.

Each frame is read by itself, as ``<s> <image> 64 image tokens </image> instruction <action> </s>``,
where ``<action>`` is a learned embedding; its last hidden state is the frame's feature. The text
model is causal, so what follows the action token never reaches it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import CheckpointError, ConfigError, MissingExtraError
from reflexarc.policy.backbones.image_statistics import image_statistics
from reflexarc.policy.backbones.kosmos2_text import load_instruction_tokens
from reflexarc.policy.backbones.model_folder import (
    WantedModel,
    model_folder,
    read_config,
    revision_of,
    weights_sha256,
)
from reflexarc.policy.backbones.vision import Rgb
from reflexarc.policy.interface import FrozenBackbone, Tensors
from reflexarc.policy.mobile_vla.backbone import MobileBackbone
from reflexarc.policy.mobile_vla.config import Kosmos2Config, LoRAConfig

_FILES = ("*.json", "*.safetensors", "*.model")
_WANTED = WantedModel(
    "backbone.path", "a Kosmos-2 model", "microsoft/kosmos-2-patch14-224", _FILES
)  # fmt: skip
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_CLIP: tuple[Rgb, Rgb] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Instructions of one batch are read at one length, so that a row's arithmetic hardly ever depends
# on its neighbours: a multiple of this.
_TEXT_STEP = 32
_EMBEDDING_STD = 0.02


class Kosmos2Vision(nn.Module):
    """The vision tower and the resampler that makes image tokens of it, frozen.

    ``uint8 (N, H, W, 3)`` RGB to ``float32 (N, 64, width of the text model)``.
    """

    _shift: Tensor
    _scale: Tensor

    def __init__(self, model: Any, mean: Rgb, std: Rgb) -> None:
        super().__init__()
        self.tower, self.resampler = model.vision_model, model.image_to_text_projection
        self.register_buffer("_shift", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_scale", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Kosmos2Vision:
        """Frozen: stays in eval mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).to(self._shift.dtype) / 255.0
        dtype = next(self.tower.parameters()).dtype
        hidden = self.tower(((pixels - self._shift) / self._scale).to(dtype)).last_hidden_state
        # As Kosmos2Model.get_image_features does it.
        normed = self.tower.model.post_layernorm(hidden)
        tokens: Tensor = self.resampler(nn.functional.normalize(normed, dim=-1))[0]
        return tokens.float()


class Kosmos2Backbone(MobileBackbone):
    """See the module. D is the text model's width, 2048 in the published one.

    Attributes:
        vision: frozen.
        text: ``Kosmos2TextModel`` with low-rank adapters; all but these is frozen.
        action_token: ``(D,)``, learned.
    """

    def __init__(self, config: Kosmos2Config, contract: PolicyContract) -> None:
        super().__init__()
        for package in ("transformers", "peft"):
            if find_spec(package) is None:
                raise MissingExtraError("the backbone kosmos2", "train", package)
        folder = model_folder(config.path, _WANTED)
        model = load_kosmos2(folder).to(_DTYPES[config.precision])
        self._identity = FrozenBackbone("kosmos2", weights_sha256(folder), revision_of(folder))
        self.tokens = load_instruction_tokens(
            folder, config.max_text_tokens, int(model.config.text_config.vocab_size)
        )
        self._assemble(model, *image_statistics(folder, _CLIP, _PREPROCESSORS), config.lora)
        (camera,) = contract.cameras
        size = int(model.config.vision_config.image_size)
        if (camera.height, camera.width) != (size, size):
            raise ConfigError(
                f"this Kosmos-2 sees images of {size}x{size}, the contract's are "
                f"{camera.height}x{camera.width}; set contract.image_size to {size}",
                field="contract.image_size",
            )
        self._check_length(model, config.max_text_tokens)

    def _assemble(self, model: Any, mean: Rgb, std: Rgb, lora: LoRAConfig) -> None:
        self.width = int(model.config.text_config.embed_dim)
        self.image_tokens = int(model.config.latent_query_num)
        self.vision = Kosmos2Vision(model, mean, std)
        self.text = model.text_model.requires_grad_(False)
        add_adapters(self, lora)
        self.action_token = nn.Parameter(torch.randn(self.width) * _EMBEDDING_STD)

    @property
    def identities(self) -> Mapping[str, FrozenBackbone]:
        return {"vision": self._identity, "text": self._identity}

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.text.model.layers)

    def embed_instructions(self, instructions: Sequence[str | None]) -> Tensors:
        """``"ids" int64 (N, max_text_tokens)``, padded, and ``"count" int64 (N,)`` of the real."""
        return self.tokens.rows(instructions)

    def image_rows(self, images: Tensor) -> Tensor:
        rows: Tensor = self.vision(images)
        return rows

    def action_features(self, images: Tensor, instructions: Tensors) -> Tensor:
        embedded, mask, place = self.sequence(images, instructions)
        hidden = self.text(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
        rows = torch.arange(len(place), device=place.device)
        feature: Tensor = hidden.last_hidden_state[rows, place].float()
        return feature

    def sequence(self, images: Tensor, instructions: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """What the text model reads.

        Returns embeddings ``(N, L, D)`` in the order of :meth:`order`, the attention mask
        ``int64 (N, L)``, and the action token's place ``int64 (N,)``.
        """
        ids, count = instructions["ids"], instructions["count"]
        longest = min(-(-int(count.max()) // _TEXT_STEP) * _TEXT_STEP, ids.shape[1])
        order = self.order(ids[:, :longest], count)
        place = 3 + self.image_tokens + count
        embedded = self.text.model.embed_tokens(order)
        dtype = embedded.dtype
        columns = torch.arange(order.shape[1], device=order.device)
        start = 2  # behind <s> and <image>
        embedded = torch.cat(
            [embedded[:, :start], images.to(dtype), embedded[:, start + self.image_tokens :]], dim=1
        )
        is_action = (columns == place[:, None])[..., None]
        embedded = torch.where(is_action, self.action_token.to(dtype), embedded)
        mask = (columns <= place[:, None] + 1).long()
        return embedded, mask, place

    def order(self, ids: Tensor, count: Tensor) -> Tensor:
        """Token ids ``(N, L)`` of the whole sequence: BOS, image, text, action, EOS, padding.

        The places of image tokens and of the action token hold ``<unk>``: embeddings of their own
        stand there.
        """
        special, batch, longest = self.tokens.special, *ids.shape
        length = 5 + self.image_tokens + longest
        order = ids.new_full((batch, length), special.pad)
        order[:, 0], order[:, 1] = special.bos, special.begin_of_image
        order[:, 2 : 2 + self.image_tokens] = special.unknown
        order[:, 2 + self.image_tokens] = special.end_of_image
        text = 3 + self.image_tokens
        order[:, text : text + longest] = ids
        rows = torch.arange(batch, device=ids.device)
        order[rows, text + count] = special.unknown
        order[rows, text + count + 1] = special.eos
        return order

    def _check_length(self, model: Any, text: int) -> None:
        known = int(model.config.text_config.max_position_embeddings)
        if 5 + self.image_tokens + text > known:
            raise ConfigError(
                f"backbone.max_text_tokens {text} and {5 + self.image_tokens} others are more than "
                f"the {known} places of this Kosmos-2; lower it",
                field="backbone.max_text_tokens",
            )


def add_adapters(backbone: nn.Module, config: LoRAConfig) -> None:
    """Put PEFT's low-rank adapters into the modules that ``target_modules`` matches.

    Raises ConfigError where it matches nothing, or a module outside of the text model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    try:
        pattern = re.compile(config.target_modules)
    except re.error as error:
        raise ConfigError(
            f"backbone.lora.target_modules is no regular expression: {error}",
            field="backbone.lora.target_modules",
        ) from error
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    matched = [name for name in linear if pattern.fullmatch(name)]
    outside = [name for name in matched if not name.startswith("text.")]
    if not matched or outside:
        wrong = (
            f"matches {outside[0]}, outside of the text model, whose features are stored"
            if outside
            else f"matches none of its {len(linear)} linear layers, such as "
            + ", ".join([name for name in linear if name.startswith("text.")][:3])
        )
        raise ConfigError(
            f"backbone.lora.target_modules {config.target_modules!r} {wrong}",
            field="backbone.lora.target_modules",
        )
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=matched,
        bias="none",
    )
    inject_adapter_in_model(lora, backbone)
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def build_kosmos2(fields: Mapping[str, Any]) -> Any:  # transformers is untyped here
    """The model of such a ``config.json``, its weights random."""
    from transformers import Kosmos2Config as Config
    from transformers import Kosmos2Model

    return Kosmos2Model(Config(**{k: v for k, v in fields.items() if k != "model_type"}))


def load_kosmos2(folder: Path) -> Any:
    """The model of a folder, in eval mode and in single precision.

    Raises CheckpointError for another model, or one that lacks weights.
    """
    fields = read_config(folder, "kosmos-2", _WANTED)
    try:
        model = build_kosmos2(fields)
        missing, _ = model.load_state_dict(_weights(folder), strict=False)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded as Kosmos-2: {str(error)[:400]}; copy the whole folder"
        ) from error
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of Kosmos-2, the first is {missing[0]}; copy "
            "the whole folder again"
        )
    return model.eval()


def _weights(folder: Path) -> dict[str, Tensor]:
    """Its tensors by name inside ``Kosmos2Model``: the language head is left out."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                if not name.startswith("text_model.lm_head."):
                    found[name.removeprefix("model.")] = file.get_tensor(name).float()
    return found

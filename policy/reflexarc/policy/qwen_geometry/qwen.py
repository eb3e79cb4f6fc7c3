"""The semantic states of a Qwen2.5-VL: chat prefix, one image a camera, the instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import CheckpointError, ConfigError, UnknownInstructionError
from reflexarc.policy.backbones.qwen2_5_vl import (
    QwenFiles,
    VisionTower,
    build_qwen,
    layer_states,
    load_qwen,
    read_folder,
    sequence_positions,
)
from reflexarc.policy.interface import Task, Tensors
from reflexarc.policy.qwen_geometry.config import SemanticConfig
from reflexarc.policy.qwen_geometry.semantic import Semantic

_PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
_VISION_START, _VISION_END, _IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
_SPECIAL = ("<|im_start|>", "<|im_end|>", _VISION_START, _VISION_END, _IMAGE)


class QwenSemantic(Semantic):
    """Trained with the policy, unless the recipe freezes ``semantic``; runs once a decision.

    Images stay pixels until then: what a model that learns makes of them cannot be kept.
    """

    prefix: Tensor
    ends: Tensor
    positions: Tensor

    def __init__(
        self,
        config: SemanticConfig,
        contract: PolicyContract,
        files: Mapping[str, bytes],
        *,
        layers: int,
    ) -> None:
        super().__init__()
        carried = QwenFiles.from_files(files)
        if carried is not None:
            self.files = carried
            model = build_qwen(carried.config)
        else:
            assert config.path is not None  # the config's own validator
            self.files, folder = read_folder(config.path)
            model = load_qwen(folder, config.precision)
        if config.precision == "bf16":
            model = model.to(torch.bfloat16)
        self.model = model
        text = model.config.text_config
        self.width, self.states = int(text.hidden_size), layers
        if layers > int(text.num_hidden_layers):
            raise ConfigError(
                f"policy.head.layers is {layers}, but this Qwen2.5-VL has "
                f"{text.num_hidden_layers} layers, one state for each; set policy.head.layers to "
                f"{text.num_hidden_layers} or fewer",
                field="policy.head.layers",
            )
        self.length = config.max_instruction_tokens
        self.tokenizer = _Tokenizer(self.files.tokenizer, int(model.config.image_token_id))
        camera, views = contract.cameras[0], len(contract.cameras)
        self.tower = VisionTower(model.visual, camera.height, camera.width, self.files.image)
        cells = tuple(side // self.tower.merge for side in self.tower.grid)
        prefix = self.tokenizer.ids(_PREFIX)
        parts: list[int | tuple[int, int]] = [len(prefix)]
        for _ in range(views):
            parts += [1, (cells[0], cells[1]), 1]
        positions = sequence_positions([*parts, self.length])
        ends = self.tokenizer.ids(_VISION_START + _VISION_END)
        self._constant("prefix", torch.tensor(prefix))
        self._constant("ends", torch.tensor(ends))
        self._constant("positions", positions)

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def task_rows(self, tasks: Sequence[Task]) -> Tensors:
        """``"instruction" int64 (N, T)`` with the end of the turn, padded, and where it is real."""
        tokens = torch.zeros(len(tasks), self.length, dtype=torch.int64)
        real = torch.zeros(len(tasks), self.length, dtype=torch.bool)
        for row, task in enumerate(tasks):
            if not task.instruction:
                raise UnknownInstructionError(
                    "this policy reads an instruction, none came; send one with every request",
                    field="instruction",
                )
            ids = self.tokenizer.ids(task.instruction, plain=True) + self.tokenizer.ids(_SUFFIX)
            if len(ids) > self.length:
                raise UnknownInstructionError(
                    f"the instruction has {len(ids)} tokens with the end of the turn, the policy "
                    f"was built for {self.length} (policy.semantic.max_instruction_tokens): "
                    f"{task.instruction[:80]!r}; send a shorter one",
                    field="instruction",
                )
            tokens[row, : len(ids)] = torch.tensor(ids)
            real[row, : len(ids)] = True
        return {"instruction": tokens, "instruction_real": real}

    def frame_rows(self, images: Tensor) -> Tensor:
        """The pixels themselves, ``uint8 (N, V, H, W, 3)``."""
        return images

    def forward(self, task: Tensors, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        batch, views = rows.shape[:2]
        seen = self.tower(self.model.visual, rows.flatten(0, 1)).unflatten(0, (batch, views))
        embed = self.model.language_model.embed_tokens
        before = embed(self.prefix).expand(batch, -1, -1)
        start, end = (row.expand(batch, 1, -1) for row in embed(self.ends))
        parts = [before]
        for view in seen.to(before.dtype).unbind(1):
            parts += [start, view, end]
        told = embed(task["instruction"])
        embeddings = torch.cat([*parts, told], dim=1)
        real = task["instruction_real"]
        leading = embeddings.shape[1] - real.shape[1]
        valid = torch.cat([real.new_ones(batch, leading), real], dim=1)
        states = layer_states(self.model, embeddings, self.positions, valid, self.states)
        return [state.float() for state in states], valid

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.language_model.layers)

    def extra_files(self) -> Mapping[str, bytes]:
        return self.files.to_files()


class _Tokenizer:
    """``tokenizer.json`` by the library that wrote it, with the marks that images need."""

    def __init__(self, content: bytes, image_token: int) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises a plain Exception
            raise CheckpointError(
                f"the tokenizer cannot be read: {error}; copy tokenizer.json again"
            ) from error
        missing = [mark for mark in _SPECIAL if self._tokenizer.token_to_id(mark) is None]
        if missing:
            raise CheckpointError(
                f"the tokenizer has no {', '.join(missing)}: it is not Qwen2.5-VL's; copy "
                "tokenizer.json from the model's own folder"
            )
        found = self._tokenizer.token_to_id(_IMAGE)
        if found != image_token:
            raise CheckpointError(
                f"the tokenizer's {_IMAGE} is {found}, the model's image_token_id {image_token}: "
                "they do not belong together; copy both from one folder"
            )

    def ids(self, text: str, *, plain: bool = False) -> list[int]:
        """Token ids. In a ``plain`` text the special marks mean nothing but their letters."""
        if plain:
            for mark in _SPECIAL:
                text = text.replace(mark, " ")
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

"""Any text model of transformers as a language encoder: masked mean of the last hidden state.

From a local folder or a hub id, by safetensors alone; code that comes with a model is never run.
Only ``reflexarc data embed-language`` uses this module: serving looks vectors up.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflexarc.contract.errors import CheckpointError, ConfigError, MissingExtraError
from reflexarc.policy.backbones.model_folder import (
    WantedModel,
    model_folder,
    revision_of,
    weights_sha256,
)
from reflexarc.policy.language import TextEncoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_WANTED = WantedModel("--encoder", "a text model", "Qwen/Qwen2.5-7B-Instruct", _FILES)
# Beyond this, what a tokenizer states as its longest text means that it has no limit.
_NO_LIMIT = 1 << 24


class TransformersTextEncoder:
    """One vector a text: the mean over its tokens, special ones included, of what the model's
    last layer gives.

    Texts of equally many tokens are computed together, so no token of padding is ever made.

    Args:
        path: folder that ``save_pretrained`` wrote (model and tokenizer), or a hub id.
        device: where the model computes.
        dtype: ``fp32``, ``bf16`` or ``fp16``, of weights and arithmetic; means are taken in fp32.
        revision: of a hub id: a branch, tag or commit.
        batch_size: texts in one pass.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: no such model, no safetensors, code of its own, or weights that lack.
    """

    def __init__(
        self,
        path: str,
        *,
        device: torch.device | None = None,
        dtype: str = "fp32",
        revision: str | None = None,
        batch_size: int = 16,
    ):
        if find_spec("transformers") is None:
            raise MissingExtraError("embedding instructions", "train", "transformers")
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        folder = model_folder(path, _WANTED, revision)
        self.identity = TextEncoder(
            name=folder.name if Path(path).expanduser().is_dir() else path,
            revision=revision_of(folder),
            sha256=weights_sha256(folder),
            pooling="masked mean of the last hidden state",
            dtype=dtype,
        )
        self._tokenizer, model = _load(folder, DTYPES[dtype])
        self._model = model.to(device or torch.device("cpu"))
        self._batch_size = batch_size

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """``float32 (N, width)`` on the CPU, one row a text.

        Raises ConfigError for a text without tokens, or of more tokens than the model reads.
        """
        tokens = [self._tokens(text) for text in texts]
        alike: dict[int, list[int]] = {}
        for row, ids in enumerate(tokens):
            alike.setdefault(len(ids), []).append(row)
        vectors: dict[int, Tensor] = {}
        for rows in alike.values():
            for start in range(0, len(rows), self._batch_size):
                part = rows[start : start + self._batch_size]
                vectors.update(zip(part, self._means([tokens[row] for row in part]), strict=True))
        return torch.stack([vectors[row] for row in range(len(texts))])

    def _means(self, tokens: list[list[int]]) -> Tensor:
        """``float32 (n, width)`` of equally long texts."""
        ids = torch.tensor(tokens, device=self._model.device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        hidden: Tensor = self._model(**given).last_hidden_state
        return hidden.float().mean(dim=1).cpu()

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        if not ids:
            raise ConfigError(
                f"{self.identity.name} makes no token of the instruction {text!r}; give every "
                "episode an instruction, or name the texts with --instructions FILE"
            )
        limit = min(
            int(self._tokenizer.model_max_length),
            int(getattr(self._model.config, "max_position_embeddings", None) or _NO_LIMIT),
        )
        if len(ids) > limit:
            raise ConfigError(
                f"an instruction has {len(ids)} tokens, {self.identity.name} reads {limit}: "
                f"{text[:200]!r}; shorten it, or choose another --encoder"
            )
        return ids


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:  # transformers is untyped here
    """Tokenizer and model, of an encoder-decoder its encoder. Raises CheckpointError."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists every tensor of the heads that are not loaded
    safely = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **safely)
        model, found = AutoModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **safely
        )
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, by version
        raise CheckpointError(
            f"--encoder: {folder} cannot be loaded as a text model of transformers without code "
            f"of its own ({type(error).__name__}): {str(error)[:400]}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    # A pooler stands behind the last hidden state; a model that was trained without has none.
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing:
        raise CheckpointError(
            f"--encoder: {folder} lacks {len(missing)} tensors of its model, the first is "
            f"{missing[0]}; copy the whole folder again"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return tokenizer, model.eval()

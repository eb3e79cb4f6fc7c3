"""A tiny random Kosmos-2 in a folder, as a user's would be: model and processor's files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from reflexarc.policy.backbones.kosmos2 import build_kosmos2

WIDTH, IMAGE_TOKENS, SIZE = 32, 4, 32
VOCABULARY = 64_010


def tokenizer_folder() -> Path:
    """Kosmos-2's own sentencepiece model; skips where the sample data are not there."""
    shared = os.environ.get("REFLEXARC_SHARED_DATA")
    root = Path(shared) if shared else Path(__file__).parents[3] / "shared" / "data"
    folder = root / "kosmos2_tokenizer"
    if not (folder / "sentencepiece.bpe.model").is_file():
        pytest.skip(f"{folder} is not there")
    return folder


def tiny_fields(**text: Any) -> dict[str, Any]:
    return {
        "model_type": "kosmos-2",
        "text_config": {
            "vocab_size": VOCABULARY, "embed_dim": WIDTH, "layers": 2, "ffn_dim": 64,
            "attention_heads": 4, "dropout": 0.0, "attention_dropout": 0.0, **text,
        },
        "vision_config": {
            "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": SIZE, "patch_size": 16,
        },
        "latent_query_num": IMAGE_TOKENS,
    }  # fmt: skip


def write_tiny_kosmos2(folder: Path) -> Path:
    """Model, tokenizer and preprocessor, as ``save_pretrained`` writes them."""
    from transformers import XLMRobertaTokenizer

    torch.manual_seed(3)
    build_kosmos2(tiny_fields()).save_pretrained(folder)
    XLMRobertaTokenizer.from_pretrained(tokenizer_folder()).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.4, 0.4], "image_std": [0.3, 0.3, 0.3]})
    )
    return folder

"""A Qwen2.5-VL of random weights, small enough for tests, with a tokenizer made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
         "<|video_pad|>", "<|endoftext|>")  # fmt: skip
SIZE = 56
"""Of images: 4x4 patches of 14 pixels, 2x2 cells in the language model."""


def qwen_fields(**text: Any) -> dict[str, Any]:
    """A ``config.json``, about 0.6 million weights; ``text`` replaces fields of the text model."""
    marks = {mark: 256 + place for place, mark in enumerate(MARKS)}
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "image_token_id": marks["<|image_pad|>"],
        "video_token_id": marks["<|video_pad|>"],
        "vision_start_token_id": marks["<|vision_start|>"],
        "vision_end_token_id": marks["<|vision_end|>"],
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],
            },
            **text,
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": text.get("hidden_size", 64),
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 28,
            "fullatt_block_indexes": [2],
        },
    }


def write_tokenizer(folder: Path, *, without: tuple[str, ...] = ()) -> None:
    """``tokenizer.json``: one token a byte, and the marks that images and turns need."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(mark, special=True) for mark in MARKS if mark not in without]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def save_tiny_qwen(folder: Path, **text: Any) -> Path:
    """The folder that ``save_pretrained`` would leave of a downloaded model."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    fields = qwen_fields(**text)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(fields))
    model.save_pretrained(str(folder))
    write_tokenizer(folder)
    preprocessor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def tiny_config(folder: Path, **fields: Any) -> dict[str, Any]:
    """``policy`` of a recipe around the tiny model."""
    return {
        "semantic": {"name": "qwen2_5_vl", "path": str(folder), "max_instruction_tokens": 96},
        "geometry": {"name": "rays"},
        "head": {
            "layers": 3,
            "heads": 4,
            "head_dimension": 8,
            "feed_forward": 2,
            "self_attention": True,
            "future_tokens": 2,
            "positions": 8,
            "output_dimension": 32,
            "output_hidden": 32,
            "state_hidden": 32,
        },
        "compressor": "pool",
        "geometry_tokens": 4,
        "qformer_heads": 4,
        **fields,
    }

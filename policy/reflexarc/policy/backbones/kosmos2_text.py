"""Kosmos-2's instructions as token ids of a fixed length, and the ids of its special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reflexarc.contract.errors import CheckpointError, UnknownInstructionError
from reflexarc.policy.interface import Tensors

_IMAGE_BEGINS, _IMAGE_ENDS = "<image>", "</image>"
# As transformers' Kosmos2Processor adds them, to a tokenizer that was saved without.
_ADDED = ("</doc>", _IMAGE_BEGINS, _IMAGE_ENDS)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that stand around image and instruction."""

    bos: int
    eos: int
    pad: int
    unknown: int
    begin_of_image: int
    end_of_image: int


class InstructionTokens:
    """Turns instructions into ids.

    Args:
        tokenizer: of transformers.
        longest: ids of a row.
    """

    def __init__(self, tokenizer: Any, longest: int) -> None:
        self._tokenizer, self._longest = tokenizer, longest
        ids = tokenizer.convert_tokens_to_ids
        self.special = SpecialTokens(
            bos=int(tokenizer.bos_token_id),
            eos=int(tokenizer.eos_token_id),
            pad=int(tokenizer.pad_token_id),
            unknown=int(tokenizer.unk_token_id),
            begin_of_image=int(ids(_IMAGE_BEGINS)),
            end_of_image=int(ids(_IMAGE_ENDS)),
        )

    def rows(self, instructions: Sequence[str | None]) -> Tensors:
        """``"ids" int64 (N, longest)`` without special tokens, padded, and ``"count" (N,)``.

        Raises UnknownInstructionError for an instruction that is empty or too long.
        """
        ids = torch.full((len(instructions), self._longest), self.special.pad)
        count = torch.zeros(len(instructions), dtype=torch.int64)
        for row, text in enumerate(instructions):
            found = self._ids(text)
            ids[row, : len(found)] = torch.tensor(found)
            count[row] = len(found)
        return {"ids": ids, "count": count}

    def _ids(self, text: str | None) -> list[int]:
        if not (text and text.strip()):
            raise UnknownInstructionError(
                "this policy is told where to go, and no instruction came", field="instruction"
            )
        words = " ".join(text.split())
        found: list[int] = self._tokenizer(words, add_special_tokens=False)["input_ids"]
        if len(found) > self._longest:
            raise UnknownInstructionError(
                f"an instruction has {len(found)} tokens, this policy reads at most "
                f"{self._longest} (backbone.max_text_tokens): {text[:200]!r}",
                field="instruction",
            )
        return found


def load_instruction_tokens(folder: Path, longest: int, vocabulary: int) -> InstructionTokens:
    """The tokenizer of a Kosmos-2 folder.

    Args:
        vocabulary: rows of the text model's embedding.

    Raises CheckpointError for a folder without one, or of another model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # OSError, ValueError, ImportError, by version
        raise CheckpointError(
            f"backbone.path: {folder} has no tokenizer that loads ({type(error).__name__}: "
            f"{str(error)[:300]}); copy the processor's files beside the model, and install the "
            "extra train, which brings sentencepiece"
        ) from error
    known = tokenizer.get_vocab()
    if _IMAGE_BEGINS not in known:
        tokenizer.add_tokens([token for token in _ADDED if token not in known])
    found = InstructionTokens(tokenizer, longest)
    special = found.special
    highest = max(special.begin_of_image, special.end_of_image, special.eos, special.pad)
    if highest >= vocabulary:
        raise CheckpointError(
            f"{folder}: its tokenizer has a token {highest}, the text model knows {vocabulary}; "
            "they belong to different models"
        )
    return found

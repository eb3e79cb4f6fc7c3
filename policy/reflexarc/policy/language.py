"""Embeddings of the instructions that a policy was trained on; part of its checkpoint.

Computed once with a language encoder, then looked up: serving needs no language model. An
instruction that is not among them is an error, never a vector of zeros.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from reflexarc.contract.errors import CheckpointError, ConfigError, UnknownInstructionError

VECTORS_FILE = "language_embeddings.safetensors"
INDEX_FILE = "language_embeddings.json"
_SHOWN_INSTRUCTIONS = 20


@dataclass(frozen=True)
class TextEncoder:
    """Which encoder made vectors, as far as it is known; empty where it is not.

    Attributes:
        name: a hub's id, a folder's name, or that of a built-in encoder.
        revision: a hub's commit, or a package's version.
        sha256: of its weights.
        pooling: what makes one vector of a text's tokens.
        dtype: what it computed in, such as ``fp32``; vectors are always stored as float32.
    """

    name: str
    revision: str = ""
    sha256: str = ""
    pooling: str = ""
    dtype: str = ""


class LanguageEncoder(Protocol):
    """Anything that turns N texts into ``float32 (N, dimension)``."""

    @property
    def identity(self) -> TextEncoder: ...

    def encode(self, texts: Sequence[str]) -> Tensor: ...


def canonical_instruction(instruction: str) -> str:
    """The form in which instructions are compared: lower case, single spaces."""
    return " ".join(instruction.lower().split())


class LanguageEmbeddings:
    """Instruction to ``float32 (dimension,)``.

    Attributes:
        instructions: canonical instructions, one a row.
        vectors: ``float32 (N, dimension)``.
        identity: the encoder that made them.
    """

    def __init__(self, instructions: Sequence[str], vectors: Tensor, encoder: str | TextEncoder):
        self.instructions = tuple(canonical_instruction(text) for text in instructions)
        self.vectors = vectors.detach().to("cpu", torch.float32).contiguous()
        self.identity = TextEncoder(encoder) if isinstance(encoder, str) else encoder
        if not self.instructions:
            raise ConfigError("no instruction to embed; the dataset names none")
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.instructions):
            raise ConfigError(
                f"{len(self.instructions)} instructions need as many rows of embeddings, "
                f"got {tuple(self.vectors.shape)}"
            )
        if not torch.isfinite(self.vectors).all():
            raise ConfigError("an instruction's embedding is not finite")
        self._rows = {text: row for row, text in enumerate(self.instructions)}

    @property
    def dimension(self) -> int:
        return self.vectors.shape[1]

    @property
    def encoder(self) -> str:
        """Name of the encoder."""
        return self.identity.name

    @classmethod
    def from_instructions(
        cls, instructions: Sequence[str], encoder: LanguageEncoder
    ) -> LanguageEmbeddings:
        """Embed each distinct instruction once; sorted, so that order does not matter."""
        distinct = sorted({canonical_instruction(text) for text in instructions})
        return cls(distinct, encoder.encode(distinct), encoder.identity)

    def missing(self, instructions: Sequence[str]) -> list[str]:
        """Those that have no embedding, canonical, each once, in order."""
        canonical = dict.fromkeys(map(canonical_instruction, instructions))
        return [text for text in canonical if text not in self._rows]

    def subset(self, instructions: Sequence[str]) -> LanguageEmbeddings:
        """The embeddings of these alone, sorted. Raises UnknownInstructionError."""
        distinct = sorted({canonical_instruction(text) for text in instructions})
        return LanguageEmbeddings(distinct, self.lookup(distinct), self.identity)

    def lookup(self, instructions: Sequence[str | None]) -> Tensor:
        """``float32 (N, dimension)`` on the CPU. Raises UnknownInstructionError."""
        return self.vectors[[self._row(text) for text in instructions]]

    def _row(self, instruction: str | None) -> int:
        row = self._rows.get(canonical_instruction(instruction or ""))
        if row is None:
            shown = [repr(text) for text in self.instructions[:_SHOWN_INSTRUCTIONS]]
            left = len(self.instructions) - len(shown)
            known = ", ".join(shown) + (f" and {left} more" if left else "")
            came = "none came" if not instruction else f"got {instruction[:200]!r}"
            raise UnknownInstructionError(
                f"this policy has no embedding of that instruction: {came}; send one of: {known}",
                field="instruction",
            )
        return row

    def to_files(self) -> dict[str, bytes]:
        """The two files of a checkpoint, by name."""
        known = {name: value for name, value in asdict(self.identity).items() if value}
        index: dict[str, Any] = {"encoder": known.pop("name", ""), **known}
        index |= {"dimension": self.dimension, "instructions": list(self.instructions)}
        return {
            VECTORS_FILE: safetensors.torch.save({"vectors": self.vectors}),
            INDEX_FILE: json.dumps(index, indent=2, ensure_ascii=False).encode(),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> LanguageEmbeddings:
        """The inverse of ``to_files``. Raises CheckpointError naming a file that is wrong."""
        for name in (VECTORS_FILE, INDEX_FILE):
            if name not in files:
                raise CheckpointError(f"the checkpoint has no {name}; copy the whole folder again")
        try:
            index = json.loads(files[INDEX_FILE])
            vectors = safetensors.torch.load(files[VECTORS_FILE])["vectors"]
            if index.get("dimension", vectors.shape[-1]) != vectors.shape[-1]:
                raise ConfigError(
                    f"{INDEX_FILE} says {index['dimension']} dimensions, the vectors have "
                    f"{vectors.shape[-1]}"
                )
            return cls(index["instructions"], vectors, _identity(index))
        except (ValueError, KeyError, TypeError, SafetensorError, ConfigError) as error:
            raise CheckpointError(f"the language embeddings cannot be read: {error}") from error

    def save(self, directory: Path) -> None:
        """Write both files, each under a temporary name first."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.to_files().items():
            temporary = directory / f".{name}.{os.getpid()}.tmp"
            temporary.write_bytes(content)
            temporary.replace(directory / name)

    @classmethod
    def load(cls, directory: Path) -> LanguageEmbeddings:
        names = (VECTORS_FILE, INDEX_FILE)
        present = [name for name in names if (directory / name).is_file()]
        return cls.from_files({name: (directory / name).read_bytes() for name in present})


def _identity(index: Mapping[str, Any]) -> TextEncoder:
    """The encoder that an index names. Raises TypeError for a fact that is no text."""
    facts = {"name": index["encoder"]}
    facts |= {name: index.get(name, "") for name in ("revision", "sha256", "pooling", "dtype")}
    for name, value in facts.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be text, got {value!r}")
    return TextEncoder(**facts)

"""From a recipe's ``family``, ``policy`` and ``language`` to a policy with random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import Policy
from reflexarc.policy.language import LanguageEmbeddings, LanguageEncoder, TextEncoder
from reflexarc.policy.language_table import read_table
from reflexarc.policy.registry import policy_class
from reflexarc.training.config import Recipe

_SHOWN = 5


class HashedTextEncoder:
    """A fixed random vector for every text, from its sha256: for smoke runs, not for robots.

    Two similar instructions are as far apart as two different ones.
    """

    identity = TextEncoder("hashed")

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``float32 (N, dimension)`` of unit norm."""
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
            row = torch.randn(self.dimension, generator=torch.Generator().manual_seed(seed))
            rows.append(row / row.norm())
        return torch.stack(rows)


def build_policy(recipe: Recipe, contract: PolicyContract, instructions: Sequence[str]) -> Policy:
    """The policy of a recipe; torch's global seed decides its weights.

    Raises MissingExtraError when a pretrained encoder is not installed, and ConfigError when the
    architecture does not fit the contract.
    """
    family = policy_class(recipe.family)
    config = family.config_class.model_validate(recipe.policy)
    if not contract.needs_language or family.reads_instructions(config):
        return family.build(config, contract, {})
    language = embed_instructions(recipe, instructions)
    return family.build(config, contract, language.to_files())


def embed_instructions(recipe: Recipe, instructions: Sequence[str]) -> LanguageEmbeddings:
    """Embed each instruction once, or look it up in the recipe's table.

    Raises:
        ConfigError: there is no such table, it is of another width than the policy takes, or it
            lacks an instruction.
        CheckpointError: the table's files are damaged.
        MissingExtraError: the encoder's package is not installed.
    """
    table = open_table(recipe)
    if table is not None:
        missing = table.missing(instructions)
        if missing:
            shown = ", ".join(map(repr, missing[:_SHOWN]))
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise ConfigError(
                f"language.table {recipe.language.table} by {table.encoder} lacks {len(missing)} "
                f"of the data's {len(set(instructions))} instructions: {shown}{more}; embed all "
                f"of them: {_make_table(recipe, table.encoder)} --overwrite",
                field="language.table",
            )
        return table.subset(instructions)
    if recipe.language.encoder == "hashed":
        encoder: LanguageEncoder = HashedTextEncoder(recipe.policy.get("language_dimension", 384))
    else:
        from reflexarc.policy.backbones.minilm import MiniLMEncoder

        encoder = MiniLMEncoder()
    return LanguageEmbeddings.from_instructions(instructions, encoder)


def open_table(recipe: Recipe) -> LanguageEmbeddings | None:
    """The recipe's table of the width that its policy takes; None where it names an encoder."""
    path = recipe.language.table
    if path is None:
        return None
    table = read_table(path, make=_make_table(recipe, "MODEL"))
    wanted = recipe.policy.get("language_dimension", table.dimension)
    if table.dimension != wanted:
        raise ConfigError(
            f"policy.language_dimension is {wanted}, but the embeddings in {path}, by "
            f"{table.encoder}, have {table.dimension}; set policy.language_dimension to "
            f"{table.dimension}, or make a table with another encoder: "
            f"{_make_table(recipe, 'MODEL')}",
            field="policy.language_dimension",
        )
    return table


def _make_table(recipe: Recipe, encoder: str) -> str:
    """The command that embeds the instructions of the recipe's data."""
    data = recipe.data
    paths = [*data.paths, *(source.path for source in data.sources)]
    named = [f"--data {path}" for path in paths] or [f"--suite {data.suite}"]
    if not paths and data.suite == "generated":
        named = [f"--data datasets/{data.suite}"]
    output = recipe.language.table or Path("DIR")
    output = output.with_suffix("") if output.is_file() else output
    return f"reflexarc data embed-language {' '.join(named)} --encoder {encoder} --output {output}"

"""From a recipe's ``family``, ``policy`` and ``language`` to a policy with random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from reflexarc.contract import PolicyContract
from reflexarc.policy.interface import Policy
from reflexarc.policy.language import LanguageEmbeddings, LanguageEncoder
from reflexarc.policy.registry import policy_class
from reflexarc.training.config import LanguageConfig, Recipe


class HashedTextEncoder:
    """A fixed random vector for every text, from its sha256: for smoke runs, not for robots.

    Two similar instructions are as far apart as two different ones.
    """

    name = "hashed"

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
    encoder = language_encoder(recipe.language, recipe.policy.get("language_dimension", 384))
    language = LanguageEmbeddings.from_instructions(instructions, encoder)
    return family.build(config, contract, language.to_files())


def language_encoder(config: LanguageConfig, dimension: int) -> LanguageEncoder:
    """The encoder that embeds the dataset's instructions once."""
    if config.encoder == "hashed":
        return HashedTextEncoder(dimension)
    from reflexarc.policy.backbones.minilm import MiniLMEncoder

    return MiniLMEncoder()

"""From a config, or from what a checkpoint carries, to the semantic part."""

from __future__ import annotations

from collections.abc import Mapping

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.qwen_geometry.config import QwenGeometryConfig
from reflexarc.policy.qwen_geometry.semantic import CompactSemantic, Semantic


def make_semantic(
    config: QwenGeometryConfig, contract: PolicyContract, files: Mapping[str, bytes]
) -> Semantic:
    """The semantic part, its trained weights as they are found or random.

    Args:
        files: of a checkpoint, or the instructions' embeddings alone.
    """
    layers = config.head.layers
    if config.semantic.name == "compact":
        language = LanguageEmbeddings.from_files(files)
        if language.dimension != config.language_dimension:
            raise ConfigError(
                f"language_dimension is {config.language_dimension}, but the embeddings of "
                f"{language.encoder} have {language.dimension}",
                field="policy.language_dimension",
            )
        return CompactSemantic(config.semantic, contract, language, layers=layers)
    from reflexarc.policy.qwen_geometry.qwen import QwenSemantic

    return QwenSemantic(config.semantic, contract, files, layers=layers)

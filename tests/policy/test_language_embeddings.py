"""Instructions have embeddings or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reflexarc.contract.errors import CheckpointError, ConfigError, UnknownInstructionError
from reflexarc.policy.backbones.minilm import MiniLMEncoder
from reflexarc.policy.language import INDEX_FILE, VECTORS_FILE, LanguageEmbeddings


@pytest.fixture(scope="module")
def encoder() -> MiniLMEncoder:
    return MiniLMEncoder()


def test_minilm_places_like_beside_like(encoder: MiniLMEncoder) -> None:
    vectors = encoder.encode(
        ["pick up the milk", "grasp the milk carton", "turn on the stove burner"]
    )
    assert vectors.shape == (3, encoder.dimension)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2


def test_an_embedding_does_not_depend_on_its_neighbours(encoder: MiniLMEncoder) -> None:
    alone = encoder.encode(["pick up the milk"])
    beside = encoder.encode(["a much longer instruction, with many more words", "pick up the milk"])
    assert torch.equal(alone[0], beside[1])


def test_embeddings_survive_a_folder_bit_for_bit(encoder: MiniLMEncoder, tmp_path: Path) -> None:
    embeddings = LanguageEmbeddings.from_instructions(
        ["Pick up  the milk", "pick up the milk", "pick up the butter"], encoder
    )
    assert embeddings.instructions == ("pick up the butter", "pick up the milk")
    embeddings.save(tmp_path)
    loaded = LanguageEmbeddings.load(tmp_path)
    assert loaded.instructions == embeddings.instructions
    assert loaded.encoder == "all-MiniLM-L6-v2"
    assert torch.equal(loaded.vectors, embeddings.vectors)
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX_FILE, VECTORS_FILE]


def test_lookup_ignores_case_and_spacing_only(embeddings: LanguageEmbeddings) -> None:
    rows = embeddings.lookup(["pick up the butter", " Pick up the  MILK "])
    assert torch.equal(rows, embeddings.vectors[[1, 0]])


@pytest.mark.parametrize("instruction", ["pick up the bread", "", None])
def test_an_unknown_instruction_lists_the_known_ones(
    embeddings: LanguageEmbeddings, instruction: str | None
) -> None:
    with pytest.raises(UnknownInstructionError) as caught:
        embeddings.lookup([instruction])
    assert "'pick up the milk', 'pick up the butter'" in caught.value.message
    assert caught.value.field == "instruction"
    if instruction:
        assert repr(instruction) in caught.value.message


def test_wrong_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="no instruction"):
        LanguageEmbeddings([], torch.empty(0, 4), "none")
    with pytest.raises(ConfigError, match="2 instructions need as many rows"):
        LanguageEmbeddings(["a", "b"], torch.zeros(1, 4), "none")
    with pytest.raises(ConfigError, match="not finite"):
        LanguageEmbeddings(["a"], torch.full((1, 4), torch.nan), "none")


def without_index(files: dict[str, bytes]) -> None:
    del files[INDEX_FILE]


def cut_vectors(files: dict[str, bytes]) -> None:
    files[VECTORS_FILE] = files[VECTORS_FILE][:20]


def one_instruction_fewer(files: dict[str, bytes]) -> None:
    files[INDEX_FILE] = json.dumps({"encoder": "x", "instructions": ["one"]}).encode()


@pytest.mark.parametrize("damage", [without_index, cut_vectors, one_instruction_fewer])
def test_damaged_files_are_refused(
    embeddings: LanguageEmbeddings, damage: Callable[[dict[str, bytes]], None]
) -> None:
    files = embeddings.to_files()
    damage(files)
    with pytest.raises(CheckpointError):
        LanguageEmbeddings.from_files(files)

"""Instructions embedded by any text model, and recipes that train with such a table."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from reflexarc.cli.main import app
from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy.backbones.text_model import TransformersTextEncoder
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.language import INDEX_FILE, VECTORS_FILE, LanguageEmbeddings
from reflexarc.policy.language_table import read_table, write_table
from reflexarc.training.preparation import prepare
from reflexarc.training.recipe_files import load_recipe

TEXTS = (
    "pick up the red block",
    "put the blue block into the drawer and close it",
    "open",
    "close the drawer",
    "pick up the blue block",
)
WORDS = sorted({word for text in TEXTS for word in text.split()})
WIDTH = 24
COMMON = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tokenizer(folder: Path, **special: Any) -> None:
    """One token a word; ``bos`` before and ``eos`` after every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", "[PAD]", "[BOS]", "[EOS]", *WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", **special
    ).save_pretrained(folder)


def save_qwen_tokenizer(folder: Path, **special: Any) -> None:
    """As Qwen ships it: vocabulary and merges of bytes, nothing before or after a text."""
    letters = [*sorted(set("".join(WORDS))), "\u0120"]  # byte-level BPE writes a space so
    merges = [("o", "p"), ("op", "e"), ("ope", "n"), ("\u0120", "b")]
    tokens = ["[PAD]", *letters, *map("".join, merges)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = "\n".join(map(" ".join, merges))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "[PAD]", "unk_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(hidden_size=WIDTH, intermediate_size=48, **COMMON))


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(hidden_size=WIDTH, intermediate_size=48, num_key_value_heads=1, **COMMON)
    return Qwen2ForCausalLM(config)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=WIDTH, d_kv=12, d_ff=48, num_layers=2, num_heads=2, vocab_size=64)
    return T5ForConditionalGeneration(config)


def save_model(make: Callable[[], Any], folder: Path) -> Path:
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():  # far from the tiny initial values, so that all matters
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (save_qwen_tokenizer if make is qwen2 else save_tokenizer)(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(qwen2, tmp_path_factory.mktemp("models") / "tiny-qwen2")


def hidden_states(folder: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden state and mask of one padded batch, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    model = AutoModel.from_pretrained(folder).eval()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    with torch.no_grad():
        return model(**tokens).last_hidden_state, tokens["attention_mask"]


WORD_COUNTS = [7, 12, 3, 5, 7]  # with [BOS] and [EOS]
# Letters, with "open" and a space before "b" merged to one.
LETTER_COUNTS = [len(t) - 3 * t.count("open") - t.count(" b") for t in TEXTS]


@pytest.mark.parametrize(
    ("make", "counts"), [(bert, WORD_COUNTS), (t5, WORD_COUNTS), (qwen2, LETTER_COUNTS)]
)
def test_vectors_are_masked_means_whatever_stands_beside_them(
    make: Callable[[], Any], counts: list[int], tmp_path: Path
) -> None:
    folder = save_model(make, tmp_path / "model")
    encoder = TransformersTextEncoder(str(folder))
    together = encoder.encode(TEXTS)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    assert together.shape == (len(TEXTS), WIDTH)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    # An independent way: one padded batch, the mean over the tokens that the mask leaves.
    hidden, mask = hidden_states(folder, list(TEXTS))
    assert mask.sum(1).tolist() == counts
    for row, (states, seen) in enumerate(zip(hidden.numpy(), mask.numpy(), strict=True)):
        mean = np.mean([state for state, one in zip(states, seen, strict=True) if one], axis=0)
        np.testing.assert_allclose(together[row].numpy(), mean, rtol=0, atol=1e-5)
    with_padding = hidden.mean(1)
    assert (with_padding[2] - together[2]).abs().max() > 1e-3  # padding would have been seen


def test_the_table_says_what_made_it(qwen_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join([*TEXTS, "", f"  {TEXTS[0].upper()} "]))
    result = embed(qwen_folder, tmp_path / "table", "--instructions", file)
    said = json.loads(result.stdout.splitlines()[-1])
    weights = (qwen_folder / "model.safetensors").read_bytes()
    assert said == {
        "path": str(tmp_path / "table"),
        "instructions": len(TEXTS),  # the last line is the first one again
        "dimension": WIDTH,
        "encoder": "tiny-qwen2",
        "revision": "",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "dtype": "fp32",
    }
    index = json.loads((tmp_path / "table" / INDEX_FILE).read_text())
    assert index["instructions"] == sorted(TEXTS)
    assert {key: index[key] for key in ("encoder", "sha256", "dtype", "dimension")} == {
        key: said[key] for key in ("encoder", "sha256", "dtype", "dimension")
    }
    assert index["pooling"] == "masked mean of the last hidden state"
    vectors = load_file(tmp_path / "table" / VECTORS_FILE)["vectors"]
    assert (vectors.dtype, vectors.shape) == (torch.float32, (len(TEXTS), WIDTH))
    expected = TransformersTextEncoder(str(qwen_folder)).encode(sorted(TEXTS))
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
    # In half precision: other vectors, near the same, and the table says so.
    embed(qwen_folder, tmp_path / "half", "--instructions", file, "--dtype", "bf16")
    half = read_table(tmp_path / "half")
    assert half.identity.dtype == "bf16"
    difference = (half.vectors - vectors).abs().max() / vectors.abs().max()
    assert 0 < difference < 0.1


def test_what_stands_there_is_replaced_on_request_alone(qwen_folder: Path, tmp_path: Path) -> None:
    file, table = tmp_path / "texts.txt", tmp_path / "table"
    file.write_text(TEXTS[0])
    embed(qwen_folder, table, "--instructions", file)
    before = {path.name: path.read_bytes() for path in table.iterdir()}
    file.write_text(TEXTS[1])
    refused = embed(qwen_folder, table, "--instructions", file, fails=True)
    assert "1 instructions by tiny-qwen2" in refused and "--overwrite" in refused
    assert {path.name: path.read_bytes() for path in table.iterdir()} == before
    embed(qwen_folder, table, "--instructions", file, "--overwrite")
    assert read_table(table).instructions == (TEXTS[1],)
    (table / "mine.txt").write_text("kept")
    assert "other files" in embed(
        qwen_folder, table, "--instructions", file, "--overwrite", fails=True
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table", "texts.txt"]


def test_a_table_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LanguageEmbeddings(["one"], torch.ones(1, 4), "a")
    write_table(first, tmp_path / "table", overwrite=False)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reflexarc.policy.whole_folders.os.fsync", full)
    for name in ("table", "new"):
        with pytest.raises(OSError, match="No space"):
            write_table(
                LanguageEmbeddings(["two"], torch.ones(1, 4), "b"), tmp_path / name, overwrite=True
            )
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
    assert read_table(tmp_path / "table").encoder == "a"


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def code_of_its_own(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "modeling.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit('ran')")


def fewer_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (pickled_weights, "holds no *.safetensors"),
        (code_of_its_own, "cannot be loaded"),
        (fewer_weights, "lacks 1 tensors"),
    ],
)
def test_models_that_are_not_safe_or_not_whole_are_refused(
    damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = save_model(qwen2, tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        TransformersTextEncoder(str(folder))
    assert said in caught.value.message


def test_texts_that_a_model_cannot_read_are_refused(tmp_path: Path) -> None:
    folder = save_model(qwen2, tmp_path / "model")
    save_qwen_tokenizer(folder, model_max_length=16)
    encoder = TransformersTextEncoder(str(folder))
    assert len(encoder.encode([TEXTS[3]])) == 1
    with pytest.raises(ConfigError, match="20 tokens, model reads 16: 'pick up the red block'"):
        encoder.encode([TEXTS[3], TEXTS[0]])
    with pytest.raises(ConfigError, match="makes no token"):
        encoder.encode([""])
    for arguments, message in (
        ([], "no instruction was named"),
        (["--instructions", str(tmp_path / "none.txt")], "cannot be read as text"),
        (["--data", str(tmp_path / "none")], "does not exist"),
        (["--suite", "libero_nothing"], "unknown suite"),
    ):
        assert message in embed(folder, tmp_path / "table", *arguments, fails=True)
    assert "no pickle" in embed(folder, tmp_path / "x.pkl", fails=True)
    assert not (tmp_path / "table").exists()


def embed(model: Path, output: Path, *more: object, fails: bool = False) -> Any:
    """Run the command: its result, or the message with which it fails."""
    arguments = ["data", "embed-language", "--encoder", str(model), "--output", str(output)]
    result: Result = CliRunner().invoke(app, [*arguments, "--threads", "1", *map(str, more)])
    if fails:
        assert result.exit_code != 0
        assert isinstance(result.exception, ConfigError | Exception)
        return str(result.exception)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result


# Training with a table.

Overrides = Callable[..., list[str]]


@pytest.fixture
def overrides(demonstrations: Path) -> Overrides:
    def make(table: Path, width: int = WIDTH) -> list[str]:
        return [
            f"data.paths=[{demonstrations}]",
            f"policy.language_dimension={width}",
            f"language={{table: {table}}}",
        ]

    return make


def test_a_recipe_trains_and_serves_with_a_table(
    qwen_folder: Path, demonstrations: Path, overrides: Overrides, tmp_path: Path
) -> None:
    table = tmp_path / "table"
    embed(qwen_folder, table, "--data", demonstrations)
    arguments = ["train", "statevla_tiny", "--output", str(tmp_path / "run"), "--threads", "1"]
    for override in overrides(table):
        arguments += ["--set", override]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    loaded = load_checkpoint(tmp_path / "run")
    language = loaded.policy.language
    assert isinstance(language, LanguageEmbeddings)
    assert language.identity == read_table(table).identity
    assert torch.equal(language.vectors, read_table(table).vectors)
    assert str(tmp_path) not in json.dumps(loaded.provenance)  # where the table lay
    # A checkpoint's folder is a table too.
    assert read_table(loaded.directory).instructions == language.instructions


def test_a_run_is_resumed_with_the_embeddings_that_it_began_with(
    overrides: Overrides, tmp_path: Path
) -> None:
    texts = ["pick up the red block", "pick up the blue block"]
    first, second = (tmp_path / name for name in ("first", "second"))
    for seed, table in enumerate((first, second)):
        vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
        write_table(LanguageEmbeddings(texts, vectors, "mine"), table, overwrite=False)

    def train(table: Path, *more: str) -> Result:
        arguments = ["train", "statevla_tiny", "--output", str(tmp_path / "run"), "--threads", "1"]
        for override in overrides(table):
            arguments += ["--set", override]
        return CliRunner().invoke(app, [*arguments, *more])

    assert train(first).exit_code == 0
    result = train(second, "--resume")
    assert isinstance(result.exception, ConfigError)
    assert "other embeddings of its instructions (by mine)" in result.exception.message
    # The table may have moved: a checkpoint is one too.
    last = (tmp_path / "run" / "last").read_text().strip()
    result = train(tmp_path / "run" / last, "--resume")
    assert result.exit_code == 0, result.output + str(result.exception)


def test_what_is_wrong_with_a_table_is_named_before_the_first_step(
    overrides: Overrides, tmp_path: Path
) -> None:
    def refusal(settings: list[str]) -> str:
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            prepare(load_recipe("statevla_tiny", settings), torch.device("cpu"))
        return caught.value.message

    pickled = tmp_path / "libero_object.pkl"
    pickled.write_bytes(pickle.dumps({"pick_up": [0.0]}))
    message = refusal(overrides(pickled))
    assert "reflexarc data embed-language --data" in message
    assert f"--output {tmp_path / 'libero_object'}" in message
    assert "does not exist" in refusal(overrides(tmp_path / "none"))
    assert f"lacks {VECTORS_FILE}" in refusal(overrides(tmp_path))

    table = tmp_path / "table"
    texts = ["pick up the red block", "pick up the blue block"]
    write_table(LanguageEmbeddings(texts, torch.randn(2, WIDTH), "mine"), table, overwrite=False)
    prepare(load_recipe("statevla_tiny", overrides(table)), torch.device("cpu"))
    message = refusal(overrides(table, width=384))
    assert "policy.language_dimension is 384" in message and f"have {WIDTH}" in message
    one = LanguageEmbeddings(texts[:1], torch.randn(1, WIDTH), "mine")
    write_table(one, table, overwrite=True)
    message = refusal(overrides(table))
    assert "lacks 1 of the data's 2 instructions: 'pick up the blue block'" in message
    assert "--encoder mine" in message
    (table / VECTORS_FILE).write_bytes(b"x" * 40)
    assert str(table) in refusal(overrides(table))


@pytest.mark.parametrize("language", ["{table: a, encoder: minilm}", "{encoder: table}"])
def test_a_table_and_an_encoder_are_not_given_together(language: str) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        load_recipe("statevla_tiny", [f"language={language}"])


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    write_table(LanguageEmbeddings(["one"], torch.ones(1, 4), "a"), tmp_path / "t", overwrite=False)
    index = json.loads((tmp_path / "t" / INDEX_FILE).read_text())
    for change in ({"dimension": 5}, {"sha256": 3}, {"instructions": ["one", "two"]}):
        (tmp_path / "t" / INDEX_FILE).write_text(json.dumps(index | change))
        with pytest.raises(CheckpointError, match="make it anew"):
            read_table(tmp_path / "t")

"""``reflexarc data embed-language``: instructions to vectors, once, by any text model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import data_app
from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from reflexarc.policy.language import LanguageEmbeddings, LanguageEncoder

MINILM = "minilm"
_SHOWN_INSTRUCTIONS = 12


@data_app.command("embed-language")
def embed_language(
    encoder: Annotated[
        str,
        typer.Option(
            help="A text model of transformers: the folder that save_pretrained wrote, or a hub "
            "id such as Qwen/Qwen2.5-7B-Instruct; or minilm, which needs no download."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the table; language.table in a recipe.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="HDF5 file or folder, or LeRobot folder; repeatable."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="The tasks of a LIBERO suite, which must be installed; repeatable."),
    ] = None,
    instructions: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text, one instruction a line; repeatable."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of a hub id: a branch, tag or commit.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the encoder's weights and arithmetic: fp32, bf16 or fp16.")
    ] = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, help="Instructions in one pass.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores by default.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the table that stands in --output.")
    ] = False,
) -> None:
    """Embed the instructions of demonstrations, a suite or a file: a table for recipes.

    Each instruction becomes one vector, the mean of the encoder's last hidden state over its
    tokens. The table is a folder of safetensors and JSON; it is written whole or not at all.
    """
    require("reflexarc data embed-language", "train", "torch", "safetensors", "transformers")
    from rich.console import Console

    from reflexarc.policy.language import LanguageEmbeddings
    from reflexarc.policy.language_table import check_writable, write_table
    from reflexarc.policy.threads import use_threads

    check_writable(output, overwrite=overwrite)
    texts = _gather(data or (), suite or (), instructions or ())
    use_threads(threads)
    embeddings = LanguageEmbeddings.from_instructions(
        texts, _encoder(encoder, device, dtype, revision, batch_size)
    )
    write_table(embeddings, output, overwrite=overwrite)
    Console(stderr=True).print(_summary(embeddings))
    identity = embeddings.identity
    typer.echo(
        json.dumps(
            {
                "path": str(output),
                "instructions": len(embeddings.instructions),
                "dimension": embeddings.dimension,
                "encoder": identity.name,
                "revision": identity.revision,
                "sha256": identity.sha256,
                "dtype": identity.dtype,
            }
        )
    )


def _gather(data: Iterable[Path], suites: Iterable[str], files: Iterable[Path]) -> list[str]:
    """The instructions of all sources. Raises ConfigError where none was named or one is empty."""
    found: list[str] = []
    for path in data:
        found += _of_data(path)
    for suite in suites:
        from reflexarc.eval.libero.suites import load_tasks

        found += [task.instruction for task in load_tasks(suite)]
    for file in files:
        found += _of_file(file)
    if not found:
        raise ConfigError("no instruction was named; give --data, --suite or --instructions")
    empty = sum(not text.strip() for text in found)
    if empty:
        raise ConfigError(
            f"{empty} of {len(found)} instructions are empty; an empty one has no meaning to embed",
            field="instruction",
        )
    return found


def _of_data(path: Path) -> list[str]:
    require("reading demonstrations", "train", "h5py", "pyarrow", "av")
    from reflexarc.data.lerobot.dataset import is_lerobot, read_listing
    from reflexarc.data.lerobot.info import read_info
    from reflexarc.data.libero_hdf5 import open_libero

    if is_lerobot(path):
        listing = read_listing(read_info(path))
        named = [task for record in listing.records for task in record.tasks]
        return list(dict.fromkeys([*listing.tasks.values(), *named]))
    # What an instruction says does not depend on whether observations stand before their action.
    dataset = open_libero([path], alignment="before_action")
    return list(dict.fromkeys(episode.instruction for episode in dataset.episodes))


def _of_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--instructions {path} cannot be read as text, one instruction a line: {error}",
            field="instructions",
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"--instructions {path} holds no instruction", field="instructions")
    return found


def _encoder(
    name: str, device: str, dtype: str, revision: str | None, batch_size: int
) -> LanguageEncoder:
    if name == MINILM:
        if revision is not None or dtype != "fp32":
            raise ConfigError("--revision and --dtype do not go with --encoder minilm")
        from reflexarc.policy.backbones.minilm import MiniLMEncoder

        return MiniLMEncoder()
    from reflexarc.policy.backbones.text_model import TransformersTextEncoder
    from reflexarc.policy.devices import resolve_device

    return TransformersTextEncoder(
        name,
        device=resolve_device(device),
        dtype=dtype,
        revision=revision,
        batch_size=batch_size,
    )


def _summary(embeddings: LanguageEmbeddings) -> Table:
    from rich.table import Table

    identity = embeddings.identity
    table = Table(
        title=f"{len(embeddings.instructions)} instructions by {identity.name} "
        f"{identity.revision}, {embeddings.dimension} wide".replace(" ,", ","),
        title_justify="left",
    )
    table.add_column("instruction", overflow="fold")
    table.add_column("length of its vector", justify="right")
    shown = embeddings.instructions[:_SHOWN_INSTRUCTIONS]
    for text, norm in zip(shown, embeddings.vectors.norm(dim=1).tolist(), strict=False):
        table.add_row(text, f"{norm:.3g}")
    if len(embeddings.instructions) > len(shown):
        table.add_row(f"and {len(embeddings.instructions) - len(shown)} more", "")
    return table

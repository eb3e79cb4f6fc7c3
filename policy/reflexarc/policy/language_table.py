"""A table of instructions' embeddings: a folder that ``reflexarc data embed-language`` writes.

Its two files are those that a checkpoint carries, safetensors and JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy.language import INDEX_FILE, VECTORS_FILE, LanguageEmbeddings
from reflexarc.policy.whole_folders import write_whole

MAKE_TABLE = "reflexarc data embed-language --data PATH --encoder MODEL --output DIR"
# What torch, numpy and Python's pickle write: reading it can run code.
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib")


def read_table(directory: Path, *, make: str = MAKE_TABLE) -> LanguageEmbeddings:
    """The table in a folder.

    Args:
        directory: as it was given to ``--output``; a checkpoint's folder is a table too.
        make: the command that makes one, for errors.

    Raises:
        ConfigError: nothing there, a pickle, or a folder without the two files.
        CheckpointError: files that do not read as they claim.
    """
    if directory.suffix.lower() in _PICKLES:
        raise ConfigError(
            f"{directory} is not read: a file of that kind can run code when it is opened, and "
            f"does not say what made its vectors. Make the table anew: {make}",
            field="language.table",
        )
    if not directory.is_dir():
        what = "is a file, a table is a folder" if directory.is_file() else "does not exist"
        raise ConfigError(
            f"the table of instructions' embeddings {directory} {what}; make it: {make}",
            field="language.table",
        )
    missing = [name for name in (VECTORS_FILE, INDEX_FILE) if not (directory / name).is_file()]
    if missing:
        raise ConfigError(
            f"{directory} is no table of instructions' embeddings: it lacks {missing[0]}; "
            f"make one: {make}",
            field="language.table",
        )
    try:
        return LanguageEmbeddings.load(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error.message}; make it anew: {make}") from error


def check_writable(directory: Path, *, overwrite: bool) -> None:
    """Raise ConfigError where a table must not be written: before anything is computed."""
    if directory.suffix.lower() in _PICKLES:
        raise ConfigError(
            f"--output {directory}: a table is a folder of safetensors and JSON, no pickle; "
            f"name it {directory.with_suffix('')}",
            field="output",
        )
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ConfigError(f"--output {directory} is not a folder; choose another name")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if {path.name for path in directory.iterdir()} - {VECTORS_FILE, INDEX_FILE}:
        raise ConfigError(
            f"--output {directory} holds other files than a table's; choose another name",
            field="output",
        )
    if not overwrite:
        raise ConfigError(
            f"--output {directory} holds a table already{_said(directory)}; name another folder, "
            "or replace it with --overwrite",
            field="output",
        )


def write_table(embeddings: LanguageEmbeddings, directory: Path, *, overwrite: bool) -> None:
    """Write both files, or neither. Raises ConfigError as ``check_writable``."""
    check_writable(directory, overwrite=overwrite)
    write_whole(directory, embeddings.to_files())


def _said(directory: Path) -> str:
    """What a table that stands there says of itself; nothing where it cannot be read."""
    try:
        index: Any = json.loads((directory / INDEX_FILE).read_bytes())
        return f" ({len(index['instructions'])} instructions by {index['encoder']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""

"""A checkpoint's folder on disk: its manifest, hashes, atomic writing, pointer files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import CheckpointError
from reflexarc.policy.whole_folders import write_whole

FORMAT_VERSION = 1
MANIFEST_FILE = "policy.json"
MODEL_FILE = "model.safetensors"
STATISTICS_FILE = "norm_stats.json"
POINTERS = ("best", "last")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Strict):
    sha256: str
    bytes: int


class BackboneEntry(_Strict):
    name: str
    sha256: str


class Manifest(_Strict):
    """``policy.json``. ``contract.checkpoint_fingerprint`` is empty in it: it is its own hash."""

    format_version: int
    family: str
    config: dict[str, Any]
    contract: PolicyContract
    provenance: dict[str, Any]
    frozen_backbones: dict[str, BackboneEntry]
    files: dict[str, FileEntry]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint's folder: ``path`` itself, or where its ``best`` or ``last`` points.

    Raises CheckpointError for anything that is not a checkpoint's folder, and for one that this
    user may not read.
    """
    try:
        return _resolved(path)
    except OSError as error:
        who = f"user {os.getuid()}" if hasattr(os, "getuid") else "this user"
        raise CheckpointError(
            f"{path} cannot be read by {who}: {error.strerror} ({error.filename}); give it to that "
            "user, or let everybody read it: chmod -R a+rX"
        ) from error


def _resolved(path: Path) -> Path:
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; a checkpoint is the folder that holds {MANIFEST_FILE}. "
            "Files such as .pt or .pth hold pickled objects and are not read"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"there is no checkpoint folder {path}; name the folder of a run or checkpoint that "
            "reflexarc train wrote, or checkpoints/demo in a clone"
        )
    if (path / MANIFEST_FILE).is_file():
        return path
    for pointer in POINTERS:
        if (path / pointer).is_file():
            return _follow(path, pointer)
    raise CheckpointError(
        f"{path} is not a checkpoint: it has neither {MANIFEST_FILE} nor a pointer file "
        f"({' or '.join(POINTERS)}); name the folder that training wrote"
    )


def _follow(run: Path, pointer: str) -> Path:
    name = (run / pointer).read_text(errors="replace").strip()
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts or "\n" in name:
        raise CheckpointError(
            f"the pointer file {run / pointer} must name a folder inside {run}, "
            f"it says {name[:200]!r}"
        )
    target = run / relative
    if not (target / MANIFEST_FILE).is_file():
        raise CheckpointError(
            f"the pointer file {run / pointer} names {name!r}, which is not a checkpoint there; "
            "give the checkpoint's folder itself"
        )
    return target


def write_pointer(run: Path, pointer: str, target: str) -> None:
    """Let ``best`` or ``last`` of a run name one of its checkpoints, atomically."""
    if pointer not in POINTERS:
        raise ValueError(f"a pointer is one of {POINTERS}, got {pointer!r}")
    temporary = run / f".{pointer}.{os.getpid()}.tmp"
    temporary.write_text(target + "\n")
    temporary.replace(run / pointer)


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """The manifest of a resolved folder and the checkpoint's fingerprint."""
    path = directory / MANIFEST_FILE
    try:
        content = path.read_bytes()
        fields = json.loads(content)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; let this user read it: chmod -R a+rX"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; copy the folder again") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this installation reads {FORMAT_VERSION}; "
            "install the reflexarc that wrote it, or train again",
            field="format_version",
        )
    try:
        return Manifest.model_validate(fields), sha256(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}", field=where) from error


def read_files(directory: Path, manifest: Manifest) -> dict[str, bytes]:
    """Every file that the manifest lists, after its sha256 was compared."""
    return {name: _read_file(directory, name, entry) for name, entry in manifest.files.items()}


def _read_file(directory: Path, name: str, entry: FileEntry) -> bytes:
    if not _is_plain_name(name):
        raise CheckpointError(f"{directory / MANIFEST_FILE} lists the file name {name!r}: refused")
    path = directory / name
    try:
        content = path.read_bytes()
    except OSError as error:
        if isinstance(error, PermissionError):
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror}; let this user read it: chmod -R a+rX"
            ) from error
        raise CheckpointError(
            f"the checkpoint lacks {name} ({error.strerror}): {path}; copy the whole folder again"
        ) from error
    if sha256(content) != entry.sha256:
        raise CheckpointError(
            f"{path} was altered: {len(content)} bytes with another sha256 than "
            f"{MANIFEST_FILE} states ({entry.bytes} bytes, {entry.sha256[:12]}…); "
            "copy the whole folder again"
        )
    return content


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name


def write_folder(
    directory: Path,
    files: Mapping[str, bytes],
    manifest: bytes,
    write_also: Callable[[Path], None] | None,
) -> None:
    """Write under a temporary name beside ``directory``, then rename; replaces a checkpoint.

    Raises CheckpointError rather than replace something that is no checkpoint.
    """
    _refuse_to_replace(directory)
    write_whole(directory, {**files, MANIFEST_FILE: manifest}, write_also)


def _refuse_to_replace(directory: Path) -> None:
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise CheckpointError(f"{directory} is not a folder; choose another name")
    if not directory.is_dir() or (directory / MANIFEST_FILE).is_file():
        return
    if any(directory.iterdir()):
        raise CheckpointError(
            f"{directory} holds files and is not a checkpoint; choose another name or empty it"
        )

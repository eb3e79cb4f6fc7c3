"""Where a pretrained model's files lie: a local folder, or what the hub's client keeps of an id."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflexarc.contract.errors import CheckpointError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class WantedModel:
    """What is looked for, so that an error can say it.

    Attributes:
        option: the recipe's key, or the command's option, that names the model.
        kind: such as ``a SigLIP model``.
        example: a hub id.
        files: patterns of the files that are needed, at the top of a repository.
    """

    option: str
    kind: str
    example: str
    files: tuple[str, ...]


def model_folder(path: str, wanted: WantedModel, revision: str | None = None) -> Path:
    """The folder itself, or where the hub's client keeps its copy; CheckpointError for neither."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise CheckpointError(
            f"{wanted.option}: there is no folder {path}; name the folder of {wanted.kind} that "
            f"save_pretrained wrote, or a hub id such as {wanted.example}"
        )
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            path, revision=revision, allow_patterns=list(wanted.files), ignore_patterns=["*/*"]
        )
    except Exception as error:  # the hub's client raises a dozen kinds: network, name, permission
        raise CheckpointError(
            f"{wanted.option}: {path!r} is no folder here and the hub does not give it "
            f"({type(error).__name__}: {str(error)[:200]}); download the model and name its folder"
        ) from error
    return Path(found)


def read_config(folder: Path, model_type: str, wanted: WantedModel) -> dict[str, Any]:
    """``config.json``. CheckpointError where it does not read, or is another model's."""
    path = folder / "config.json"
    try:
        fields = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; name the folder of {wanted.kind} that "
            "save_pretrained wrote"
        ) from error
    if fields.get("model_type") != model_type:
        raise CheckpointError(
            f"{folder} holds a model of the type {fields.get('model_type')!r}, not "
            f"{model_type!r}; name the folder of {wanted.kind}, such as {wanted.example}"
        )
    return fields


def revision_of(folder: Path) -> str:
    """The commit of a hub's snapshot; empty for a folder that came otherwise."""
    return folder.name if folder.parent.name == "snapshots" else ""


def weights_sha256(folder: Path) -> str:
    """Of ``model.safetensors``, or over the hashes of all ``*.safetensors`` in order of name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no *.safetensors; save the model with save_pretrained "
            "(files such as pytorch_model.bin hold pickled objects and are not read)"
        )
    digests = [_file_sha256(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()

"""The folder of one training run: recipe, metrics, checkpoints, and the pointers to them.

recipe.yaml            the whole resolved recipe
metrics.jsonl          one line a log interval and a validation
train.log              the same in plain text, and what else happened
tensorboard/           events
checkpoints/step_…/    checkpoints; only the newest holds ``training_state/``
checkpoints/ranking.json   metrics of the best of them
last, best             one line each: the path of a checkpoint, relative to the run's folder
summary.json           written when the run is complete
run.lock               held by the process that trains here
process.json           which process that is, or how the last one ended
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from reflexarc.contract.errors import ConfigError
from reflexarc.training.runs.process import LOCK_FILE, recorded_process

TRAINING_STATE = "training_state"
_POINTERS = ("last", "best")


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Within the block no other process trains in this folder, which is made when it is absent.

    ``process.json`` says which process does, and afterwards how it ended.

    Raises ConfigError when another one does. A killed process holds no lock.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK_FILE)
    try:
        # Not at once: whoever looks whether a process trains here holds the lock for a moment.
        held = lock.acquire(timeout=0.3, poll_interval=0.02)
    except Timeout as error:
        raise ConfigError(
            f"another 'reflexarc train' is writing to {output}; wait for it, stop it with "
            f"'reflexarc runs stop {output}', or name another --output",
            field="output",
        ) from error
    with held, recorded_process(output):
        yield


class RunFolder:
    """Paths and atomic writes inside one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.log = path / "train.log"
        self.tensorboard = path / "tensorboard"
        self.wandb_run_id = path / "wandb_run_id"
        self.checkpoints = path / "checkpoints"

    def has_run(self) -> bool:
        """Whether a training run has begun here."""
        return self.recipe.is_file() or (self.path / "last").is_file()

    def clear(self) -> None:
        """Remove what a training run wrote here, and nothing else."""
        for folder in (self.checkpoints, self.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)
        files = (self.recipe, self.metrics, self.summary, self.log, self.wandb_run_id)
        for path in (*files, *map(self._pointer, _POINTERS)):
            path.unlink(missing_ok=True)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def checkpoint_folders(self) -> dict[int, Path]:
        """Step to folder of every checkpoint that stands here, whole or not, in order."""
        found = {}
        for folder in self.checkpoints.glob("step_*"):
            digits = folder.name.removeprefix("step_")
            if folder.is_dir() and digits.isdecimal():
                found[int(digits)] = folder
        return dict(sorted(found.items()))

    def pointed(self, name: str) -> Path | None:
        """The checkpoint that ``last`` or ``best`` names; None before the first.

        Raises ConfigError when the pointer names a folder that is not there.
        """
        pointer = self._pointer(name)
        if not pointer.is_file():
            return None
        target = self.path / pointer.read_text(encoding="utf-8").strip()
        if not target.is_dir():
            raise ConfigError(
                f"{pointer} names the checkpoint {target.name}, which is not there; "
                "start again with --fresh"
            )
        return target

    def point(self, name: str, checkpoint: Path) -> None:
        """Let ``last`` or ``best`` name this checkpoint."""
        write_text(self._pointer(name), f"{checkpoint.relative_to(self.path).as_posix()}\n")

    def discard_old_checkpoints(self, kept: Collection[Path] = ()) -> None:
        """Keep what ``last`` and ``best`` name, and ``kept``; training state only in ``last``."""
        last, best = self.pointed("last"), self.pointed("best")
        for folder in self.checkpoints.iterdir():
            if not folder.is_dir():
                continue  # the ranking, and what is not ours: a file browser's, say
            if folder not in (last, best, *kept):
                shutil.rmtree(folder)
            elif folder != last:
                shutil.rmtree(folder / TRAINING_STATE, ignore_errors=True)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop lines beyond ``step``, which a killed run wrote after its last checkpoint."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line that a kill cut short
        write_text(self.metrics, "".join(kept))

    def _pointer(self, name: str) -> Path:
        return self.path / name


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

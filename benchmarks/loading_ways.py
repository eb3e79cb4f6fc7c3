"""The ways in which ``loading.py`` reads samples, each by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from common import ROOT

from reflexarc.data.frames import Place, read_frames
from reflexarc.data.generated import GeneratedSettings, write_generated
from reflexarc.data.lerobot import open_lerobot
from reflexarc.data.lerobot.encoding import Codec
from reflexarc.data.lerobot.to_lerobot import convert_to_lerobot
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.training.feature_store.dtypes import as_rows
from reflexarc.training.samples import BatchSource, SampleTable

LEROBOT = "lerobot==0.4.4"
ENVIRONMENT = Path(
    os.environ.get("REFLEXARC_LEROBOT_ENV", ROOT / ".conformance" / LEROBOT.replace("==", "-"))
)
CAMERAS = ("agentview", "eye_in_hand")
ONE_BY_ONE, DECODED = ", one by one", "decoded frames, mapped"
ROW_SHAPE = (2, 196, 112)  # EfficientNet-Lite0, two cameras, not pooled: 86 KiB in half precision
Seconds = Callable[[np.ndarray[Any, np.dtype[np.int64]]], float]
"""Reads the samples at some indices; returns the CPU seconds that it took."""


class Ways:
    """How a batch can be read, by name; each has its number of samples and its batch."""

    def __init__(self) -> None:
        self.read: dict[str, Seconds] = {}
        self.samples: dict[str, int] = {}
        self.batch: dict[str, int] = {}

    def add(self, name: str, samples: int, batch: int, read: Seconds) -> None:
        self.read[name], self.samples[name], self.batch[name] = read, samples, batch


def timed(read: Callable[[], object]) -> float:
    began = time.process_time()
    read()
    return time.process_time() - began


def add_features(ways: Ways, folder: Path, rows: int, batch: int) -> None:
    """A store of random features, mapped, and plain copies of as many bytes."""
    random = np.random.default_rng(0)
    array = np.lib.format.open_memmap(
        folder / "vision.npy", mode="w+", dtype=np.float16, shape=(rows, *ROW_SHAPE)
    )
    for row in range(rows):
        array[row] = random.standard_normal(ROW_SHAPE, dtype=np.float32)
    array.flush()
    mapped = as_rows(np.load(folder / "vision.npy", mmap_mode="r"))
    ones = torch.ones(rows, 10)
    table = SampleTable(
        state=torch.ones(rows, 1, 8),
        actions=torch.ones(rows, 10, 7),
        action_mask=ones.bool(),
        frame_row=torch.arange(rows)[:, None],
        valid=ones[:, :1].bool(),
        task_row=torch.zeros(rows, dtype=torch.int64),
    )
    source = BatchSource(table, {"vision": mapped}, {"language": torch.zeros(1, 384)})
    # As large as the store: what is copied is as cold as the rows that are gathered.
    plain = torch.from_numpy(np.array(array))
    half = torch.empty((batch, *ROW_SHAPE), dtype=torch.float16)
    starts = iter(lambda: int(random.integers(0, rows - batch)), None)

    def copy(indices: Any) -> float:
        start = next(starts)
        return timed(lambda: half.copy_(plain[start : start + batch]))

    words, single = plain.view(torch.float32), torch.empty((batch, *ROW_SHAPE))
    flat, out = words.flatten(), single.flatten()

    def copy_single(indices: Any) -> float:
        start = int(random.integers(0, len(flat) - len(out)))
        return timed(lambda: out.copy_(flat[start : start + len(out)]))

    def rows_of(indices: Any) -> float:
        wanted = torch.from_numpy(indices)
        return timed(lambda: mapped.index_select(0, wanted))

    def batch_of(indices: Any) -> float:
        wanted = torch.from_numpy(indices)
        return timed(lambda: source.batch(wanted))

    ways.add("memcpy", rows, batch, copy)
    ways.add("features, mapped", rows, batch, rows_of)
    ways.add("memcpy, float32", rows, batch, copy_single)
    ways.add("batch, mapped", rows, batch, batch_of)


def make_demonstrations(folder: Path) -> dict[str, Path]:
    """The same demonstrations as HDF5, h264 and AV1; over a texture that moves, so that a codec
    has something to do."""
    settings = GeneratedSettings(tasks=1, episodes=6, steps=80, render_every=1, image_size=256)
    [path] = write_generated(folder / "hdf5", settings)
    random = np.random.default_rng(0)
    coarse = random.uniform(-60, 60, (512, 32, 3)).repeat(8, 1)
    kernel = np.ones(9) / 9
    texture = np.apply_along_axis(np.convolve, 0, coarse, kernel, "same")
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            for camera in CAMERAS:
                images = demo[f"obs/{camera}_rgb"]
                for step in range(len(images)):
                    moved = images[step] + np.roll(texture, step, axis=0)[:256]
                    noise = random.normal(0, 2, moved.shape)
                    images[step] = (moved + noise).clip(0, 255).astype(np.uint8)
    for codec in ("h264", "av1"):
        convert_to_lerobot([path], folder / codec, codec=Codec(codec))
    return {"HDF5": path, "h264": folder / "h264", "AV1": folder / "av1"}


def add_readers(ways: Ways, data: dict[str, Path], batch: int) -> None:
    for name, path in data.items():
        dataset = open_libero([path]) if name == "HDF5" else open_lerobot(path)
        places = [(e, frame) for e in dataset.episodes for frame in range(len(e.image_steps))]
        ways.add(name, len(places), batch, partial(read_batch, places))
        ways.add(f"{name}{ONE_BY_ONE}", len(places), batch, partial(read_one_by_one, places))


def read_batch(places: list[Place], indices: Any) -> float:
    wanted = [places[i] for i in indices]
    return timed(lambda: [read_frames(wanted, camera) for camera in CAMERAS])


def read_one_by_one(places: list[Place], indices: Any) -> float:
    wanted = [places[i] for i in indices]
    return timed(lambda: [e.images(camera, [f]) for e, f in wanted for camera in CAMERAS])


def add_decoded(ways: Ways, data: dict[str, Path], batch: int, folder: Path) -> None:
    """Frames that were decoded once into memory-mapped pixels, as the feature store keeps them
    for policies that train on pixels. No decoding is measured here."""
    episodes = open_lerobot(data["h264"]).episodes
    places = [(e, frame) for e in episodes for frame in range(len(e.image_steps))]
    frames = np.stack([read_frames(places, camera) for camera in CAMERAS], axis=1)
    np.save(folder / "frames.npy", frames)
    mapped = as_rows(np.load(folder / "frames.npy", mmap_mode="r"))
    ways.add(
        DECODED, len(places), batch,
        lambda indices: timed(lambda: mapped.index_select(0, torch.from_numpy(indices))),
    )  # fmt: skip


def lerobot_python() -> str:
    """The interpreter of an environment with lerobot, made once (several GB)."""
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", LEROBOT], check=True)
        done.touch()
    return str(python)


class LeRobotProcess:
    """lerobot's dataset class, in a process of its own."""

    def __init__(self, log: Path) -> None:
        self.process = subprocess.Popen(
            [lerobot_python(), str(Path(__file__).with_name("lerobot_load.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
        )  # fmt: skip

    def ask(self, root: Path, indices: list[int], backend: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(
            json.dumps({"root": str(root), "indices": indices, "backend": backend}) + "\n"
        )
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        return answer


def add_lerobot(ways: Ways, data: dict[str, Path], batch: int, folder: Path) -> list[str]:
    """Returns why a way was skipped."""
    try:
        other = LeRobotProcess(folder / "lerobot.log")
    except (OSError, subprocess.CalledProcessError) as error:
        return [f"lerobot's dataset class: {LEROBOT} cannot be installed here ({error})"]
    skipped = []
    for name in ("h264", "AV1"):
        for backend in ("torchcodec", "pyav"):  # its default, and what needs no FFmpeg beside it
            first = other.ask(data[name], [0, 1], backend)
            if "error" not in first:

                def read(indices: Any, root: Path = data[name], backend: str = backend) -> float:
                    answer = other.ask(root, [int(i) for i in indices], backend)
                    return float(answer["seconds"])

                ways.add(f"lerobot {name} ({backend})", ways.samples[name], batch, read)
            else:
                skipped.append(f"lerobot {name} by {backend}: {first['error']}")
    return skipped

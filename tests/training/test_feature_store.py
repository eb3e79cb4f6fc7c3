"""The feature store: keys, refusals, dtypes, damage, and work that processes share."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.training.feature_store import building
from reflexarc.training.feature_store.dtypes import as_rows, to_stored
from reflexarc.training.feature_store.gather import gather_rows
from reflexarc.training.feature_store.keys import FeatureKey
from reflexarc.training.feature_store.shards import Shards
from reflexarc.training.feature_store.store import find_features, frame_features
from reflexarc.training.preparation import Preparation, prepare
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan

CPU = torch.device("cpu")
FRAMES = 8 * 6  # two tasks of four demonstrations of six frames


def prepared(data: Path, *overrides: str) -> Preparation:
    return prepare(load_recipe("statevla_tiny", [f"data.paths=['{data}']", *overrides]), CPU)


@pytest.fixture
def preparation(demonstrations: Path) -> Preparation:
    return prepared(demonstrations)


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_another_split_and_fewer_episodes_find_what_is_there(
    demonstrations: Path, tmp_path: Path
) -> None:
    whole = prepared(demonstrations)
    first = whole.features(tmp_path, progress=False)
    assert (first.found, first.needed, first.hit) == (0, FRAMES, False)
    for overrides in (["data.split_seed=5"], ["data.episodes_per_task=2"]):
        other = prepared(demonstrations, *overrides)
        assert [e.demo for e in other.episodes] != [e.demo for e in whole.episodes]
        features = other.features(tmp_path, progress=False)
        assert features.hit and features.path == first.path
        # The rows are those of the episode that they are said to be of.
        fresh = other.features(tmp_path / "apart", progress=False)
        for episode, one, two in zip(
            other.episodes, features.first_rows, fresh.first_rows, strict=True
        ):
            count = len(episode.image_steps)
            np.testing.assert_array_equal(
                features.arrays["vision"][one : one + count],
                fresh.arrays["vision"][two : two + count],
            )


@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"),
    [("fp32", np.float32, 0.0), ("fp16", np.float16, 5e-4), ("bf16", np.uint16, 4e-3)],
)
def test_a_dtype_keeps_features_as_near_as_it_can(
    demonstrations: Path, tmp_path: Path, dtype: str, stored: type, tolerance: float
) -> None:
    exact = prepared(demonstrations, "data.feature_dtype=fp32")
    other = prepared(demonstrations, f"data.feature_dtype={dtype}")
    one = exact.features(tmp_path / "a", progress=False)
    two = other.features(tmp_path / "b", progress=False)
    assert two.arrays["vision"].dtype == stored
    batches = [p.sources(f.arrays, f.first_rows)[0].batch(torch.arange(9))
               for p, f in ((exact, one), (other, two))]  # fmt: skip
    seen = [batch.window["vision"] for batch in batches]
    assert seen[1].dtype == torch.float32
    torch.testing.assert_close(seen[1], seen[0], rtol=tolerance, atol=tolerance)
    assert dtype == "fp32" or not torch.equal(seen[0], seen[1])


def test_values_that_a_dtype_cannot_hold_are_refused() -> None:
    large = torch.tensor([[1.0, 7e4]])
    with pytest.raises(ConfigError, match=r"vision reach 7e\+04.*range of fp16.*bf16"):
        to_stored(large, "fp16", "vision")
    assert as_rows(to_stored(large, "bf16")).float().tolist() == [[1.0, 70144.0]]
    with pytest.raises(ConfigError, match="vision that are not finite"):
        to_stored(torch.tensor([float("nan")]), "fp16", "vision")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(3,), (2, 196, 112), (1000, 1000)])
def test_gathered_rows_are_the_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = (torch.arange(7.0)[:, None] * torch.linspace(0, 5, 6)).to(dtype)
    wide = rows.repeat_interleave(-(-shape[0] // 6), 1)[:, : shape[0]]
    full = wide.reshape(7, -1, *[1] * (len(shape) - 1)).expand(7, *shape).contiguous()
    for wanted in ([6, 0, 0, 3, 5], [], [2] * 40 if shape != (1000, 1000) else [2]):
        found = gather_rows(full, torch.tensor(wanted, dtype=torch.int64))
        assert found.dtype == (torch.uint8 if dtype == torch.uint8 else torch.float32)
        assert torch.equal(found, full[wanted].to(found.dtype))


def test_a_store_that_was_named_and_is_another_is_refused_field_by_field(
    demonstrations: Path, tmp_path: Path, task_file: Callable[..., Path]
) -> None:
    preparation = prepared(demonstrations)
    named = preparation.features(tmp_path, progress=False).path
    assert preparation.features(named, progress=False).hit
    with pytest.raises(ConfigError, match=r"dtype: fp16 in the store, bf16 wanted"):
        prepared(demonstrations, "data.feature_dtype=bf16").features(named)
    with pytest.raises(ConfigError, match=r"preprocessing\.agentview: 32x32 .*resize.*48x48"):
        prepared(demonstrations, "contract.image_size=48").features(named)
    pooled = "policy.vision={name: tiny_random, pool: 2}"
    with pytest.raises(ConfigError, match=r"arrays\.vision\.row_shape: \[2, 4, 8\] in the store"):
        prepared(demonstrations, pooled).features(named)
    task_file(tmp_path / "other_demo.hdf5", seed=7)
    with pytest.raises(ConfigError, match=r"dataset: \w{64} in the store, \w{64} wanted"):
        prepared(tmp_path / "other_demo.hdf5").features(named)
    index = json.loads((named / "index.json").read_text())
    index["key"]["encoders"]["vision"]["revision"] = "v2"
    (named / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"encoders\.vision\.revision: v2 in the store"):
        preparation.features(named)
    index["key"]["format"] = 3
    (named / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="format 3, this version reads format 2"):
        preparation.features(named)


def test_a_store_of_the_old_format_is_neither_read_nor_overwritten(
    preparation: Preparation, tmp_path: Path
) -> None:
    old = tmp_path / "0123456789abcdef"
    old.mkdir()
    (old / "manifest.json").write_text(json.dumps({"format": 1, "names": ["vision"], "rows": 48}))
    with pytest.raises(ConfigError, match="format 1, this version reads format 2"):
        preparation.features(old)
    before = file_bytes(old)
    assert not preparation.features(tmp_path, progress=False).hit
    assert file_bytes(old) == before


def test_the_store_that_comes_nearest_is_named(demonstrations: Path, tmp_path: Path) -> None:
    prepared(demonstrations).features(tmp_path, progress=False)
    other = prepared(demonstrations, "data.feature_dtype=bf16").features(tmp_path, progress=False)
    assert not other.hit
    assert "dtype: fp16 in the store, bf16 wanted" in other.remark


@pytest.mark.parametrize("damage", ["cut", "absent", "shape", "index"])
def test_a_damaged_store_is_named(preparation: Preparation, tmp_path: Path, damage: str) -> None:
    folder = preparation.features(tmp_path, progress=False).path
    path = folder / "vision.npy"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "absent":
        path.unlink()
    elif damage == "shape":
        np.save(path, np.zeros((FRAMES, 2, 4, 9), np.float16))
    else:
        path = folder / "index.json"
        path.write_text(path.read_text()[:100])
    named = path if damage != "index" else folder
    with pytest.raises((DatasetError, ConfigError), match=f"{named}.*remove"):
        preparation.features(tmp_path, progress=False)


def test_a_disk_without_room_is_named_before_anything_is_written(
    preparation: Preparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "free_disk", lambda path: 5000)
    with pytest.raises(ConfigError, match=r"need 0\.\d MiB.*--feature-cache"):
        preparation.features(tmp_path, progress=False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_the_size_of_shards_changes_no_value(preparation: Preparation, tmp_path: Path) -> None:
    key: FeatureKey = preparation.feature_key
    for rows in (5, 1000):
        frame_features(preparation.policy, preparation.episodes, key, tmp_path / str(rows),
                       shard_rows=rows, progress=False)  # fmt: skip
    folders = [find_features(tmp_path / str(rows), key) for rows in (5, 1000)]
    assert folders[0] and folders[1]
    one, two = (torch.from_numpy(np.load(f / "vision.npy")).float() for f in folders)
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)  # batches of other sizes


def test_training_says_how_many_rows_it_found(demonstrations: Path, tmp_path: Path) -> None:
    overrides = [f"data.paths=['{demonstrations}']", "training.epochs=null", "training.steps=1"]
    recipe = load_recipe("statevla_tiny", overrides)
    said: list[str] = []
    for name in ("first", "second"):
        output = tmp_path / name
        planned = plan(recipe, output, device=CPU, feature_cache=tmp_path / "cache")
        run = open_run_folder(recipe, output, resume=False, fresh=False)
        execute(planned, run, progress_bar=False, log=said.append)
    found = [line for line in said if line.startswith("frame features")]
    assert [line.split(" rows found")[0] for line in found] == [
        "frame features: 0 of 48",
        "frame features: 48 of 48",
    ]


CLAIM = """
import sys, time
from pathlib import Path
from reflexarc.training.feature_store.shards import Shards
folder = Path(sys.argv[1])
for shard in Shards(folder / "map", folder / "locks").claim():
    print(shard, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def claimer(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLAIM, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_share_shards_and_take_over_what_a_killed_one_held(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "map", tmp_path / "locks")
    shards.create(12)
    killed = claimer(tmp_path, 1000)
    assert killed.stdout is not None
    held = int(killed.stdout.readline())
    others = [claimer(tmp_path, 0.02) for _ in range(2)]
    deadline = time.monotonic() + 60
    while shards.left() != [held] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert shards.left() == [held] and all(process.poll() is None for process in others)
    killed.send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=60)[0] for process in others]
    killed.wait()
    done = [int(line) for output in outputs for line in output.split()]
    assert sorted(done) == list(range(12))
    assert shards.left() == []


def precompute(data: Path, cache: Path, *options: str) -> subprocess.Popen[str]:
    command = ["from reflexarc.cli.main import main; main()", "data", "precompute",
               "statevla_tiny", "--data", str(data), "--feature-cache", str(cache),
               "--device", "cpu", "--threads", "1", *options]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def summary_of(process: subprocess.Popen[str]) -> dict[str, object]:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    summary: dict[str, object] = json.loads(output)
    return summary


def test_precompute_is_killed_and_goes_on_to_the_same_bytes(
    tmp_path: Path, task_file: Callable[..., Path]
) -> None:
    data = task_file(tmp_path / "long_demo.hdf5", demos=6, steps=200, stride=1, image_size=96)
    dry = summary_of(precompute(data, tmp_path / "dry", "--dry-run"))
    assert (dry["rows"], dry["rows_found"], dry["fits"]) == (1200, 0, True)
    assert not (tmp_path / "dry").exists()

    whole = summary_of(precompute(data, tmp_path / "whole"))
    assert (whole["rows_found"], whole["rows_computed"]) == (0, 1200)
    assert whole["bytes"] == dry["bytes"]

    killed = precompute(data, tmp_path / "broken")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and killed.poll() is None:
        maps = list((tmp_path / "broken").glob("*.partial/shards"))
        if maps and sum(maps[0].read_bytes()) >= 2:
            break
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    [partial] = (tmp_path / "broken").glob("*.partial")
    preparation = prepared(data)
    assert find_features(tmp_path / "broken", preparation.feature_key) is None

    resumed = summary_of(precompute(data, tmp_path / "broken"))
    found = int(str(resumed["rows_found"]))
    assert 256 <= found < 1200
    assert found + int(str(resumed["rows_computed"])) == 1200
    assert not partial.exists()
    assert file_bytes(Path(str(whole["path"]))) == file_bytes(Path(str(resumed["path"])))
    assert preparation.features(tmp_path / "broken", progress=False).hit


@pytest.mark.slow
def test_several_processes_make_the_same_store(
    tmp_path: Path, task_file: Callable[..., Path]
) -> None:
    data = task_file(tmp_path / "long_demo.hdf5", demos=4, steps=150, stride=1, image_size=32)
    preparation = prepared(data)
    alone = preparation.features(tmp_path / "alone", progress=False)
    shared = summary_of(precompute(data, tmp_path / "shared", "--workers", "2"))
    assert shared["rows_computed"] == 600
    assert file_bytes(alone.path) == file_bytes(Path(str(shared["path"])))
    assert not list((tmp_path / "shared").glob("*.locks"))


BOUNDED = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from reflexarc.training.feature_store import holding
from reflexarc.training.feature_store.holding import hold_features
from reflexarc.training.samples import BatchSource, SampleTable

def mib(field):
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(field) + 1]) / 1024

folder = Path(sys.argv[1])
array = np.load(folder / "vision.npy", mmap_mode="r")
rows = len(array)
ones = torch.ones(rows, 1)
samples = SampleTable(ones[:, None], ones[:, None], ones.bool(), torch.arange(rows)[:, None],
                      ones.bool(), torch.zeros(rows, dtype=torch.int64))
began = mib("RssAnon:")
limit = int((mib("VmData:") + 64) * 2**20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.array(array)
    raise SystemExit("the limit is none: the whole store fits into memory")
except MemoryError:
    pass
holding.free_memory = lambda: 4 * array.nbytes
held = hold_features({"vision": array}, torch.device("cpu"))
assert held.place == "on disk, memory-mapped", held.place
source = BatchSource(samples, held.rows, {"language": torch.zeros(1, 4)})
largest, total = 0.0, 0.0
for order in (torch.arange(rows), torch.randperm(rows)):
    for indices in order.split(32):
        total += float(source.batch(indices).window["vision"].sum())
        largest = max(largest, mib("RssAnon:") - began)
print(largest, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_store_above_the_memory_limit_is_read_from_its_map(tmp_path: Path) -> None:
    rows, width = 1024, 65536  # 128 MiB, of which almost nothing lies on the disk
    array = np.lib.format.open_memmap(
        tmp_path / "vision.npy", mode="w+", dtype=np.float16, shape=(rows, width)
    )
    array[:, 0] = 1
    array.flush()
    del array
    command = [sys.executable, "-c", BOUNDED, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    largest, total = map(float, output.split())
    assert total == 2 * rows  # in order, and shuffled
    assert largest < 64  # MiB; a batch of 32 float32 rows takes 8

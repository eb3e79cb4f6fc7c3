"""LIBERO HDF5 -> LeRobot v3.0 -> LIBERO HDF5: every array comes back, images within the error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATES
from reflexarc.data import compute_statistics, open_libero
from reflexarc.data.lerobot import open_lerobot
from reflexarc.data.lerobot.encoding import Codec
from reflexarc.data.lerobot.to_lerobot import convert_to_lerobot
from reflexarc.data.lerobot.to_libero import convert_to_libero

IMAGES = ("obs/agentview_rgb", "obs/eye_in_hand_rgb")
WriteFile = Callable[..., Path]


@pytest.fixture
def collected(tmp_path: Path, write_file: WriteFile) -> Path:
    """Two task files of own layout with images that a codec can hold, objects and labels."""
    for name, samples in (("pick_up_the_soup", 9), ("pick_up_the_milk", 13)):
        path = write_file("own", name=name, demos=2, samples=samples, size=32)
        random = np.random.default_rng(samples)
        with h5py.File(path, "r+") as file:
            file.attrs["written_by"] = "a test"
            file["data"].attrs["total"] = np.int64(2 * samples)
            for demo in file["data"].values():
                demo["states"] = random.normal(size=(samples, 10 + samples))
                demo["expert_actions"] = random.normal(size=(samples, 7))
                demo["object_positions"] = random.normal(size=(samples, 3, 3))
                demo["dones"] = np.zeros(samples, np.uint8)
                demo["mass"] = np.float32(0.25)
                demo.attrs["object_names"] = json.dumps(["a", "b", "c"])
                demo.attrs["init_state"] = random.normal(size=10)
                for key in IMAGES:
                    shape = demo[key].shape
                    ramp = np.linspace(0, 200, shape[1] * shape[2]).reshape(shape[1:3])
                    pixels = ramp[None, ..., None] + np.arange(shape[0])[:, None, None, None] * 12
                    del demo[key]
                    demo[key] = np.repeat(pixels, 3, axis=-1).astype(np.uint8)
    return tmp_path


def arrays(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda key, item: found.update({key: item[()]}) if hasattr(item, "dtype") else None
        )
    return found


def attributes(path: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    with h5py.File(path) as file:
        items = [("", file)]
        file.visititems(lambda key, item: items.append((key, item)))
        for key, item in items:
            found.update({f"{key}@{name}": value for name, value in item.attrs.items()})
    return found


@pytest.mark.parametrize(("codec", "at_most"), [("h264", 2.0), ("av1", 3.0), ("lossless", 0.0)])
def test_every_array_and_attribute_comes_back(
    collected: Path, tmp_path: Path, codec: str, at_most: float
) -> None:
    seen: list[str] = []
    folder = tmp_path / "out" / "lerobot"
    folder.parent.mkdir()
    error = convert_to_lerobot([collected], folder, codec=Codec(codec), on_demo=seen.append)  # type: ignore[arg-type]
    assert len(seen) == 4 and error.images == 2 * 2 * (3 + 4)
    assert error.mean <= at_most
    stated = json.loads((folder / "meta/libero.json").read_text())["images"]["error"]
    assert stated == error.to_json()
    back = convert_to_libero(folder, tmp_path / "back")
    assert not list(tmp_path.glob("**/*.partial"))
    for path in back:
        original = next(p for p in collected.glob("*.hdf5") if p.name == path.name)
        first, second = arrays(original), arrays(path)
        assert first.keys() == second.keys()
        for key, values in first.items():
            if key.split("/", 2)[-1] in IMAGES:
                difference = np.abs(values.astype(int) - second[key])
                assert difference.max() <= stated["largest"]
                assert difference.mean() <= stated["largest_mean"]
            else:
                assert values.dtype == second[key].dtype
                np.testing.assert_array_equal(values, second[key], err_msg=key)
        one, two = attributes(original), attributes(path)
        assert one.keys() == two.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, two[name], err_msg=name)
            assert type(value) is type(two[name]), name
    assert (
        open_libero(back).fingerprint()
        == open_libero(sorted(collected.glob("*.hdf5"))).fingerprint()
    )


def test_a_converted_dataset_is_what_the_files_were(collected: Path, tmp_path: Path) -> None:
    """Contract, statistics, labels, steps and orientation: a recipe need not know."""
    convert_to_lerobot([collected], tmp_path / "lerobot", codec=Codec("lossless"))
    files, folder = open_libero([collected]), open_lerobot(tmp_path / "lerobot")
    assert folder.orientations == files.orientations and set(folder.cameras) == set(files.cameras)
    assert folder.action_spec(5) == files.action_spec(5)
    for layout in LIBERO_STATES:
        one, two = (compute_statistics(d, layout, labels="expert") for d in (files, folder))
        assert (one.state, one.action) == (two.state, two.action)
    for one, two in zip(files.episodes, folder.episodes, strict=True):
        assert (one.task_name, one.instruction) == (two.task_name, two.instruction)
        assert one.render_stride == two.render_stride
        np.testing.assert_array_equal(one.image_steps, two.image_steps)
        np.testing.assert_array_equal(one.images("agentview", [1]), two.images("agentview", [1]))


def test_files_whose_observations_follow_their_action_lose_one_step(
    tmp_path: Path, write_file: WriteFile
) -> None:
    path = write_file("official", demos=1, samples=9, size=16)
    convert_to_lerobot([path], tmp_path / "lerobot", codec=Codec("lossless"))
    (back,) = convert_to_libero(tmp_path / "lerobot", tmp_path / "back")
    (one,), (two,) = open_libero([path]).episodes, open_libero([back]).episodes
    assert one.length == two.length == 8 and two.alignment == "before_action"
    np.testing.assert_array_equal(one.actions(), two.actions())
    np.testing.assert_array_equal(one.states("joint7+fingers2"), two.states("joint7+fingers2"))
    np.testing.assert_array_equal(one.images("agentview", [7]), two.images("agentview", [7]))


def test_an_interrupted_conversion_continues_and_another_is_refused(
    collected: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lerobot"

    def stop_in_the_second_file(name: str) -> None:
        if name.startswith("pick_up_the_soup"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_lerobot([collected], folder, on_demo=stop_in_the_second_file)
    first = next((tmp_path / "lerobot.partial").rglob("file-000.mp4"))
    written = first.stat().st_mtime_ns
    with pytest.raises(DatasetError, match="unfinished conversion of other data"):
        convert_to_lerobot([collected], folder, codec=Codec("av1"))
    convert_to_lerobot([collected], folder)
    assert (folder / first.relative_to(tmp_path / "lerobot.partial")).stat().st_mtime_ns == written
    assert len(open_lerobot(folder).episodes) == 4
    with pytest.raises(DatasetError, match="exists; remove it"):
        convert_to_lerobot([collected], folder)
    whole = tmp_path / "whole"
    convert_to_lerobot([collected], whole)
    for path in whole.rglob("data/*/*.parquet"):
        assert pq.read_table(path) == pq.read_table(folder / path.relative_to(whole))


def test_what_cannot_be_converted_is_named(
    collected: Path, tmp_path: Path, write_file: WriteFile
) -> None:
    with pytest.raises(ConfigError, match=r"quality of h264 must lie in 0\.\.51, got 80"):
        convert_to_lerobot([collected], tmp_path / "out", codec=Codec("h264", 80))
    write_file("own", name="another", size=16)
    with pytest.raises(DatasetError, match="holds images of"):
        convert_to_lerobot([collected], tmp_path / "out")


def test_real_demonstrations_come_back(tmp_path: Path) -> None:
    recordings = Path(__file__).parents[2] / "recordings"
    error = convert_to_lerobot([recordings], tmp_path / "lerobot")
    assert 0 < error.mean < 3
    back = convert_to_libero(tmp_path / "lerobot", tmp_path / "back")
    originals = open_libero([recordings])
    assert open_libero(back).fingerprint() == originals.fingerprint()
    for path in back:
        first, second = arrays(recordings / path.name), arrays(path)
        assert first.keys() == second.keys()
        for key in first.keys() - {k for k in first if k.split("/", 2)[-1] in IMAGES}:
            assert first[key].dtype == second[key].dtype
            np.testing.assert_array_equal(first[key], second[key], err_msg=key)
        for key in (k for k in first if k.split("/", 2)[-1] in IMAGES):
            assert np.abs(first[key].astype(int) - second[key]).max() <= error.largest

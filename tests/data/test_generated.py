"""``reflexarc data generate``: demonstrations that read as ours do and hold what they claim."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from reflexarc.cli.data_generate import generate
from reflexarc.contract.errors import ConfigError
from reflexarc.data.generated import GeneratedSettings, write_generated
from reflexarc.data.inspection import inspect_libero
from reflexarc.data.libero_hdf5 import open_libero

SMALL = GeneratedSettings(tasks=2, episodes=3, image_size=32)


def test_they_read_as_collected_ones_do(tmp_path: Path) -> None:
    write_generated(tmp_path, SMALL)
    dataset = open_libero([tmp_path])
    assert len(dataset.episodes) == 6
    assert {e.instruction for e in dataset.episodes} == {
        "pick up the red block", "pick up the blue block"
    }  # fmt: skip
    inspection = inspect_libero([tmp_path])
    assert not inspection.problems
    for episode in dataset.episodes:
        actions, (positions, names) = episode.actions(), episode.object_positions()
        assert actions.shape == (24, 7) and np.abs(actions).max() <= 1
        assert np.abs(actions - episode.expert_actions())[:, :3].max() <= SMALL.noise + 1e-12
        assert names == ("block",)
        assert positions[-1, 0, 2] > 0.09  # every episode ends with the block lifted
        assert set(np.unique(actions[:, 6])) == {-1.0, 1.0}


def test_the_images_show_where_the_block_is(tmp_path: Path) -> None:
    write_generated(tmp_path, GeneratedSettings(tasks=1, episodes=4, noise=0.0))
    for episode in open_libero([tmp_path]).episodes:
        image = episode.images("agentview", [0])[0].astype(int)
        red = (image[..., 0] - image[..., 2]) > 100
        row, column = (float(np.mean(where)) / 32 - 1 for where in np.nonzero(red))
        block = episode.object_positions()[0][0, 0] / 0.25
        assert abs(column - block[0]) < 0.15 and abs(row - block[1]) < 0.15


def test_the_same_seed_gives_the_same_and_nothing_is_overwritten(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write_generated(tmp_path / name, GeneratedSettings(episodes=2, image_size=16, seed=seed))
    one, two, three = (
        open_libero([tmp_path / name]).fingerprint() for name in ("one", "two", "three")
    )
    assert one == two != three
    app = typer.Typer()
    app.command()(generate)
    result = CliRunner().invoke(app, ["--output", str(tmp_path / "one")])
    assert isinstance(result.exception, ConfigError) and "exists" in str(result.exception)
    with pytest.raises(ConfigError, match="tasks 9 must be 1 to 4"):
        GeneratedSettings(tasks=9)

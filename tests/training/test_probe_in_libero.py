"""The demo checkpoint, probed on demonstrations that are collected for the purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from reflexarc.eval.libero.collect import CollectionSettings, collect
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.training.probe.run import ProbeOptions, probe

pytestmark = [pytest.mark.simulator, pytest.mark.slow]

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "demo"


def test_the_demo_checkpoint_knows_where_its_hand_is(tmp_path: Path) -> None:
    collect(CollectionSettings(suite="libero_object"), tmp_path, demos=5, tasks=[0], progress=False)
    found = probe(load_checkpoint(CHECKPOINT), ProbeOptions(data=(tmp_path,)), progress=False)
    readings = {(r.target, r.phase): r for r in found.readings}
    hand = readings["end-effector", "all"]
    assert hand.scores["state"].rmse_mm < 1  # it is a part of the state
    r2 = hand.scores["z"].r2
    assert r2 is not None
    assert r2 > 0.8
    (target,) = found.frames.target_names.values()
    assert target is not None
    assert "alphabet_soup" in target
    assert readings["target object", "before touch"].std_mm < 1  # it starts at the same place
    assert readings["target object", "after grasp"].std_mm > 50
    assert found.collapse["z"].effective_rank > 3

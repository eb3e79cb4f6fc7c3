"""openpi's unmodified client drives a real LIBERO episode as openpi's own LIBERO example does.

The simulator runs in this process and the client in its own environment; images are turned here
and resized there by openpi's image_tools. With ``checkpoints/demo`` the whole episode is played,
otherwise five chunks of a tiny random policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflexarc.server import BackgroundServer
from reflexarc.server.loading import CheckpointPolicy

REPLAN_STEPS = 5
DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"

pytestmark = pytest.mark.simulator


@pytest.fixture
def simulator() -> Iterator[Any]:
    from reflexarc.eval.libero.simulator import LiberoSimulator
    from reflexarc.eval.libero.suites import load_init_states, load_tasks

    task = load_tasks("libero_object")[0]
    with LiberoSimulator(task, image_size=256) as simulator:
        simulator.reset_to_state(load_init_states(task)[45])
        yield simulator


def test_drives_an_episode(openpi: Any, simulator: Any, tiny_checkpoint: Path) -> None:
    from reflexarc.eval.libero.suites import MAX_STEPS

    whole = DEMO.is_dir()
    steps = MAX_STEPS["libero_object"] if whole else 5 * REPLAN_STEPS
    checkpoint = DEMO if whole else tiny_checkpoint
    before, executed, success = simulator.state(), 0, False
    with BackgroundServer(lambda: CheckpointPolicy.load(checkpoint, "cpu")) as server:
        openpi.call("connect", url=server.url, broker_horizon=REPLAN_STEPS)
        request: dict[str, Any] = {}
        while executed < steps and not success:
            if executed % REPLAN_STEPS == 0:  # the broker looks at no other request
                request = observe(openpi, simulator)
            action = openpi.call("infer", observation=request)["actions"]
            assert action.shape == (7,) and np.isfinite(action).all()
            success = simulator.step(action)
            executed += 1
    print(f"{checkpoint.name}: {executed} steps, success {success}")
    assert success or executed == steps
    assert not np.array_equal(before, simulator.state())


def observe(openpi: Any, simulator: Any) -> dict[str, Any]:
    raw = simulator.observe()
    images = {
        key: openpi.call("resize", images=np.ascontiguousarray(image[::-1, ::-1]), size=224)
        for key, image in (
            ("observation/image", raw.images["agentview"]),
            ("observation/wrist_image", raw.images["eye_in_hand"]),
        )
    }
    state = raw.state
    return {
        **images,
        "observation/state": np.concatenate(
            (state.eef_position, state.eef_axis_angle, state.finger_positions)
        ),
        "prompt": simulator.task.instruction,
    }

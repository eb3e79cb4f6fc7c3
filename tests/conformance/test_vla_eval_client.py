"""vla-eval 0.8 from the registry, its whole orchestrator, against our live server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.images import resize_bilinear
from reflexarc.contract.policy_contract import LIBERO_STATE_JOINT, Gripper, History
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract
from reflexarc.server.episodes import decision_seed

INSTRUCTION = "pick up the alphabet soup and place it in the basket"
STEPS, HORIZON, SEED = 13, 10, 5


class Seeing(NullPolicy):
    """The null policy, which keeps what it saw."""

    def __init__(self, contract: PolicyContract | None = None) -> None:
        super().__init__(contract)
        self.seen: list[Observation] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.seen.extend(observations)
        return super().infer(observations)


@dataclass
class Run:
    """What the harness reported, and its log."""

    report: dict[str, Any]
    log: str

    @property
    def episodes(self) -> list[dict[str, Any]]:
        episodes: list[dict[str, Any]] = self.report["results"][0]["tasks"][0]["episodes"]
        return episodes

    @property
    def actions(self) -> list[npt.NDArray[np.float32]]:
        return [np.array(episode, np.float32) for episode in self.report["actions"]]


@pytest.fixture
def script(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, STEPS, 256, 256, 3), dtype=np.uint8)
    return {"agentview": images[0], "wrist": images[1], "states": rng.normal(size=(STEPS, 8))}


@pytest.fixture
def orchestrate(
    vla_eval_python: Path, tmp_path: Path, script: dict[str, Any]
) -> Callable[..., Run]:
    """Run the orchestrator on the script; RuntimeError with its log where it failed."""

    def start(url: str, episodes: int = 2, instruction: str = INSTRUCTION) -> Run:
        file, result = tmp_path / "script.npz", tmp_path / "result.json"
        np.savez(file, **script, instruction=instruction, episodes=episodes)
        driver = Path(__file__).with_name("vla_eval_driver.py")
        finished = subprocess.run(
            [vla_eval_python, driver, url, file, result],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if finished.returncode != 0:
            raise RuntimeError(finished.stderr)
        return Run(json.loads(result.read_text()), finished.stderr)

    return start


def null_chunk(step: int) -> npt.NDArray[np.float32]:
    """What the null policy decides at an environment step, on a server of the seed SEED."""
    seed = decision_seed(SEED, step)
    return NullPolicy().infer([Observation({}, np.zeros(8), seed=seed)])[0].actions


def test_whole_orchestrator(orchestrate: Callable[..., Run], script: dict[str, Any]) -> None:
    policy = Seeing()
    with BackgroundServer(lambda: policy, default_seed=SEED) as server:
        run = orchestrate(f"{server.url}/vla-eval")
    assert [episode["metrics"]["success"] for episode in run.episodes] == [True, True]
    assert run.report["parameters"] == {
        "send_state": True,
        "send_wrist_image": True,
        "quat_no_antipodal": True,
    }
    assert "Spec validation passed" in run.log and "mismatch" not in run.log.lower()
    # One action a step out of two chunks; the second episode begins anew.
    expected = np.concatenate([null_chunk(0), null_chunk(HORIZON)])[:STEPS]
    assert len(run.actions) == 2
    for actions in run.actions:
        np.testing.assert_array_equal(actions, expected)
    assert [seen.step_index for seen in policy.seen] == [0, HORIZON, 0, HORIZON]
    for seen in policy.seen:
        step = seen.step_index
        assert seen.instruction == INSTRUCTION
        np.testing.assert_array_equal(seen.state, script["states"][step])
        for camera, key in (("agentview", "agentview"), ("eye_in_hand", "wrist")):
            pixels = resize_bilinear(script[key][step], 224, 224)
            np.testing.assert_array_equal(seen.images[camera], pixels)


def test_url_says_how_much_of_a_chunk_is_executed(orchestrate: Callable[..., Run]) -> None:
    with BackgroundServer(NullPolicy, default_seed=SEED) as server:
        run = orchestrate(f"{server.url}/vla-eval?replan_steps=6", episodes=1)
        with pytest.raises(RuntimeError, match=r"1008.*replan_steps: '11' is not in 1\.\.10"):
            orchestrate(f"{server.url}/vla-eval?replan_steps=11")
    chunks = [null_chunk(step)[:6] for step in (0, 6, 12)]
    np.testing.assert_array_equal(run.actions[0], np.concatenate(chunks)[:STEPS])


def test_gripper_history_and_orientation_are_supplied(
    orchestrate: Callable[..., Run], script: dict[str, Any]
) -> None:
    base = libero_contract()
    cameras = tuple(c.model_copy(update={"orientation": "opengl"}) for c in base.cameras)
    gripper = Gripper(index=6, open=1.0, closed=0.0)
    limits = {"low": (*base.action.low[:6], 0.0), "gripper": gripper}
    policy = Seeing(
        base.model_copy(
            update={
                "cameras": cameras,
                "history": History(frames=2, states=3, stride=4),
                "action": base.action.model_copy(update=limits),
            }
        )
    )
    with BackgroundServer(lambda: policy, default_seed=SEED) as server:
        run = orchestrate(f"{server.url}/vla-eval", episodes=1)
    sent = run.actions[0][:HORIZON, 6]
    given = policy.infer([Observation({}, np.zeros(8), seed=SEED)])[0].actions[:, 6]
    np.testing.assert_allclose(sent, 1 - 2 * given, atol=1e-6)
    first, second = policy.seen[:2]
    assert first.history == () and second.step_index == HORIZON
    assert [row.step_index for row in second.history] == [2, 6]  # 10 - 2 * 4 and 10 - 4
    for row in second.history:
        np.testing.assert_array_equal(row.state, script["states"][row.step_index])
        assert row.images is not None
        turned = script["wrist"][row.step_index][::-1, ::-1]
        np.testing.assert_array_equal(row.images["eye_in_hand"], resize_bilinear(turned, 224, 224))


def test_error_fails_the_episode_and_names_dialect_and_key(
    orchestrate: Callable[..., Run],
) -> None:
    with BackgroundServer(NullPolicy) as server:
        run = orchestrate(f"{server.url}/vla-eval", instruction="x" * 5000)
    for episode in run.episodes:
        assert episode["metrics"]["success"] is False
        assert "dialect vla_eval" in episode["failure_detail"]
        assert "task_description: longer than 4096" in episode["failure_detail"]


def test_refusal_at_the_handshake_is_readable_there(orchestrate: Callable[..., Run]) -> None:
    contract = libero_contract().model_copy(update={"state": LIBERO_STATE_JOINT})
    with (
        BackgroundServer(lambda: NullPolicy(contract)) as server,
        pytest.raises(RuntimeError, match=r"1008.*vla-eval: state: eef3.*needs joint7"),
    ):
        orchestrate(f"{server.url}/vla-eval")


def test_control_plane_reads_and_never_writes() -> None:
    with BackgroundServer(NullPolicy) as server:
        assert httpx.get(f"{server.http_url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{server.http_url}/config").json() == {"applied": {}, "config": {}}
        refused = httpx.get(f"{server.http_url}/config", params={"max_batch_size": 8})
        assert refused.status_code == 422 and "cannot be changed" in refused.json()["errors"][0]

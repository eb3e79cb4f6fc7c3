"""One interface carries all shapes: train a step, save, load, serve, answer through sessions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policies.families import SHAPES, Episode, Shape

from reflexarc.client import HttpPolicyClient, PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import ActionChunk, Observation
from reflexarc.contract.errors import (
    CheckpointError,
    ContractViolationError,
    HistoryMissingError,
)
from reflexarc.policy.checkpoint import load_checkpoint, save_checkpoint
from reflexarc.policy.registry import registered
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.server import BackgroundServer
from reflexarc.server.loading import CheckpointPolicy

STEPS = 22
every_shape = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture(scope="module", autouse=True)
def test_families() -> Iterator[None]:
    with registered(*{shape.policy for shape in SHAPES.values()}):
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``checkpoints(name)``: trained for one step and saved, once a module."""
    saved: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in saved:
            shape = SHAPES[name]
            policy = shape.build()
            train_one_step(shape, policy)
            folder = tmp_path_factory.mktemp("shapes") / name
            saved[name] = save_checkpoint(folder, policy.eval(), shape.statistics(), {})
        return saved[name]

    return make


def train_one_step(shape: Shape, policy: Any) -> tuple[float, dict[str, bool]]:
    """``(loss, whether each trainable parameter moved)``."""
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    loss = shape.loss(policy)
    loss.backward()
    optimizer.step()
    return loss.item(), {name: not torch.equal(p, before[name]) for name, p in trained.items()}


def run_episode(
    policy: Any, episode: Episode, replan_steps: int, steps: int = STEPS, **fields: Any
) -> tuple[list[np.ndarray], list[Observation]]:
    """``(chunks, requests)`` of an executor that looks through ``episode``."""
    recorded = Recorder(policy)
    executor = RecedingHorizonExecutor(recorded, replan_steps)
    for step in range(steps):
        executor.next_action(lambda step=step: episode.observe(step, **fields))
    return recorded.chunks, recorded.requests


class Recorder:
    """Passes requests on and keeps what went through; fails as the policy does."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.contract = policy, policy.contract
        self.chunks: list[np.ndarray] = []
        self.requests: list[Observation] = []

    def infer(self, observation: Observation) -> ActionChunk:
        self.requests.append(observation)
        answer = self.policy.infer
        chunk = answer([observation])[0] if isinstance(self.policy, PolicyRuntime) else answer(
            observation
        )  # fmt: skip
        self.chunks.append(chunk.actions)
        return chunk


def whole_window(episode: Episode, step: int, **fields: Any) -> Observation:
    """A request that needs no session."""
    from reflexarc.contract import HistoryRow

    history = episode.contract.history
    frames = history.frame_steps(step)
    rows = []
    for past in sorted({*frames, *history.state_steps(step)} - {step}):
        seen = episode.observe(past)
        rows.append(HistoryRow(past, seen.state, seen.images if past in frames else None))
    goal = episode.goal() if episode.contract.needs_goal_image else None
    return episode.observe(step, history=tuple(rows), goal_image=goal, **fields)


@every_shape
def test_one_step_moves_what_is_trained_and_nothing_else(name: str) -> None:
    policy = SHAPES[name].build()
    frozen = {
        key: value.clone()
        for key, value in policy.state_dict().items()
        if key.startswith(tuple(policy.frozen_backbones()) or ("-",))
    }
    loss, moved = train_one_step(SHAPES[name], policy)
    assert np.isfinite(loss)
    # Not read at these sizes: token types and positions beyond the sequence's end share tensors.
    still = [key for key, has_moved in moved.items() if not has_moved]
    assert len(still) <= len(moved) // 4, still
    assert all(torch.equal(policy.state_dict()[key], value) for key, value in frozen.items())


@every_shape
def test_served_through_sessions_equals_in_process(name: str, checkpoints: Any) -> None:
    """Bit for bit over both protocols: the requests have the same shapes."""
    shape, folder = SHAPES[name], checkpoints(name)
    expected, requests = run_episode(
        PolicyRuntime(load_checkpoint(folder)), Episode(shape.contract, 1), shape.replan_steps,
        session_id="mine",
    )  # fmt: skip
    assert any(request.history for request in requests)
    with BackgroundServer(lambda: CheckpointPolicy.load(folder, "cpu")) as server:
        for client_class in (PolicyClient, HttpPolicyClient):
            with client_class(server.url) as client:
                assert client.contract.history == shape.contract.history
                episode = Episode(client.contract, 1)
                served, sent = run_episode(client, episode, shape.replan_steps)
            assert len(served) == len(sent) == len(expected)
            np.testing.assert_array_equal(np.stack(served), np.stack(expected))


@every_shape
def test_sessions_give_what_whole_windows_give(name: str, checkpoints: Any) -> None:
    shape = SHAPES[name]
    runtime = PolicyRuntime(load_checkpoint(checkpoints(name)))
    episode = Episode(shape.contract, 2)
    chunks, _ = run_episode(runtime, episode, shape.replan_steps, session_id="mine")
    for number, chunk in enumerate(chunks):
        (alone,) = runtime.infer([whole_window(episode, number * shape.replan_steps)])
        np.testing.assert_allclose(chunk, alone.actions, atol=1e-5)


@every_shape
def test_rows_do_not_depend_on_their_batch(name: str, checkpoints: Any) -> None:
    runtime = PolicyRuntime(load_checkpoint(checkpoints(name)))
    episodes = [Episode(SHAPES[name].contract, number) for number in range(3)]
    row = whole_window(episodes[0], 17)
    (alone,) = runtime.infer([row])
    first = runtime.infer([whole_window(episodes[1], 17), row])[1]
    second = runtime.infer([whole_window(episodes[2], 17), row])[1]
    np.testing.assert_array_equal(first.actions, second.actions)
    np.testing.assert_allclose(first.actions, alone.actions, atol=1e-5)
    assert not np.allclose(runtime.infer([whole_window(episodes[1], 17)])[0].actions, alone.actions)


@every_shape
def test_everything_is_embedded_once(
    name: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPES[name]
    seen = {"embed_task": 0, "embed_frames": 0}

    def count(method: str) -> None:
        original = getattr(shape.policy, method)

        def counting(policy: Any, rows: Any, *rest: Any) -> Any:
            seen[method] += len(rows if method == "embed_task" else next(iter(rows.values())))
            return original(policy, rows, *rest)

        monkeypatch.setattr(shape.policy, method, counting)

    count("embed_task")
    count("embed_frames")
    runtime = PolicyRuntime(load_checkpoint(checkpoints(name)))
    _, requests = run_episode(
        runtime, Episode(shape.contract, 1), shape.replan_steps, session_id="mine"
    )
    shown = [r.step_index for r in requests] + [
        row.step_index for r in requests for row in r.history if row.images is not None
    ]
    assert len(set(shown)) == len(shown)
    assert seen == {"embed_task": 1, "embed_frames": len(shown)}


@every_shape
def test_interleaved_sessions_are_strangers(name: str, checkpoints: Any) -> None:
    shape = SHAPES[name]
    runtime = PolicyRuntime(load_checkpoint(checkpoints(name)))
    episodes = [Episode(shape.contract, number) for number in (1, 2)]
    apart = [
        run_episode(runtime, episode, shape.replan_steps, session_id=f"apart {episode.number}")[0]
        for episode in episodes
    ]
    recorders = [Recorder(runtime) for _ in episodes]
    executors = [RecedingHorizonExecutor(recorder, shape.replan_steps) for recorder in recorders]
    for step in range(STEPS):
        for episode, executor in zip(episodes, executors, strict=True):
            executor.next_action(
                lambda step=step, episode=episode: episode.observe(
                    step, session_id=f"together {episode.number}"
                )
            )
    for recorder, chunks in zip(recorders, apart, strict=True):
        np.testing.assert_array_equal(np.stack(recorder.chunks), np.stack(chunks))


@every_shape
def test_missing_history_is_named_over_the_wire(name: str, checkpoints: Any) -> None:
    shape, folder = SHAPES[name], checkpoints(name)
    episode = Episode(shape.contract, 1)
    step = 18
    with BackgroundServer(lambda: CheckpointPolicy.load(folder, "cpu")) as server:
        for client_class in (PolicyClient, HttpPolicyClient):
            with client_class(server.url) as client:
                with pytest.raises(HistoryMissingError) as raised:
                    client.infer(episode.observe(step))
                wanted = shape.contract.history.frame_steps(step)[:-1]
                assert all(str(past) in raised.value.message for past in wanted)
                assert raised.value.field == "history"
                whole = client.infer(whole_window(episode, step))
                # Now the session holds it, and the next decision needs only what is new.
                again = client.infer(replace(episode.observe(step), request_id="again"))
                np.testing.assert_array_equal(whole.actions.shape, again.actions.shape)


@every_shape
def test_a_restarted_server_goes_on_in_the_middle_of_an_episode(
    name: str, checkpoints: Any
) -> None:
    shape, folder = SHAPES[name], checkpoints(name)
    episode = Episode(shape.contract, 1)
    expected, _ = run_episode(
        PolicyRuntime(load_checkpoint(folder)), episode, shape.replan_steps, session_id="mine"
    )

    def load() -> CheckpointPolicy:
        return CheckpointPolicy.load(folder, "cpu")

    server = BackgroundServer(load).__enter__()
    try:
        for client_class in (PolicyClient, HttpPolicyClient):
            with client_class(server.url) as client:
                recorder = Recorder(client)
                executor = RecedingHorizonExecutor(recorder, shape.replan_steps)
                for step in range(STEPS):
                    if step == 13:
                        server.stop()
                        server = BackgroundServer(load, port=server.port).__enter__()
                    executor.next_action(lambda step=step: episode.observe(step))
            # One request was refused, for what the new server had not seen.
            assert len(recorder.requests) == len(recorder.chunks) + 1
            np.testing.assert_allclose(np.stack(recorder.chunks), np.stack(expected), atol=1e-5)
    finally:
        server.stop()


@every_shape
def test_a_committed_prefix_begins_the_chunk_or_is_refused(name: str, checkpoints: Any) -> None:
    shape, folder = SHAPES[name], checkpoints(name)
    episode = Episode(shape.contract, 1)
    with (
        BackgroundServer(lambda: CheckpointPolicy.load(folder, "cpu")) as server,
        PolicyClient(server.url) as client,
    ):
        free = client.infer(whole_window(episode, 6)).actions
        prefix = client.infer(whole_window(episode, 5)).actions[1:4]
        asked = whole_window(episode, 6, action_prefix=prefix)
        if not client.metadata["sampling"]["supports_prefix"]:
            with pytest.raises(ContractViolationError, match="action_prefix"):
                client.infer(asked)
            return
        chunk = client.infer(asked).actions
        np.testing.assert_array_equal(chunk[:3], prefix)
        assert not np.array_equal(chunk[3:], free[3:])  # what follows continues the prefix
        with pytest.raises(ContractViolationError, match="action_guide"):
            client.infer(replace(asked, action_guide=prefix))  # none of these policies takes one
        too_long = np.zeros((shape.contract.action.horizon, prefix.shape[1]), np.float32)
        with pytest.raises(ContractViolationError, match="action_prefix"):
            client.infer(replace(asked, action_prefix=too_long))


@pytest.mark.parametrize("name", ["video", "vjepa2_head", "mobile", "vision_language"])
def test_other_frozen_weights_are_refused(
    name: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints(name)
    original = SHAPES[name].policy.frozen_backbones
    monkeypatch.setattr(
        SHAPES[name].policy,
        "frozen_backbones",
        lambda self: {k: replace(v, sha256="0" * 64) for k, v in original(self).items()},
    )
    with pytest.raises(CheckpointError, match="frozen"):
        load_checkpoint(folder)

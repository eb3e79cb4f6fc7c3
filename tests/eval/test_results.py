"""Episodes on disk: resuming, half-written lines, other runs' results, concurrent runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reflexarc.contract.policy_contract import PolicyContract
from reflexarc.eval.arms import Arm
from reflexarc.eval.durable_log import ResultsError
from reflexarc.eval.report_table import format_indices, markdown
from reflexarc.eval.results import EpisodeKey, EpisodeResult, ResultsLog, RunIdentity
from reflexarc.eval.run_settings import RunSettings
from reflexarc.eval.summary import summarize, write_summary

IDENTITY = RunIdentity(
    suite="libero_object",
    seed=0,
    max_steps=280,
    replan_steps=8,
    wait_steps=10,
    checkpoint_fingerprint="f" * 64,
    contract_sha256="c" * 64,
    demonstrations={0: "d" * 64},
)


def episode(task: int = 0, state: int = 40, arm: Arm = "policy", success: bool = True):
    shared = IDENTITY.model_dump(exclude={"demonstrations", "goals"})
    asked = arm != "replay"
    return EpisodeResult(
        **shared,
        task=task,
        task_name=f"task_{task}",
        instruction=f"do {task}",
        state=state,
        arm=arm,
        success=success,
        reason="success" if success else "timeout",
        steps=120 if success else 280,
        seconds=9.5,
        chunks=15 if asked else 0,
        latency_median_ms=50.0 if asked else None,
        latency_max_ms=90.0 if asked else None,
        demonstration_sha256=None if asked else "d" * 64,
    )


def settings(output: Path, **changes: object) -> RunSettings:
    values = {
        "server": "ws://127.0.0.1:1",
        "suite": "libero_object",
        "tasks": (0, 9),
        "states": (40, 41),
        "baselines": ("replay", "blank"),
        "output": output,
    }
    return RunSettings.model_validate({**values, **changes})


def test_finished_episodes_are_found_again(tmp_path: Path) -> None:
    with ResultsLog(tmp_path, IDENTITY) as log:
        log.append(episode())
        log.append(episode(arm="replay", success=False))
    with ResultsLog(tmp_path, IDENTITY) as log:
        assert log.finished == {EpisodeKey(0, 40, "policy"), EpisodeKey(0, 40, "replay")}
        assert log.results == [episode(), episode(arm="replay", success=False)]


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_half_written_last_line_is_dropped_with_a_notice(tmp_path: Path, cut: int) -> None:
    with ResultsLog(tmp_path, IDENTITY) as log:
        log.append(episode(state=40))
        log.append(episode(state=41))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    notices: list[str] = []
    with ResultsLog(tmp_path, IDENTITY, notices.append) as log:
        assert log.finished == {EpisodeKey(0, 40, "policy")}
        log.append(episode(state=41))
    assert len(notices) == 1 and "half-written" in notices[0]
    lines = path.read_text().splitlines()
    assert [json.loads(line)["state"] for line in lines] == [40, 41]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint_fingerprint", "other"),
        ("contract_sha256", "other"),
        ("replan_steps", 4),
        ("max_steps", 100),
        ("seed", 1),
        ("suite", "libero_goal"),
    ],
)
def test_another_runs_results_are_refused_by_name(
    tmp_path: Path, field: str, value: object
) -> None:
    with ResultsLog(tmp_path, IDENTITY) as log:
        log.append(episode())
    with pytest.raises(ResultsError, match=f"line 1 .*{field}: there .* this run {value!r}"):
        ResultsLog(tmp_path, IDENTITY.model_copy(update={field: value}))


def test_another_checkpoint_is_told_by_the_start_of_its_fingerprint(tmp_path: Path) -> None:
    with ResultsLog(tmp_path, IDENTITY) as log:
        log.append(episode())
    other = IDENTITY.model_copy(update={"checkpoint_fingerprint": "0123456789ab" + "c" * 52})
    with pytest.raises(
        ResultsError, match=r"fingerprint: there 'f{12}…', this run '0123456789ab…'\).* serve the"
    ):
        ResultsLog(tmp_path, other)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match=r"file/results\.jsonl cannot be written \(File exists"):
        ResultsLog(tmp_path / "file", IDENTITY)


def test_a_replay_of_another_demonstration_is_refused(tmp_path: Path) -> None:
    with ResultsLog(tmp_path, IDENTITY) as log:
        log.append(episode(arm="replay"))
    with pytest.raises(ResultsError, match="demonstration_sha256"):
        ResultsLog(tmp_path, IDENTITY.model_copy(update={"demonstrations": {0: "e" * 64}}))
    ResultsLog(tmp_path, IDENTITY.model_copy(update={"demonstrations": {}})).__exit__(*[None] * 3)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with ResultsLog(tmp_path, IDENTITY) as log:
        log.append(episode())
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"suite": "libero_object"}\n' + path.read_bytes())
    with pytest.raises(ResultsError, match="line 1 is not an episode"):
        ResultsLog(tmp_path, IDENTITY)


def test_two_runs_cannot_write_one_folder(tmp_path: Path) -> None:
    with ResultsLog(tmp_path, IDENTITY), pytest.raises(ResultsError, match="another run"):
        ResultsLog(tmp_path, IDENTITY)
    ResultsLog(tmp_path, IDENTITY).__exit__(None, None, None)


def test_summary_pairs_the_arms_state_by_state(tmp_path: Path) -> None:
    results = [
        episode(0, 40), episode(0, 41), episode(9, 40), episode(9, 41, success=False),
        episode(0, 40, "blank", False), episode(0, 41, "blank", False),
        episode(9, 40, "blank", False), episode(9, 41, "blank", True),
        episode(0, 40, "replay", True),
    ]  # fmt: skip
    summary = summarize(results, settings(tmp_path), IDENTITY)
    assert not summary.complete  # three replays are missing
    assert summary.total is not None
    policy = summary.total.arms["policy"]
    assert (policy.successes, policy.trials, policy.mean_steps) == (3, 4, 160.0)
    assert policy.latency_median_ms == 50.0
    blank = summary.total.differences["blank"]
    assert (blank.both, blank.policy_only, blank.baseline_only, blank.neither) == (0, 3, 1, 0)
    assert (blank.pairs, blank.difference) == (4, 0.5)
    assert summary.total.differences["replay"].pairs == 1
    assert [group.task for group in summary.tasks] == [0, 9]
    write_summary(summary, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["total"]["arms"]["policy"]
    text = (tmp_path / "summary.md").read_text()
    assert text == markdown(summary)
    assert "init states 40-41 (incomplete)" in text
    assert "| all tasks | 3/4 [30, 95] | 1/1 [21, 100] | 1/4 [5, 70] |" in text
    assert not list(tmp_path.glob(".summary*"))


def test_summary_of_nothing_yet(tmp_path: Path) -> None:
    summary = summarize([], settings(tmp_path), IDENTITY)
    assert summary.total is None and not summary.complete
    assert "incomplete" in markdown(summary)


def test_identity_follows_the_contract(tmp_path: Path, null_contract: PolicyContract) -> None:
    asked = settings(tmp_path, max_steps=24)
    first = asked.identity(null_contract, {})
    other = asked.identity(null_contract.model_copy(update={"statistics_sha256": "x"}), {})
    assert first.max_steps == 24
    assert first.contract_sha256 != other.contract_sha256


def test_indices_are_shortened_to_ranges() -> None:
    assert format_indices((49, 40, 41, 42, 45)) == "40-42, 45, 49"

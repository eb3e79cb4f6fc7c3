"""``reflexarc eval compare``: pairing, numbers, refusals and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reflexarc.eval.compare import Comparison, compare
from reflexarc.eval.durable_log import ResultsError
from reflexarc.eval.intervals import PairedCounts, mcnemar_exact, paired_difference
from reflexarc.eval.report_html.compare_page import markdown, write_comparison

from .results_folders import IDENTITY, episode, told_another, write_folder


def run(folder: Path, solved: dict[tuple[int, int], bool], **changes: object) -> Path:
    identity = IDENTITY.model_copy(update=changes)
    rows = [episode(task, state, ok, identity=identity) for (task, state), ok in solved.items()]
    return write_folder(folder, rows, identity)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A solves 7 of 8, B 3 of 8; B lacks state 44 of task 9; A has a state more of task 0."""
    a = {(t, s): (t, s) != (0, 40) for t in (0, 9) for s in range(40, 44)}
    b = {(t, s): (t, s) in ((0, 40), (0, 41), (9, 43)) for t, s in a}
    return (
        run(tmp_path / "a", {**a, (9, 44): True}),
        run(tmp_path / "b", b, checkpoint_fingerprint="e" * 64),
    )


def test_pairs_give_rates_difference_and_disagreements(folders: tuple[Path, Path]) -> None:
    found = compare(*folders)
    counts = PairedCounts(both=2, first_only=5, second_only=1, neither=0)
    total, expected = found.total, paired_difference(counts)
    assert (total.both, total.a_only, total.b_only, total.neither) == (2, 5, 1, 0)
    assert (total.a.successes, total.b.successes, total.pairs) == (7, 3, 8)
    assert (total.difference, total.low, total.high) == (
        expected.estimate, expected.low, expected.high,
    )  # fmt: skip
    assert total.mcnemar_p == mcnemar_exact(counts) == pytest.approx(0.21875)
    assert [(g.task, g.a_only, g.b_only) for g in found.tasks] == [(0, 2, 1), (9, 3, 0)]
    assert [(d.task, d.state, d.solved_by) for d in found.disagreements] == [
        (0, 40, "B"), (0, 42, "A"), (0, 43, "A"), (9, 40, "A"), (9, 41, "A"), (9, 42, "A"),
    ]  # fmt: skip
    assert found.warnings == ("1 episode is only in A and is left out",)
    assert not found.same_checkpoint


def test_a_run_and_itself_differ_nowhere(folders: tuple[Path, Path]) -> None:
    found = compare(folders[0], folders[0])
    assert (found.total.difference, found.total.mcnemar_p) == (0.0, 1.0)
    assert found.disagreements == () and found.warnings == () and found.same_checkpoint


def test_other_conditions_are_said(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {(0, 40): True})
    b = run(tmp_path / "b", {(0, 40): True}, max_steps=200, replan_steps=5)
    assert compare(a, b).warnings == (
        "max_steps: A has 300, B has 200",
        "replan_steps: A has 8, B has 5",
    )


def test_an_arm_with_other_tasks_is_paired_by_them(tmp_path: Path) -> None:
    rows = [told_another(0, 40, named=True), told_another(9, 40, named=False)]
    a, b = (write_folder(tmp_path / name, rows) for name in "ab")
    assert compare(a, b, "other_instruction").total.pairs == 2
    with pytest.raises(ResultsError, match="has no episode of policy; it has other_instruction"):
        compare(a, b)


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {(0, 40): True})
    with pytest.raises(ResultsError, match=r"libero_goal and .* of libero_10"):
        compare(a, run(tmp_path / "suite", {(0, 40): True}, suite="libero_10"))
    with pytest.raises(ResultsError, match=r"no episode of policy in common: tasks \[0\].*\[41\]"):
        compare(a, run(tmp_path / "states", {(0, 41): True}))
    with pytest.raises(ResultsError, match=r"holds no results\.jsonl"):
        compare(a, tmp_path / "nothing")
    other = write_folder(tmp_path / "name", [episode(0, 40, True, task_name="another")])
    with pytest.raises(ResultsError, match="'task_0' in one folder and 'another'"):
        compare(a, other)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {(0, 40): True})
    line = (a / "results.jsonl").read_text()
    twice = tmp_path / "twice"
    twice.mkdir()
    (twice / "results.jsonl").write_text(2 * line)
    with pytest.raises(ResultsError, match="task 0, state 40, policy 2 times"):
        compare(a, twice)
    (twice / "results.jsonl").write_text(line + line.replace('"state":40', '"state":41').replace(
        '"seed":0', '"seed":1'
    ))  # fmt: skip
    with pytest.raises(ResultsError, match=r"several runs: seed is \['0', '1'\]"):
        compare(a, twice)
    (twice / "results.jsonl").write_text(line + '{"suite": "half')
    assert compare(a, twice).total.pairs == 1
    (twice / "results.jsonl").write_text('{"suite": "half')
    with pytest.raises(ResultsError, match="no finished episode"):
        compare(a, twice)


def test_three_files_are_written_and_text_stays_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | $x$"
    rows = [episode(0, 40, True, instruction=hostile), episode(0, 41, False, instruction=hostile)]
    a = write_folder(tmp_path / "a<b>", rows)
    b = write_folder(tmp_path / "b", [rows[0].model_copy(update={"success": False}), rows[1]])
    written = write_comparison(compare(a, b), tmp_path / "out")
    assert [path.name for path in written] == ["compare.json", "compare.md", "compare.html"]
    assert Comparison.model_validate_json(written[0].read_text()) == compare(a, b)
    assert json.loads(written[0].read_text())["total"]["a_only"] == 1
    html = written[2].read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "<b>" not in html
    table = [line for line in markdown(compare(a, b)).splitlines() if line.startswith("| 0: ")]
    assert len(table) == 1 and table[0].replace("\\|", "").count("|") == 7
    assert "<script" not in table[0]


def test_the_command_prints_and_writes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from reflexarc.cli.main import app
    from reflexarc.contract.errors import ConfigError

    names = ["eval", "compare", *map(str, folders), "--output", str(tmp_path / "out")]
    outcome = CliRunner().invoke(app, names)
    assert outcome.exit_code == 0, outcome.output
    assert "7/8" in outcome.output and "1 episode is only in A" in outcome.output
    assert (tmp_path / "out" / "compare.html").is_file()
    refused = CliRunner().invoke(app, [*names, "--arm", "nobody"])
    assert isinstance(refused.exception, ConfigError)

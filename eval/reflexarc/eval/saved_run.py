"""A results folder read back: its episodes and, where there is one, its summary."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import ValidationError

from reflexarc.eval.durable_log import RESULTS_FILE, ResultsError
from reflexarc.eval.results import EpisodeResult, parse_results
from reflexarc.eval.summary import Summary

SUMMARY_FILE = "summary.json"
# What all episodes of one folder share (ResultsLog refuses others when it writes).
RUN_FIELDS = (
    "suite",
    "seed",
    "max_steps",
    "replan_steps",
    "wait_steps",
    "executor",
    "injected_latency_ms",
    "checkpoint_fingerprint",
    "contract_sha256",
)


def read_results(folder: Path) -> list[EpisodeResult]:
    """The finished episodes of a folder; a half-written last line is left out.

    Raises ResultsError for a folder without episodes, a line that is no episode, an episode that
    stands twice, and episodes of more than one run.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise ResultsError(
            f"{folder} holds no {RESULTS_FILE}; give the --output folder of reflexarc eval libero"
        )
    content = path.read_bytes()
    results = parse_results(content[: content.rfind(b"\n") + 1], path)
    if not results:
        raise ResultsError(f"{path} holds no finished episode yet")
    _refuse_repeated(results, path)
    _refuse_mixed(results, path)
    return results


def read_summary(folder: Path) -> Summary:
    """``summary.json`` of a folder. Raises ResultsError when it is missing or of another format."""
    path = folder / SUMMARY_FILE
    if not path.is_file():
        raise ResultsError(
            f"{folder} holds no {SUMMARY_FILE}; run the same reflexarc eval libero command on it "
            "once more: it writes the summary and skips finished episodes"
        )
    try:
        return Summary.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ResultsError(
            f"{path} is not a summary of this version: {where}: {first['msg']}; run the same "
            "reflexarc eval libero command on the folder once more to write it anew",
            field=where,
        ) from error


def _refuse_repeated(results: list[EpisodeResult], path: Path) -> None:
    for key, count in Counter(result.key for result in results).items():
        if count > 1:
            raise ResultsError(
                f"{path} holds task {key.task}, state {key.state}, {key.arm} {count} times; "
                "remove all but one of these lines"
            )


def _refuse_mixed(results: list[EpisodeResult], path: Path) -> None:
    for name in RUN_FIELDS:
        values = {getattr(result, name) for result in results}
        if len(values) > 1:
            raise ResultsError(
                f"{path} mixes episodes of several runs: {name} is {sorted(map(str, values))}",
                field=name,
            )

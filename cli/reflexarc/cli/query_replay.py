"""``reflexarc query --replay``: what a server answers otherwise than a recorded one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from reflexarc.client.addresses import http_url, is_loopback
from reflexarc.client.credentials import authorization, verification
from reflexarc.client.replay import ReplayReport, open_recording, replay

if TYPE_CHECKING:
    from reflexarc.client import HttpPolicyClient, PolicyClient

_REFUSALS_SHOWN = 10


def replay_recording(
    directory: Path,
    client: PolicyClient | HttpPolicyClient,
    tolerance: float,
    output: Path | None,
) -> bool:
    """Replay, print and write the report; whether the server answers as recorded."""
    recording = open_recording(directory)
    total = sum(map(len, recording))
    with Progress(transient=True) as progress:
        task = progress.add_task("replay", total=total)
        report, sessions = replay(
            recording,
            client,
            action_std=client.metadata.get("action_std"),
            tolerance=tolerance,
            notify=partial(progress.advance, task),
        )
    if client.contract.needs_session:
        _end_sessions(client.url, sessions)
    _print(report, torn=[str(part.path) for part in recording if part.torn])
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(report.to_json(), indent=2) + "\n")
        temporary.replace(output)
    return not report.differs


def _end_sessions(server: str, sessions: Sequence[str]) -> None:
    """So that they do not take the place of robots' sessions until they are idle for long."""
    url = http_url(server)
    with httpx.Client(
        base_url=url,
        headers=authorization(),
        trust_env=not is_loopback(url),
        timeout=5.0,
        verify=verification(url),
    ) as http:
        for session in sessions:
            try:
                http.delete(f"/v1/sessions/{session}")
            except httpx.HTTPError:
                return


def _print(report: ReplayReport, torn: Sequence[str]) -> None:
    console = Console()
    table = Table(title=f"{report.compared} of {report.requests} recorded requests compared")
    for name in ("action", "max difference", "mean", "max in std", "worst at"):
        table.add_column(name, justify="left" if name in ("action", "worst at") else "right")
    for difference in report.differences:
        scaled = f"{difference.scaled:.2e}" if difference.action_std else "unknown"
        worst = ", ".join(f"{k} {v}" for k, v in difference.worst.items() if v is not None)
        style = "red" if difference.scaled > report.tolerance else None
        table.add_row(
            difference.name,
            f"{difference.max_abs:.2e}",
            f"{difference.mean_abs:.2e}",
            scaled,
            worst,
            style=style,
        )
    console.print(table)
    console.print(_timing_table(report))
    if report.contract_changes:
        console.print(f"the contract differs in: {', '.join(report.contract_changes)}")
    for path in torn:
        console.print(f"{path} ends inside a frame: its writer was killed", markup=False)
    for reason, count in report.left_out.items():
        console.print(f"not compared: {count} ({reason})", markup=False)
    for change in report.refusals_changed[:_REFUSALS_SHOWN]:
        console.print(
            f"request {change['request']}: {change['recorded']} then, {change['now']} now",
            style="red",
            markup=False,
        )
    hidden = len(report.refusals_changed) - _REFUSALS_SHOWN
    if hidden > 0:
        console.print(f"and {hidden} more changed refusals", style="red")
    verdict = "differs" if report.differs else "answers as recorded"
    console.print(f"The server {verdict} (tolerance {report.tolerance:g}).")


def _timing_table(report: ReplayReport) -> Table:
    table = Table(title="stated by the server, median and p95")
    for name in ("timing", "then", "", "now", ""):
        table.add_column(name, justify="left" if name == "timing" else "right")
    for name, when in report.timing.items():
        cells = []
        for moment in ("recorded", "replayed"):
            found = when.get(moment)
            cells += [f"{found['median']:.2f}", f"{found['p95']:.2f}"] if found else ["", ""]
        table.add_row(name, *cells)
    return table

"""``reflexarc data inspect``: what demonstration files hold, and whether every demo reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import data_app
from reflexarc.contract.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from rich.console import Console

    from reflexarc.data.inspection import FileReport, Inspection, Range

ALIGNMENTS = ("before_action", "after_action")


@data_app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(help="HDF5 files, or folders of them.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file.")
    ] = None,
    images: Annotated[
        bool, typer.Option(help="Read every image; --no-images checks the rest in seconds.")
    ] = True,
    alignment: Annotated[
        str, typer.Option(help=f"For files that cannot be recognised: {' or '.join(ALIGNMENTS)}.")
    ] = "",
) -> None:
    """Check every demonstration of LIBERO files and print what they hold.

    A demo that cannot be used is named with file and key; the exit status is then 2.
    """
    require("reflexarc data inspect", "train", "h5py", "tqdm")
    from rich.console import Console
    from tqdm import tqdm

    from reflexarc.data.inspection import count_demos, inspect_libero

    if alignment and alignment not in ALIGNMENTS:
        raise ConfigError(f"--alignment {alignment!r}: give one of {', '.join(ALIGNMENTS)}")
    chosen = cast("Literal['before_action', 'after_action'] | None", alignment or None)
    with tqdm(total=count_demos(paths), unit="demo", disable=None) as progress:

        def advance(name: str) -> None:
            progress.set_postfix_str(name, refresh=False)
            progress.update()

        inspection = inspect_libero(paths, alignment=chosen, read_images=images, on_demo=advance)
    _print(inspection, Console())
    if json_file is not None:
        _write_json(inspection, json_file)
    _refuse_problems(inspection)


def _print(inspection: Inspection, console: Console) -> None:
    from rich.markup import escape

    for report in inspection.files:
        console.print(f"[bold]{escape(report.path)}[/]", soft_wrap=True)
        console.print(_table(report))
        for remark in report.remarks:
            console.print(f"  [yellow]note[/] {escape(remark)}", soft_wrap=True)
        for problem in report.problems:
            console.print(f"  [red]unusable[/] {escape(problem.message)}", soft_wrap=True)
    for remark in inspection.remarks:
        console.print(f"[yellow]note[/] {escape(remark)}", soft_wrap=True)


def _table(report: FileReport) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(report):
        table.add_row(name, escape(value))
    return table


def _rows(report: FileReport) -> list[tuple[str, str]]:
    if not report.demos:
        return [("demos", "none that can be used")]
    sizes = ", ".join(f"{height}x{width}" for height, width, _ in report.image_shapes)
    offset = {
        "before_action": "before their action",
        "after_action": "after their action; the reader moves them, one step a demo is lost",
    }[report.alignment]
    seeds = report.seeds
    return [
        ("task", report.instruction),
        ("demos", f"{report.demos}, {report.shortest} to {report.longest} steps"),
        ("steps", str(report.steps)),
        ("frames", f"{report.frames} a camera, {sizes} px, every {report.render_stride} steps"),
        ("observations", f"{offset} ({report.recognised_by})"),
        ("seeds", f"{len(set(seeds))} distinct, {min(seeds)} to {max(seeds)}" if seeds else "-"),
        ("gripper closed", f"{report.gripper_closed_share:.1%} of steps"),
        ("no-ops", f"{report.no_op_share:.1%} of steps"),
        ("actions", _lines(report.actions)),
        ("states", _lines(report.states)),
        ("size", f"{report.megabytes} MB"),
    ]


def _lines(ranges: list[Range]) -> str:
    return "\n".join(f"{r.name:<16} {r.minimum:9.4f} to {r.maximum:8.4f}" for r in ranges)


def _write_json(inspection: Inspection, path: Path) -> None:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(inspection.to_json(), indent=2) + "\n")
    temporary.replace(path)


def _refuse_problems(inspection: Inspection) -> None:
    problems = inspection.problems
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise DatasetError(f"{problems[0].message}{more}", field=problems[0].key or None)

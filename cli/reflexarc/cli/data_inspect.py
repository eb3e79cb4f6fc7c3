"""``reflexarc data inspect``: what demonstration files hold, and whether every demo reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import data_app
from reflexarc.contract.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from rich.console import Console

    from reflexarc.data.dataset import EpisodeDataset
    from reflexarc.data.inspection import FileReport, Inspection, Problem, Range

ALIGNMENTS = ("before_action", "after_action")


@data_app.command()
def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="HDF5 files or folders of them; LeRobot folders; a mobile robot's *.h5."
        ),
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the report to this file.")
    ] = None,
    images: Annotated[
        bool, typer.Option(help="Read every image; --no-images checks the rest in seconds.")
    ] = True,
    alignment: Annotated[
        str, typer.Option(help=f"For files that cannot be recognised: {' or '.join(ALIGNMENTS)}.")
    ] = "",
    contact_sheet: Annotated[
        Path | None,
        typer.Option(help="Write a PNG with first, middle and last frames of some episodes."),
    ] = None,
    write_contract: Annotated[
        Path | None,
        typer.Option(help="Write the recipe's contract and data sections for this data as YAML."),
    ] = None,
) -> None:
    """Check every demonstration of LIBERO files or LeRobot folders and print what they hold.

    A demo that cannot be used is named with file and key; the exit status is then 2.
    """
    require("reflexarc data inspect", "train", "h5py", "tqdm", "pyarrow", "av")
    from rich.console import Console
    from tqdm import tqdm

    from reflexarc.data.inspection import count_demos, inspect_libero
    from reflexarc.data.lerobot.dataset import is_lerobot
    from reflexarc.data.mobile.dataset import is_mobile

    mobile = [path for path in paths if not is_lerobot(path) and is_mobile(path)]
    if mobile:
        if len(mobile) < len(paths):
            raise ConfigError("inspect a mobile robot's episodes in a command of their own")
        _inspect_mobile(paths, json_file, images, contact_sheet, write_contract)
        return
    folders = [path for path in paths if is_lerobot(path)]
    if folders and len(folders) < len(paths):
        raise ConfigError("inspect LeRobot folders and LIBERO's files in a command each")
    if alignment and alignment not in ALIGNMENTS:
        raise ConfigError(f"--alignment {alignment!r}: give one of {', '.join(ALIGNMENTS)}")
    chosen = cast("Literal['before_action', 'after_action'] | None", alignment or None)
    if folders:
        _inspect_folders(folders, json_file, images, contact_sheet, write_contract)
        return
    with tqdm(total=count_demos(paths), unit="demo", disable=None) as progress:

        def advance(name: str) -> None:
            progress.set_postfix_str(name, refresh=False)
            progress.update()

        inspection = inspect_libero(paths, alignment=chosen, read_images=images, on_demo=advance)
    _print(inspection, Console())
    if json_file is not None:
        _write_json(inspection.to_json(), json_file)
    _refuse_problems(inspection.problems)
    if contact_sheet is not None or write_contract is not None:
        from reflexarc.data.libero_hdf5 import open_libero

        _write_extras(open_libero(paths, alignment=chosen), paths, contact_sheet, write_contract)


def _inspect_folders(
    folders: list[Path],
    json_file: Path | None,
    images: bool,
    contact_sheet: Path | None,
    write_contract: Path | None,
) -> None:
    from rich.console import Console
    from tqdm import tqdm

    from reflexarc.cli.data_inspect_lerobot import print_report
    from reflexarc.data.lerobot.inspection import inspect_lerobot

    if len(folders) > 1 and (contact_sheet is not None or write_contract is not None):
        raise ConfigError("--contact-sheet and --write-contract take one LeRobot folder")
    reports, dataset = [], None
    for folder in folders:
        with tqdm(unit="episode", disable=None) as progress:

            def advance(name: str, progress: tqdm[NoReturn] = progress) -> None:
                progress.set_postfix_str(name, refresh=False)
                progress.update()

            report, dataset = inspect_lerobot(folder, read_images=images, on_episode=advance)
        print_report(report, Console())
        reports.append(report)
    if json_file is not None:
        _write_json({"folders": [report.to_json() for report in reports]}, json_file)
    _refuse_problems([problem for report in reports for problem in report.problems])
    if dataset is not None:
        _write_extras(dataset, folders, contact_sheet, write_contract)


def _inspect_mobile(
    paths: list[Path],
    json_file: Path | None,
    images: bool,
    contact_sheet: Path | None,
    write_contract: Path | None,
) -> None:
    from rich.console import Console

    from reflexarc.cli.data_inspect_mobile import print_report, read_report
    from reflexarc.data.mobile.dataset import open_mobile

    report = read_report(paths, images=images)
    print_report(report, Console())
    if json_file is not None:
        _write_json(report.to_json(), json_file)
    _refuse_problems(report.problems)
    if contact_sheet is not None or write_contract is not None:
        rate = None if report.control_hz else 1.0  # of pictures and names alone
        dataset = open_mobile(paths, control_hz=rate, fallback_instruction="(none)")
        _write_extras(dataset, paths, contact_sheet, write_contract)


def _write_extras(
    dataset: EpisodeDataset, paths: list[Path], sheet: Path | None, contract: Path | None
) -> None:
    from reflexarc.data.contact_sheet import write_contact_sheet
    from reflexarc.data.recipe_fragment import write_recipe_fragment

    if sheet is not None:
        write_contact_sheet(dataset, sheet)
        typer.echo(f"Contact sheet: {sheet}")
    if contract is not None:
        write_recipe_fragment(dataset, paths, contract)
        typer.echo(f"For a recipe:  {contract}")


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


def _write_json(report: Mapping[str, Any], path: Path) -> None:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


def _refuse_problems(problems: list[Problem]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise DatasetError(f"{problems[0].message}{more}", field=problems[0].key or None)

"""``report.html``: one self-contained page about an evaluation, made from its results folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write_report_if_possible(folder: Path, notify: Callable[[str], None]) -> None:
    """Write the page at the end of a run; whatever goes wrong is said, and the results stay."""
    try:
        from reflexarc.eval.report_html.run_page import write_report

        notify(f"Report:  {write_report(folder)}")
    except Exception as error:  # the results are on disk and matter more than their page
        notify(
            f"report.html was not written ({type(error).__name__}: {error}); results and summary "
            f"are complete. Try again with: reflexarc eval report {folder}"
        )

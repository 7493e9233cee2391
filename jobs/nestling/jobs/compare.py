"""`nestling compare`: runs beside each other, or the trials of a sweep, as a table and as one page."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nestling.jobs.arguments import AsJson, found_run, need_writable, place_of, runs_dir
from nestling.jobs.output import WRONG_USAGE, Stop, print_table, say, verb
from nestling.tracking.runs import RunFolder, find_run

if TYPE_CHECKING:
    from nestling.tuning.comparison import Comparison, SweepReport

Given = Annotated[
    list[str] | None,
    typer.Argument(metavar="RUN... [run.dir=DIR]", help="At least two runs, as in other verbs.", show_default=False),
]


@verb("report", "rows")
def compare(
    given: Given = None,
    sweep: Annotated[str | None, typer.Option(metavar="NAME", help="The trials of a sweep, instead of runs.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Page to write (.html); by default beside the runs.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Compare runs: what differs, what they measured, and what it took; also as a page with curves."""
    places = [each for each in given or () if "=" in each]
    runs = [each for each in given or () if each not in places]
    if sweep is not None and runs:
        raise Stop(f"--sweep: got {sweep} and runs ({', '.join(runs)}), needs one of the two", WRONG_USAGE)
    if out is not None and (out.suffix.lower() != ".html" or out.is_dir()):
        raise Stop(f"--out: got {out}, needs a file that ends in .html", WRONG_USAGE)
    from nestling.tuning.comparison import ComparisonError

    try:
        page, found = _runs(runs, places, out) if sweep is None else _sweep(sweep, places, out)
    except ComparisonError as error:
        raise Stop(str(error), WRONG_USAGE) from error
    if not as_json:
        _show(found)
        say(f"page: {page}")
    return {"report": page, "rows": found.rows}


def _runs(references: Sequence[str], places: list[str], out: Path | None) -> tuple[Path, Comparison]:
    from nestling.tuning.comparison import compare as compare_runs

    folders = [found_run(reference, places) for reference in references]
    page = out or runs_dir(places) / f"compare-{'-'.join(folder.run_id for folder in folders[:4])}.html"
    page = _writable(page, "--out" if out else "run.dir")
    comparison = compare_runs(folders)
    target = f" --out {shlex.quote(str(out))}" if out else ""
    runs = " ".join(folder.run_id for folder in folders)
    page.parent.mkdir(parents=True, exist_ok=True)
    comparison.write(page, f"nestling compare {runs}{target}{place_of(folders[0])}")
    return page, comparison


def _sweep(name: str, places: list[str], out: Path | None) -> tuple[Path, SweepReport]:
    from nestling.tuning.comparison import sweep_report

    runs = runs_dir(places)
    folder = _found_sweep(runs, name)
    page = None if out is None else _writable(out, "--out")
    report = sweep_report(folder, runs)
    if page is None:
        return report.page, report
    page.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(report.page, page)), report


def _found_sweep(runs: Path, name: str) -> RunFolder:
    try:
        return find_run(runs / "sweeps", name)
    except LookupError as error:
        message = str(error.args[0])
        if "there are no runs in" in message:
            message = f"there are no sweeps in {runs.resolve()}; nestling sweep tuning/levels.yaml makes one"
        raise Stop(message, WRONG_USAGE) from error


def _writable(page: Path, given: str) -> Path:
    """A page that can be written, which is found out before anything is read."""
    page = page.expanduser()
    need_writable(page.parent, given, "choose another place with --out FILE")
    return page


def _show(found: Comparison | SweepReport) -> None:
    from nestling.tuning.comparison.table import cells, headings

    table = Table(box=None, pad_edge=False)
    texts = 1 + len(found.arms[0].differs)
    for place, heading in enumerate(headings(found.arms, found.metrics)):
        table.add_column(heading, justify="left" if place < texts else "right")
    for arm in found.arms:
        table.add_row(*(cell.text for cell in cells(arm, found.metrics)))
    print_table(table)
    print(f"\n{found.answer}")
    print("± is half of the 95 % interval over the seeds; one seed has none. FLOPs are without the backward pass.")

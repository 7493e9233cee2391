"""`nestling reproduce`: an experiment of the papers, rerun here, with the papers' numbers beside ours."""

from __future__ import annotations

import difflib
import shlex
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nestling.config import RunConfig, pick
from nestling.jobs.arguments import AsJson
from nestling.jobs.output import (
    FAILED,
    INTERRUPTED,
    WRONG_USAGE,
    Stop,
    chatter_to,
    describe,
    in_columns,
    print_table,
    say,
    verb,
)
from nestling.jobs.progress import duration
from nestling.tracking.runs import RunFolder
from nestling.tuning.reproductions import NAMES, experiment

if TYPE_CHECKING:
    from nestling.tuning.reproductions.engine import Progress
    from nestling.tuning.reproductions.table import Row

KEYS = ("name", "seconds", "rows", "figure", "table", "run_dir")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="run.dir or tracking.uri.", show_default=False),
]


@verb(*KEYS)
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(NAMES)}.")],
    overrides: Overrides = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Trials of each arm.", show_default="the experiment's")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The paper's protocol and sizes: hours or days.")] = False,
    docs: Annotated[
        Path | None, typer.Option(help="Folder that gets table and figure as well, unless trials failed.")
    ] = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Rerun an experiment of the papers."""
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise Stop(f"{name}: no such experiment; did you mean {nearest}? There are {', '.join(NAMES)}", WRONG_USAGE)
    places = pick(overrides or (), "run.dir", "tracking.uri")
    plan = experiment(name, full)
    from nestling.tuning.reproductions.run import make_docs, make_folder
    from nestling.tuning.reproductions.run import reproduce as run_experiment

    docs = docs and docs.expanduser()
    try:
        if docs is not None:
            make_docs(docs)
    except OSError as error:
        raise Stop(
            f"--docs: cannot write in {docs}: {error}; give a folder that you may write in", WRONG_USAGE
        ) from error
    runs_dir = Path(places.get("run.dir", RunConfig().dir)).expanduser()
    try:
        folder = make_folder(runs_dir, plan.name)
    except OSError as error:
        raise Stop(f"run.dir: cannot make a folder in {runs_dir}: {error}", WRONG_USAGE) from error
    say(f"{plan.title}: {plan.source}\nin {folder.path}; Ray's output: {folder.ray_log}")
    try:
        with chatter_to(folder.ray_log):
            result = run_experiment(
                plan,
                folder,
                seeds=seeds or plan.seeds,
                uri=places.get("tracking.uri"),
                command=_command(name, seeds, full, docs),
                docs=docs,
                tell=_Progress(),
            )
    except KeyboardInterrupt as error:
        raise _stop(folder, name, "interrupted", INTERRUPTED) from error
    except Exception as error:
        with folder.ray_log.open("a") as file:
            traceback.print_exception(error, file=file)
        raise _stop(folder, name, describe(error), FAILED) from error
    known = {
        "name": name,
        "seconds": round(result.seconds, 1),
        "rows": result.rows,
        "figure": result.figure,
        "table": result.table,
        "run_dir": folder.path,
    }
    if not as_json:
        print_table(_table(result.rows))
        print(in_columns({"table": str(result.table), "figure": str(result.figure), "trials": str(folder.path)}))
    if result.failures:
        failed = "\n".join(f"{each.task}, {each.model}, seed {each.seed}: {each.error}" for each in result.failures)
        kept = f"\n{result.not_kept}" if result.not_kept else ""
        raise Stop(f"{len(result.failures)} trials failed:\n{failed}{kept}", FAILED, known)
    if result.not_kept:
        raise Stop(result.not_kept, FAILED, known)
    return known


class _Progress:
    """A line for each trial that ended, with the time that the rest will take at this pace."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        from nestling.tuning.reproductions.engine import Failure
        from nestling.tuning.reproductions.table import number

        ended = progress.ended
        left = (time.monotonic() - self._began) / progress.done * (progress.total - progress.done)
        what = ", ".join(filter(None, (ended.task, ended.model, ended.candidate)))
        if isinstance(ended, Failure):
            found, style = f"failed: {ended.error}", "red"
        else:
            metrics = ", ".join(f"{key} {number(value)}" for key, value in list(ended.outcome.metrics.items())[:4])
            found, style = f"{metrics} ({duration(ended.seconds)})", None
        rest = f"; about {duration(left)} left" if progress.done < progress.total else ""
        say(f"{progress.done}/{progress.total}  {what}, seed {ended.seed}: {found}{rest}", style)


def _stop(folder: RunFolder, name: str, how: str, code: int) -> Stop:
    """The end of a reproduction without a table, also one that ended before its first trial."""
    if folder.status() in ("running", "stopped"):
        folder.update(status="interrupted" if code == INTERRUPTED else "failed")
    trials = folder.path / "trials.jsonl"
    ended = len(trials.read_text(encoding="utf-8").splitlines()) if trials.exists() else 0
    return Stop(f"{how}; {ended} trials that ended are in {trials}", code, {"name": name, "run_dir": folder.path})


def _command(name: str, seeds: int | None, full: bool, docs: Path | None) -> str:
    """What makes the same table at the same place."""
    options = [*(["--seeds", str(seeds)] if seeds else []), *["--full"] * full]
    return shlex.join(["nestling", "reproduce", name, *options, *(["--docs", str(docs)] if docs else [])])


def _table(rows: list[Row]) -> Table:
    from nestling.tuning.reproductions.table import HEADINGS, cells

    table = Table(box=None, pad_edge=False)
    for key, heading in HEADINGS.items():
        table.add_column(heading, justify="left" if key in ("task", "model", "metric") else "right")
    for row in rows:
        table.add_row(*(cells(row)[key] for key in HEADINGS))
    return table

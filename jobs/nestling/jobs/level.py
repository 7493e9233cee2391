"""`nestling level`: a run gets one more level, or a level moves at another period, while it runs or while it rests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestling.jobs.arguments import AsJson, Run, RunDir, found_run
from nestling.jobs.output import WRONG_USAGE, Stop, in_columns, verb
from nestling.tracking.runs import RunBusyError, RunFolder

if TYPE_CHECKING:
    from nestling.training.changes import LevelChange

level = typer.Typer(
    name="level",
    help="Add a level to a run, or change how often one moves; nothing else of it changes.",
    no_args_is_help=True,
)

KEYS = ("run_id", "level", "period", "unit", "width", "taken_up")


@level.command("add")
@verb(*KEYS)
def add(
    reference: Run,
    period: Annotated[int, typer.Option(min=1, help="Optimizer steps from one move of the level to the next.")],
    width: Annotated[int, typer.Option(min=1, help="Hidden width of the level's MLP in each block.")],
    overrides: RunDir = None,
    name: Annotated[str | None, typer.Option(help="Its name; by default level1, level2, ..., what is free.")] = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Add a level that changes no logit at first: now, or at the next snapshot of a stream that is running."""
    folder = found_run(reference, overrides)
    from nestling.training.changes import LevelChange, free_name  # torch takes seconds

    return _change(folder, LevelChange(name or free_name(folder), period, width), "steps", as_json)


@level.command("period")
@verb(*KEYS, "period_before")
def period(
    reference: Run,
    called: Annotated[str, typer.Argument(metavar="LEVEL", help="Its name, or its number: 1 is the fastest.")],
    period: Annotated[int, typer.Argument(min=1, metavar="P", help="Steps or tokens, whichever its unit is.")],
    overrides: RunDir = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Let a level move at another period: from now on, or from the next snapshot of a stream that is running."""
    folder = found_run(reference, overrides)
    from nestling.training.changes import LevelChange, level_called

    found = level_called(folder, called)
    result = _change(folder, LevelChange(str(found.name), period), found.unit, as_json)
    return {**result, "width": found.width, "period_before": found.period}


def _change(folder: RunFolder, change: LevelChange, unit: str, as_json: bool) -> dict[str, Any]:
    from nestling.training.changes import change_levels

    try:
        taken_up = change_levels(folder, change)
    except RunBusyError as error:
        raise Stop(str(error), WRONG_USAGE) from error
    if not as_json:
        when = "from now on" if taken_up else "from the next snapshot on (nestling status tells when)"
        print(in_columns({"level": f"{change.level} of run {folder.run_id}, every {change.period} {unit} {when}"}))
    return {
        "run_id": folder.run_id,
        "level": change.level,
        "period": change.period,
        "unit": unit,
        "width": change.width,
        "taken_up": taken_up,
    }

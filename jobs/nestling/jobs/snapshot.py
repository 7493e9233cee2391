"""`nestling snapshot`: what a run could go on from, what of it is kept for good, and the way back to one of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from nestling.jobs.arguments import AsJson, Run, RunDir, found_run, place_of
from nestling.jobs.output import FAILED, WRONG_USAGE, Stop, in_columns, print_table, say, verb
from nestling.tracking.runs import RunBusyError

snapshot = typer.Typer(
    name="snapshot", help="List the snapshots of a run, keep one for good, or go back to one.", no_args_is_help=True
)


@snapshot.command("list")
@verb("run_id", "snapshots", "damaged")
def list_(reference: Run, overrides: RunDir = None, as_json: AsJson = False) -> dict[str, Any]:
    """Show every snapshot of a run, newest first, and whether all of it is as it was written."""
    folder = found_run(reference, overrides)
    from nestling.training.snapshots import snapshots  # torch takes seconds

    found, damaged = snapshots(folder)
    if not as_json:
        if found:
            print_table(_table([asdict(each) for each in found]))
        else:
            say(f"run {folder.run_id} ({folder.name}) has no snapshot yet")
        for text in (*(str(each.problem) for each in found if not each.good), *damaged):
            say(text, style="red")
    return {"run_id": folder.run_id, "snapshots": [asdict(each) for each in found], "damaged": damaged}


@snapshot.command("pin")
@verb("run_id", "step", "pinned", "checkpoint")
def pin(
    reference: Run,
    overrides: RunDir = None,
    step: Annotated[int | None, typer.Option(help="Step of the snapshot; by default the newest.")] = None,
    off: Annotated[bool, typer.Option("--off", help="Let go of it again.")] = False,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Keep a snapshot for good, whatever checkpoint.keep says; the run may go on meanwhile."""
    folder = found_run(reference, overrides)
    from nestling.training import snapshots

    checkpoint = snapshots.pin(folder, step, on=not off)
    if not as_json:
        print(f"step {checkpoint.step} of run {folder.run_id} is {'no longer pinned' if off else 'pinned'}")
    return {"run_id": folder.run_id, "step": checkpoint.step, "pinned": not off, "checkpoint": checkpoint.name}


@snapshot.command("restore")
@verb("run_id", "step", "window", "checkpoint", "set_aside")
def restore(
    reference: Run,
    step: Annotated[int, typer.Option(help="Step of the snapshot; nestling snapshot list shows them.")],
    overrides: RunDir = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Go back to a snapshot: the run goes on from it, and newer ones are set aside."""
    folder = found_run(reference, overrides)
    from nestling.checkpoint import CheckpointError
    from nestling.training import snapshots

    try:
        result = snapshots.restore(folder, step)
    except RunBusyError as error:
        raise Stop(str(error), WRONG_USAGE) from error
    except CheckpointError as error:
        raise Stop(str(error), FAILED) from error
    if not as_json:
        aside = ", ".join(map(str, result["set_aside"])) or "none"
        again = "stream --resume" if folder.is_stream else "resume"
        lines = {
            "snapshot": result["checkpoint"],
            "set aside": f"steps {aside}",
            "go on": f"nestling {again} {folder.run_id}{place_of(folder)}",
        }
        print(in_columns(lines))
    return {"run_id": folder.run_id, **result}


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "window", "size", "held-out loss"):
        table.add_column(heading, justify="right")
    for heading in ("saved", "", "went on from"):
        table.add_column(heading)
    for each in found:
        marks = ["good" if each["good"] else "damaged"] + ["pinned"] * each["pinned"]
        lineage = [entry["from"] for entry in each["lineage"] or () if "from" in entry]
        table.add_row(
            f"{each['step']:,}",
            "" if each["window"] is None else f"{each['window']:,}",
            f"{each['bytes'] / 2**20:,.1f} MiB",
            "" if each["metric"] is None else f"{each['metric']:.3f}",
            each["created"],
            ", ".join(marks),
            ", ".join(dict.fromkeys(lineage)),
        )
    return table

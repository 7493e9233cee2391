"""`nestling runs`: the runs in run.dir, the newest last."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from nestling.jobs.arguments import AsJson, RunDir, runs_dir
from nestling.jobs.output import print_table, say, verb
from nestling.tracking.runs import list_runs

KEYS = ("run_id", "name", "status", "steps", "tokens", "heldout_bits_per_byte")


@verb("runs")
def runs(
    overrides: RunDir = None,
    trials: Annotated[bool, typer.Option("--trials", help="Also the trials of sweeps.")] = False,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """List the runs, the newest last."""
    folder = runs_dir(overrides)
    everything = [run.reached() for run in list_runs(folder)]
    shown = [info for info in everything if trials or "sweep" not in info]
    found = [{key: info.get(key) for key in KEYS} for info in shown]
    if not as_json:
        if found:
            print_table(_table(found))
        else:
            say(f"no runs in {folder.resolve()}; nestling train quickstart makes one")
        if hidden := len(everything) - len(shown):
            say(f"{hidden} trials of sweeps are left out; --trials shows them")
    return {"runs": found}


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "name", "status"):
        table.add_column(heading)
    for heading in ("steps", "tokens", "held-out bits per byte"):
        table.add_column(heading, justify="right")
    for run in found:
        steps, tokens = (f"{run[key]:,}" if run[key] is not None else "" for key in ("steps", "tokens"))
        bits = run["heldout_bits_per_byte"]
        row = (run["run_id"], run["name"], run["status"], steps, tokens, f"{bits:.3f}" if bits is not None else "")
        table.add_row(*row)
    return table

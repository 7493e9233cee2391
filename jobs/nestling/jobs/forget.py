"""`nestling forget`: undo what `nestling learn --fast` has read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nestling.jobs.arguments import AsJson, Run, RunDir, found_run
from nestling.jobs.output import WRONG_USAGE, Stop, verb


@verb("run_id", "forgotten")
def forget(
    run: Run,
    overrides: RunDir = None,
    fast: Annotated[bool, typer.Option("--fast", help="The fast state.")] = False,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Remove the fast state of a run: the model is as it was before `nestling learn --fast`, to the bit."""
    folder = found_run(run, overrides)
    if not fast:
        raise Stop(
            "needs --fast: what optimizer steps have taught a model stays; a snapshot from before is the way back",
            WRONG_USAGE,
        )
    from nestling.checkpoint.fast import forget_fast_state

    forgotten = forget_fast_state(folder)
    if forgotten:
        folder.event("forgotten", "the fast state was removed")
    if not as_json:
        print("the fast state is gone" if forgotten else f"run {folder.run_id} ({folder.name}) has no fast state")
    return {"run_id": folder.run_id, "forgotten": forgotten}

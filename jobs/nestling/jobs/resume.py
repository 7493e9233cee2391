"""`nestling resume`: go on with a run that was stopped, killed or interrupted, from its newest good checkpoint."""

from __future__ import annotations

from typing import Any

from nestling.jobs.arguments import AsJson, Overrides, Run, found_run
from nestling.jobs.output import WRONG_USAGE, Stop, verb
from nestling.jobs.train import KEYS, run


@verb(*KEYS)
def resume(reference: Run, overrides: Overrides = None, as_json: AsJson = False) -> dict[str, Any]:
    """Go on with a run where its newest checkpoint left it; finished ones with more training.steps."""
    given = overrides or []
    places = [override for override in given if override.startswith("run.dir=")]
    folder = found_run(reference, places)
    if folder.is_stream:
        raise Stop(f"run {folder.run_id} is a stream: nestling stream --resume {folder.run_id}", WRONG_USAGE)
    from nestling.training.resume import resumed_job  # torch takes seconds

    config = resumed_job(folder, [override for override in given if override not in places])
    return run(config, folder, as_json)

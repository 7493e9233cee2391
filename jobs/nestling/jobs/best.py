"""`nestling best`: the winning configuration of a sweep, as a job file."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from omegaconf import OmegaConf

from nestling.jobs.arguments import AsJson, RunDir
from nestling.jobs.output import FAILED, Stop, say, verb
from nestling.jobs.sweep import found_sweep


@verb("sweep", "arm", "answer", "job")
def best(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A sweep: its id, its name or 'latest'.")],
    overrides: RunDir = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Print the best configuration of a sweep as a job file: nestling best NAME > best.yaml."""
    folder = found_sweep(name, overrides or [])
    from nestling.tuning.sweeps.plan import best_job
    from nestling.tuning.sweeps.report import report

    info = folder.info()
    arm, answer = info.get("best"), info.get("answer")
    if arm is None:  # it has not come to its end
        found = report(folder, folder.path.parent.parent)
        arm, answer = found.best, found.answer
    if arm is None:
        raise Stop(f"sweep {folder.run_id} ({folder.name}): {answer}, so there is no best one", FAILED)
    job = best_job(folder, arm)
    say(answer or "")
    if not as_json:
        print(f"# The best arm of the sweep {folder.name} ({folder.run_id}): {arm}")
        print(f"# {answer}")
        print(OmegaConf.to_yaml(OmegaConf.create(job)), end="")
    return {"sweep": folder.run_id, "arm": arm, "answer": answer, "job": job}

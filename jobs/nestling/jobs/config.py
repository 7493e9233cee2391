"""`nestling config`: the configuration that a job file and overrides come to, without running it."""

from __future__ import annotations

from typing import Any

from nestling.config import load, to_mapping, to_yaml
from nestling.jobs.arguments import AsJson, Job, Overrides
from nestling.jobs.output import verb


@verb()
def config(job: Job, overrides: Overrides = None, as_json: AsJson = False) -> dict[str, Any]:
    """Check a job and print its whole configuration as YAML."""
    resolved = load(job, overrides or ())
    if not as_json:
        print(to_yaml(resolved), end="")
    return to_mapping(resolved)

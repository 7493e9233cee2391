"""Verbs in this process, and so in the Ray that the tests share: half the work of a process and a Ray of their own.

For runs that a test does nothing to; signals, and what the terminal shows while a run goes on, need a process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from nestling.jobs.app import app


def nestling(runs: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and what was said of a verb that keeps its runs in `runs`."""
    import ray.data  # noqa: F401  # its log goes on to the stderr that it finds here, and that of CliRunner is closed

    environment = {"NESTLING_RUNS": str(runs), "MLFLOW_TRACKING_URI": None}
    ended = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
    return ended.exit_code, json.loads(ended.stdout.splitlines()[-1]), ended.stderr


def result(runs: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of a verb that must end well."""
    code, found, said = nestling(runs, *arguments)
    assert code == 0, said
    return found

"""`nestling ui`: MLflow's pages over the runs, served from this machine until Ctrl-C.

Before that, what MLflow missed of runs that have ended is sent to it, so that the pages show it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.config import RunConfig, pick
from nestling.jobs.arguments import AsJson, Overrides
from nestling.jobs.output import FAILED, WRONG_USAGE, Stop, say, verb
from nestling.tracking.client import resolve_uri, shown
from nestling.tracking.lifecycle import deliver


@verb("address", "tracking_uri")
def ui(
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Show the runs of run.dir (or of tracking.uri) in MLflow."""
    given = pick(overrides or (), "run.dir", "tracking.uri")
    runs_dir = given.get("run.dir", RunConfig().dir)
    uri = resolve_uri(given.get("tracking.uri"), runs_dir)
    if uri.startswith(("http:", "https:")):
        _deliver(runs_dir)
        say(f"runs are tracked by a server of its own: {shown(uri)}")
        return {"address": uri, "tracking_uri": uri}
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():
        raise Stop(f"{database} does not exist: nothing is tracked there yet; nestling train quickstart", WRONG_USAGE)
    _check_port(host, port)
    _deliver(runs_dir)
    address = f"http://{host}:{port}"
    say(f"{address}  (Ctrl-C to stop)")
    _serve(uri, host, port)
    return {"address": address, "tracking_uri": uri}


def _deliver(runs_dir: str) -> None:
    for run_id, arrived in deliver(runs_dir).items():
        say(
            f"run {run_id}: MLflow has everything now"
            if arrived
            else f"run {run_id}: MLflow does not take yet what it missed; the next run or nestling ui tries again"
        )


def _check_port(host: str, port: int) -> None:
    """MLflow itself would say on many lines that it cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        fix = f"choose another --port, for example {port % 65535 + 1}, or --host"
        raise Stop(f"--port: cannot listen on {host}:{port} ({error.strerror}); {fix}", WRONG_USAGE) from error


def _serve(uri: str, host: str, port: int) -> None:
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    # MLflow's job runner (seven processes) serves features that a training run does not use.
    defaults = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen([*command, "--workers", "1"], env=defaults | dict(os.environ))
    try:
        code = server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return
    if code:
        raise Stop(f"MLflow ended with code {code}", FAILED)

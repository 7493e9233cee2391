"""The way to MLflow: which address, and a client that is quiet and gives up soon.

MLflow retries a failing request for minutes, prints database migrations and reports its use to its makers. A training
run wants none of that: requests end within seconds (our own sender tries again later), only warnings are printed, and
nobody but the tracking server is called. Each of these is an environment variable of MLflow's that a user can set.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.config import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class TrackingError(RuntimeError):
    """MLflow cannot be used as configured; the message is complete and ready to print."""


def resolve_uri(uri: str | None, runs_dir: str | Path) -> str:
    """The tracking URI of a run.

    Args:
        uri: `tracking.uri` of the configuration; None leaves it to MLFLOW_TRACKING_URI and then to our own database.
        runs_dir: where runs are kept; the default database is `mlflow.db` in it.

    Returns:
        A URI that means the same in every process: a relative sqlite path is made absolute, because Ray's workers
        run in a folder of their own.

    Raises:
        ConfigError: the default database cannot be named by a URI.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        database = Path(runs_dir).expanduser().resolve() / "mlflow.db"
        if "?" in str(database):  # there the options of a sqlite URI begin, and nothing can escape it
            raise ConfigError(
                f"run.dir: {database.parent} has a '?' in it, which MLflow's database cannot have in its path; "
                "choose another run.dir, or a tracking.uri"
            )
        return f"sqlite:///{database}"
    relative = re.fullmatch(r"sqlite:///([^/:].*)", chosen)
    return f"sqlite:///{Path(relative[1]).resolve()}" if relative else chosen


def shown(text: str) -> str:
    """A URI, or a message with URIs in it, as it may be printed: without passwords."""
    return re.sub(r"(://[^/@:\s]*):[^/@\s]*@", r"\1:***@", text)


def reason(error: BaseException) -> str:
    """Why MLflow did not do it, on one line: its own errors bring SQL and a stack of frames."""
    lines = shown(str(error)).strip().splitlines()
    lines = [line for line in lines if "raised as a result of Query-invoked autoflush" not in line]  # before the cause
    return (lines or [type(error).__name__])[0][:300].rstrip(".")


def connect(uri: str) -> MlflowClient:
    """A client for `uri`; nothing is sent yet, so an unreachable server shows only at the first request."""
    for variable, value in _DEFAULTS.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@contextmanager
def first_use(uri: str) -> Iterator[None]:
    """Let one process at a time make a sqlite database and its experiments: MLflow's migrations disturb each other.

    A new database is made beside its place and put there whole: one whose migration was cut short is of no more use.
    """
    database = re.fullmatch(r"sqlite:///(.+)", uri)
    if database is None:
        yield
        return
    path = Path(f"{database[1]}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        database_file = Path(database[1])
        if not database_file.exists():
            draft = database_file.with_name(f".{database_file.name}.draft")
            draft.unlink(missing_ok=True)
            connect(f"sqlite:///{draft}").search_experiments(max_results=1)
            draft.replace(database_file)
        yield


def present_uri(recorded: str, runs_dir: Path) -> str:
    """Where a run is recorded now: a runs folder that was moved as a whole has taken its database along."""
    database = re.fullmatch(r"sqlite:///(.+)/mlflow\.db", recorded)
    moved = runs_dir / "mlflow.db"
    if database and moved.exists() and not Path(database[1], "mlflow.db").exists():
        return f"sqlite:///{moved}"
    return recorded

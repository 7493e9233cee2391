"""The beginning and the end of a run in MLflow, both the driver's.

A run folder has one MLflow run, whose id is in its `run.json`; a resumed run continues that one. A new run needs
MLflow to answer, so that a wrong address is noticed at once. From then on MLflow may be away: what it missed is noted
in the folder, and every later start in the same runs folder clears up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.tracking.client import TrackingError, connect, first_use, present_uri, reason, resolve_uri, shown
from nestling.tracking.courier import (
    deliver_rest,
    forget_end,
    forget_resumed,
    has_end,
    has_mail,
    note_end,
    note_resumed,
)
from nestling.tracking.files import Locked
from nestling.tracking.parameters import flatten, log_parameters, resume_run
from nestling.tracking.runs import RunFolder, list_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_FINISH_PATIENCE = 15.0  # seconds
_DELIVERY_PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class TrackedRun:
    """Where the run is in MLflow; small and picklable, so that it can travel to a worker."""

    uri: str
    mlflow_run_id: str
    experiment_id: str


def start(
    config: Mapping[str, Any], folder: RunFolder, uri: str | None, experiment: str, runs_dir: Path | None = None
) -> TrackedRun:
    """Make the MLflow run of a training that is about to begin, or go on with the one that `run.json` names.

    Args:
        config: the resolved configuration as plain mappings; recorded as parameters with dotted names.
        folder: the run's folder; `tracked` in its `run.json` may hold further `tags` and `parameters` of a new run.
        uri: `tracking.uri`; None means the default of a new run (see `resolve_uri`), or where a resumed one was.
        experiment: name of the MLflow experiment, made when it does not exist; a resumed run stays in its own.
        runs_dir: where the default database is; None for the folder that holds the run's.

    Raises:
        TrackingError: MLflow does not answer within seconds and the run is new to it, or it refuses.
    """
    known = folder.info()
    runs_dir = runs_dir or folder.path.parent
    if "mlflow_run_id" in known:
        run = _resume(config, folder, uri, known, runs_dir)
    else:
        run = _begin(config, folder, uri, experiment, runs_dir)
    folder.update(tracking_uri=run.uri, mlflow_run_id=run.mlflow_run_id, mlflow_experiment_id=run.experiment_id)
    threading.Thread(
        target=deliver,
        args=(folder.path.parent,),
        kwargs={"besides": folder},
        name="nestling-delivery",
        daemon=True,
    ).start()
    return run


def finish(run: TrackedRun, folder: RunFolder, status: str, figure: Path | None = None) -> None:
    """End the MLflow run: artifacts, the final weights as a logged model by reference, and the status.

    MLflow away at the end does not spoil a finished training: a warning says so, and the end is delivered later.

    Args:
        run: what `start` returned.
        folder: the run's folder.
        status: `finished`, `failed` or `interrupted`.
        figure: a picture of the curves, if there is one.
    """
    note_end(folder, _STATUS[status], time.time(), [folder.config, *([figure] if figure is not None else [])])
    try:
        if deliver_rest(folder, run.uri, run.mlflow_run_id, _FINISH_PATIENCE):
            return
        cause = "it was too slow"
    except Locked as busy:
        cause = f"{busy} is still sending"
    except Exception as error:  # MLflow raises its own errors, SQLAlchemy's, urllib's and plain ones
        cause = reason(error)
    log.warning(
        "MLflow at %s did not take the end of the run (%s); everything is in %s, and the next run in that runs folder, "
        "nestling resume %s or nestling ui will send it",
        shown(run.uri),
        cause,
        folder.path,
        folder.run_id,
    )


def deliver(runs_dir: str | Path, besides: RunFolder | None = None) -> dict[str, bool]:
    """Send what the runs in a folder could not send, for some seconds; runs that are being trained do so themselves.

    A run whose driver was killed is ended in MLflow, too.

    Args:
        runs_dir: where the runs are.
        besides: a run to leave out.

    Returns:
        For the id of each run that had something to send, whether all of it arrived.
    """
    end = time.monotonic() + _DELIVERY_PATIENCE
    arrived: dict[str, bool] = {}
    for folder in list_runs(runs_dir):
        if folder == besides:
            continue
        try:
            if _has_ended_with_mail(folder):
                arrived[folder.run_id] = False
                info, seconds = folder.info(), end - time.monotonic()
                if seconds > 0:
                    arrived[folder.run_id] = deliver_rest(
                        folder, present_uri(info["tracking_uri"], folder.path.parent), info["mlflow_run_id"], seconds
                    )
        except Exception:  # as in `finish`, or another user's folder; the next delivery tries again
            log.debug("MLflow does not take what run %s left", folder.run_id, exc_info=True)
    return arrived


def _has_ended_with_mail(folder: RunFolder) -> bool:
    """Whether the run is not being trained and MLflow missed something of it, be it only its end."""
    info = folder.info()
    if "mlflow_experiment_id" not in info or folder.claimed:  # the key of a run that has an outbox
        return False
    if not has_end(folder):  # its driver was killed
        last = folder.log if folder.log.exists() else folder.path
        note_end(folder, _STATUS.get(info["status"], "KILLED"), last.stat().st_mtime, [folder.config])
    return has_mail(folder)


def _begin(
    config: Mapping[str, Any], folder: RunFolder, uri: str | None, experiment: str, runs_dir: Path
) -> TrackedRun:
    uri = resolve_uri(uri, runs_dir)
    try:
        with first_use(uri):
            client = connect(uri)
            experiment_id = _experiment(client, experiment, uri, runs_dir / "mlartifacts")
        tags = {
            "nestling.run_id": folder.run_id,
            "nestling.run_dir": str(folder.path),
            "mlflow.source.name": "nestling",
        }
        more = folder.info().get("tracked", {})
        run = client.create_run(experiment_id, run_name=folder.path.name, tags=tags | more.get("tags", {}))
        log_parameters(client, run.info.run_id, flatten(config) | more.get("parameters", {}))
    except Exception as error:  # as in `finish`
        if isinstance(error, TrackingError):
            raise
        raise _unusable(uri, runs_dir, error) from error
    return TrackedRun(uri, run.info.run_id, experiment_id)


def _resume(
    config: Mapping[str, Any], folder: RunFolder, uri: str | None, known: Mapping[str, Any], runs_dir: Path
) -> TrackedRun:
    known = dict(known) | {"tracking_uri": present_uri(known["tracking_uri"], runs_dir)}
    uri = resolve_uri(uri, runs_dir) if uri else known["tracking_uri"]
    run = TrackedRun(uri, known["mlflow_run_id"], known["mlflow_experiment_id"])
    parameters = flatten(config)
    forget_end(folder)
    try:
        client = connect(uri)
        stage = client.get_run(run.mlflow_run_id).info.lifecycle_stage
        if stage == "active":
            resume_run(client, run.mlflow_run_id, parameters)
            forget_resumed(folder)
    except Exception as error:  # as in `finish`
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            raise TrackingError(
                f"MLflow at {shown(uri)} does not have the run {run.mlflow_run_id} that run {folder.run_id} was "
                f"recorded in; it was at {shown(known['tracking_uri'])}: correct tracking.uri"
            ) from error
        if uri != known["tracking_uri"]:
            raise _unusable(uri, runs_dir, error) from error
        note_resumed(folder, parameters)
        log.warning("MLflow at %s is away (%s); the run goes on and all is sent later", shown(uri), reason(error))
        return run
    if stage != "active":
        raise TrackingError(
            f"MLflow at {shown(uri)}: the run {run.mlflow_run_id} was deleted there; restore it "
            f"(mlflow runs restore --run-id {run.mlflow_run_id}) or train a new one"
        )
    return run


def _unusable(uri: str, runs_dir: Path, error: Exception) -> TrackingError:
    return TrackingError(
        f"MLflow at {shown(uri)} cannot be used: {reason(error)}. Start that server or correct "
        "tracking.uri (or MLFLOW_TRACKING_URI); with neither, the run is tracked in "
        f"{runs_dir / 'mlflow.db'}"
    )


def _experiment(client: MlflowClient, name: str, uri: str, artifacts: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Without a server MLflow would put artifacts into the working directory of whoever comes first.
        served = uri.startswith(("http:", "https:", "databricks"))
        return client.create_experiment(name, artifact_location=None if served else str(artifacts))
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow at {shown(uri)}: the experiment {name!r} was deleted there; choose another with "
            f"tracking.experiment=NAME or restore it (mlflow experiments restore -x {found.experiment_id})"
        )
    return found.experiment_id

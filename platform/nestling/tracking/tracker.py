"""The MLflow run of a training: started and finished by the driver, fed by rank 0.

The driver makes the MLflow run, so that a restarted worker goes on in the same one. `log.jsonl` in the run's folder is
written first and is complete; MLflow gets a copy from a background thread (`sender`) and can be slow or away without
the training noticing. The final weights become a logged model that points at the run's folder: no bytes are copied.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.tracking.client import TrackingError, connect, first_use, resolve_uri, shown
from nestling.tracking.runs import RunFolder
from nestling.tracking.sender import Sender

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_VALUE_LIMIT = 6000  # characters of a parameter's value
_PARAMETERS_LIMIT = 100  # parameters in one request
_CLOSE_PATIENCE = 15.0  # seconds


@dataclass(frozen=True)
class TrackedRun:
    """Where the run is in MLflow; small and picklable, so that it can travel to a worker."""

    uri: str
    mlflow_run_id: str
    experiment_id: str


def start(config: Mapping[str, Any], folder: RunFolder, uri: str | None, experiment: str) -> TrackedRun:
    """Make the MLflow run of a training that is about to begin, and note it in the folder's `run.json`.

    Args:
        config: the resolved configuration as plain mappings; recorded as parameters with dotted names.
        folder: the run's folder.
        uri: `tracking.uri`, None for the default (see `resolve_uri`).
        experiment: name of the MLflow experiment, made when it does not exist.

    Raises:
        TrackingError: MLflow does not answer within seconds, or refuses.
    """
    uri = resolve_uri(uri, folder.path.parent)
    try:
        with first_use(uri):
            client = connect(uri)
            experiment_id = _experiment(client, experiment, uri, folder.path.parent / "mlartifacts")
        tags = {
            "nestling.run_id": folder.run_id,
            "nestling.run_dir": str(folder.path),
            "mlflow.source.name": "nestling",
        }
        run = client.create_run(experiment_id, run_name=folder.path.name, tags=tags)
        _log_parameters(client, run.info.run_id, flatten(config))
    except Exception as error:  # MLflow raises its own errors, SQLAlchemy's, urllib's and plain ones
        if isinstance(error, TrackingError):
            raise
        raise TrackingError(
            f"MLflow at {shown(uri)} cannot be used: {shown(str(error)).rstrip('.')}. Start that server or correct "
            "tracking.uri (or MLFLOW_TRACKING_URI); with neither, the run is tracked in "
            f"{folder.path.parent / 'mlflow.db'}"
        ) from error
    folder.update(tracking_uri=uri, mlflow_run_id=run.info.run_id)
    return TrackedRun(uri, run.info.run_id, experiment_id)


class Tracker:
    """Records the figures of a training; used by one process, rank 0.

    A step is recorded once: what a restarted worker replays has been recorded already and is left out.

    Args:
        uri: tracking URI, resolved.
        mlflow_run_id: the run made by `start`.
        log_path: `log.jsonl` of the run's folder; an existing file is continued.
    """

    def __init__(self, uri: str, mlflow_run_id: str, log_path: Path) -> None:
        self._recorded = _recorded_steps(log_path)
        self._file = log_path.open("a", encoding="utf-8")
        self._sender = Sender(uri, mlflow_run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the metrics of an optimizer step to `log.jsonl` and leave them to the sender, without waiting."""
        fresh = {key: float(value) for key, value in metrics.items() if step > self._recorded.get(key, -1)}
        if not fresh:
            return
        self._recorded.update(dict.fromkeys(fresh, step))
        self._file.write(json.dumps({"step": step, **fresh}) + "\n")
        self._file.flush()
        self._sender.put(fresh, step)

    def close(self) -> None:
        """Send what is left to MLflow, within seconds."""
        self._file.close()
        self._sender.close(_CLOSE_PATIENCE)


def finish(run: TrackedRun, folder: RunFolder, status: str, figure: Path | None = None) -> None:
    """End the MLflow run: artifacts, the final weights as a logged model by reference, and the status.

    MLflow away at the end does not spoil a finished training: a warning says so.

    Args:
        run: what `start` returned.
        folder: the run's folder.
        status: `finished`, `failed` or `interrupted`.
        figure: a picture of the curves, if there is one.
    """
    ended = _STATUS[status]
    try:
        client = connect(run.uri)
        for artifact in (folder.config, figure):
            if artifact is not None and artifact.exists():
                client.log_artifact(run.mlflow_run_id, str(artifact))
        if folder.weights.exists():
            _log_weights(client, run, folder)
        client.set_terminated(run.mlflow_run_id, ended)
    except Exception as error:  # as in `start`
        log.warning(
            "MLflow at %s did not take the end of the run (%s); everything is in %s",
            shown(run.uri),
            shown(str(error)),
            folder.path,
        )


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as MLflow parameters: `{"model": {"width": 8}, "levels": [{"period": 1}]}` gives
    `model.width` and `levels.0.period`; lists of plain values stay one JSON value."""
    flat: dict[str, str] = {}
    for key, value in mapping.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _log_parameters(client: MlflowClient, mlflow_run_id: str, parameters: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entries = [Param(key, value[:_VALUE_LIMIT]) for key, value in parameters.items()]
    for first in range(0, len(entries), _PARAMETERS_LIMIT):
        client.log_batch(mlflow_run_id, params=entries[first : first + _PARAMETERS_LIMIT])


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


def _log_weights(client: MlflowClient, run: TrackedRun, folder: RunFolder) -> None:
    import mlflow
    from mlflow.entities import LoggedModelOutput, Metric

    with _ambient(run.uri):
        model = mlflow.create_external_model(
            name=folder.path.name,
            source_run_id=run.mlflow_run_id,
            experiment_id=run.experiment_id,
            params={"path": folder.weights.as_uri()},
            tags={"nestling.run_id": folder.run_id},
            model_type="checkpoint",
        )
    results = []
    for key in ("heldout/loss", "heldout/bits_per_byte"):
        history = client.get_metric_history(run.mlflow_run_id, key)
        if history:
            # With its own time the value is the one that the run has already: there it is not recorded a second time.
            last = max(history, key=lambda metric: metric.step)
            results.append(Metric(key, last.value, last.timestamp, last.step, model_id=model.model_id))
    client.log_batch(run.mlflow_run_id, metrics=results)
    step = max((metric.step for metric in results), default=0)
    client.log_outputs(run.mlflow_run_id, [LoggedModelOutput(model.model_id, step)])


@contextmanager
def _ambient(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's global one, which `create_external_model` cannot do without, and put back what was there."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # back to the environment's, which this also removes
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _recorded_steps(log_path: Path) -> dict[str, int]:
    """The last step of each metric in an existing log; the half line that a killed process left is cut off."""
    if not log_path.exists():
        return {}
    content = log_path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(log_path, len(whole))
    recorded: dict[str, int] = {}
    for line in whole.decode("utf-8").splitlines():
        record = json.loads(line)
        recorded.update(dict.fromkeys(record, record["step"]))
    return recorded

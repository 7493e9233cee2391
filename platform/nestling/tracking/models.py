"""Checkpoints and final weights as logged models of MLflow that point at files: no bytes are copied.

Every operation may be repeated, because a sender that was killed does not know whether its last request arrived: a
model is looked up by its run, name and time before it is made, and finished where an earlier attempt stopped.
`mlflow.create_external_model` is not used: it makes a new model every time and needs a global tracking URI.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from nestling.tracking.outbox import Row

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

_MADE = "nestling.made"  # tag: when what the model points at was written, in milliseconds


def put_model(
    client: MlflowClient, run: Run, name: str, location: str, step: int, made: int, metrics: Mapping[str, Row]
) -> None:
    """Have one logged model `name` in the run that points at `location`; an older one of that name goes.

    Args:
        client: the way to MLflow.
        run: the run that the model comes from.
        name: unique in the run.
        location: URI of the files, the model's parameter `path`.
        step: optimizer step of the weights.
        made: when they were written, in milliseconds; tells a new model from a repeated request.
        metrics: rows of the run that describe the model. MLflow writes a model's metrics into its run as well, so a
            row that the run has already must be the same here.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    model = None
    for found in _models(client, run, name):
        if found.tags.get(_MADE) == str(made):
            model = found
        else:
            client.delete_logged_model(found.model_id)
    if model is None:
        model = client.create_logged_model(
            run.info.experiment_id,
            name=_allowed(name),
            source_run_id=run.info.run_id,
            tags={
                "nestling.run_id": run.data.tags["nestling.run_id"],
                _MADE: str(made),
                "mlflow.model.isExternal": "true",
            },
            params={"path": location, "step": str(step)},
            model_type="checkpoint",
        )
    if model.status != LoggedModelStatus.READY:
        _log_description(client, model)
        values = [Metric(key, row.value, row.time, row.step, model_id=model.model_id) for key, row in metrics.items()]
        client.log_batch(run.info.run_id, metrics=values)
        outputs = client.get_run(run.info.run_id).outputs
        if all(output.model_id != model.model_id for output in (outputs.model_outputs if outputs else ())):
            client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def drop_model(client: MlflowClient, run: Run, name: str) -> None:
    """Delete the logged model `name` of the run, if there is one."""
    for model in _models(client, run, name):
        client.delete_logged_model(model.model_id)


def _models(client: MlflowClient, run: Run, name: str) -> list[LoggedModel]:
    wanted = f"name = '{_allowed(name)}' AND source_run_id = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], filter_string=wanted))


def _log_description(client: MlflowClient, model: LoggedModel) -> None:
    """The small MLmodel file without which MLflow's model registry does not take a model."""
    from mlflow.models.utils import get_external_mlflow_model_spec

    with TemporaryDirectory() as place:
        get_external_mlflow_model_spec(model).save(str(Path(place) / "MLmodel"))
        client.log_model_artifacts(model.model_id, place)


def _allowed(name: str) -> str:
    return re.sub(r"[/:.%\"']", "_", name)

"""A job's configuration as parameters of its MLflow run.

MLflow does not let a parameter change. What a resumed run does differently is therefore shown as tags
`nestling.resumed.<key>` beside the parameters that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nestling.tracking.client import shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

_VALUE_LIMIT = 6000  # characters of a parameter's value
_REQUEST_LIMIT = 100  # parameters or tags in one request
_RESUMED = "nestling.resumed."


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
            flat[f"{prefix}{key}"] = shown(value) if isinstance(value, str) else json.dumps(value)
    return flat


def log_parameters(client: MlflowClient, mlflow_run_id: str, parameters: Mapping[str, str]) -> None:
    """Record the parameters of a run that has none of them."""
    from mlflow.entities import Param

    entries = [Param(key, value[:_VALUE_LIMIT]) for key, value in parameters.items()]
    for first in range(0, len(entries), _REQUEST_LIMIT):
        client.log_batch(mlflow_run_id, params=entries[first : first + _REQUEST_LIMIT])


def resume_run(client: MlflowClient, mlflow_run_id: str, parameters: Mapping[str, str]) -> None:
    """Make an ended run `RUNNING` again, with what is new in its parameters; may be repeated."""
    from mlflow.entities import RunTag

    client.update_run(mlflow_run_id, status="RUNNING")
    known = client.get_run(mlflow_run_id).data
    log_parameters(client, mlflow_run_id, {key: parameters[key] for key in parameters.keys() - known.params.keys()})
    changed = []
    for key, value in known.params.items():
        present = parameters.get(key, value)[:_VALUE_LIMIT]
        if present != known.tags.get(_RESUMED + key, value):
            changed.append(RunTag(_RESUMED + key, present))
    for first in range(0, len(changed), _REQUEST_LIMIT):
        client.log_batch(mlflow_run_id, tags=changed[first : first + _REQUEST_LIMIT])

"""A run's events in MLflow: the artifact `events.json`, a table for `mlflow.load_table` and MLflow's page of the run.

It is made from `events.jsonl`, the whole of it each time, so delivering it twice changes nothing and what could not be
delivered is in the next one. Snapshots and skipped steps, which come all the time, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACT = "events.json"
KINDS = ("drift", "rolled-back", "lanes-anew", "resumed", "failed", "damaged", "save-failed")
#: Events in the table: the last ones.
LIMIT = 1000

_COLUMNS = ("time", "kind", "step", "window", "message")
_TAG, _TABLE = "mlflow.loggedArtifacts", {"path": ARTIFACT, "type": "table"}  # how MLflow knows its tables


class EventTable:
    """The table of one run.

    Args:
        events: `events.jsonl`, which only grows.
    """

    def __init__(self, events: Path) -> None:
        self._events, self._read = events, 0
        self._rows: dict[tuple[Any, ...], list[Any]] = {}
        self._changed = False

    def deliver(self, client: MlflowClient, mlflow_run_id: str) -> None:
        """Put the table, if there is something new for it; raises whatever MLflow raises."""
        for event in self._news():
            if event["kind"] in KINDS:
                # What happened to a window happens to it again after a crash, and is the same event.
                key = (event["kind"], event.get("step"), event.get("window", event["time"]))
                self._rows[key] = [event.get(column) for column in _COLUMNS]
                self._changed = True
        while len(self._rows) > LIMIT:
            del self._rows[next(iter(self._rows))]
        if not self._changed:
            return
        client.log_dict(mlflow_run_id, {"columns": list(_COLUMNS), "data": list(self._rows.values())}, ARTIFACT)
        tables = json.loads(client.get_run(mlflow_run_id).data.tags.get(_TAG, "[]"))
        if _TABLE not in tables:
            client.set_tag(mlflow_run_id, _TAG, json.dumps([*tables, _TABLE]))
        self._changed = False

    def _news(self) -> Iterator[dict[str, Any]]:
        """The events since the last look."""
        if not self._events.exists():
            return
        with self._events.open("rb") as file:
            file.seek(self._read)
            while (line := file.readline()).endswith(b"\n"):
                self._read += len(line)
                yield json.loads(line)

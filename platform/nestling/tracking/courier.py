"""Takes what waits for MLflow there: a run's resumption, then its outbox in order, its events, and its end.

Whatever fails is raised and stays where it was, so that the next attempt begins with it; everything may be delivered
twice. The same code serves the sender beside a training, the end of a run, and later runs that clear up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.tracking.client import connect
from nestling.tracking.event_table import EventTable
from nestling.tracking.files import read_json, replace_json
from nestling.tracking.models import drop_model, put_model
from nestling.tracking.outbox import Entry, Outbox, Row, is_waiting
from nestling.tracking.parameters import resume_run
from nestling.tracking.runs import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

#: What the weights of a finished run are compared by.
_FINAL_METRICS = ("heldout/loss", "heldout/bits_per_byte")

_BATCH = 1000  # MLflow's limit of metrics in one request
_SMALLEST_BATCH = 25


def note_resumed(folder: RunFolder, parameters: Mapping[str, str]) -> None:
    """Leave for a courier that the run goes on, with these parameters."""
    folder.mlflow.mkdir(exist_ok=True)
    replace_json(_begin(folder), {"parameters": dict(parameters)})


def forget_resumed(folder: RunFolder) -> None:
    """MLflow knows that the run goes on."""
    _begin(folder).unlink(missing_ok=True)


def note_end(folder: RunFolder, status: str, ended: float, artifacts: list[Path]) -> None:
    """Leave for a courier that the run ended, at `ended` seconds since the epoch, with MLflow's word for how."""
    folder.mlflow.mkdir(exist_ok=True)
    paths = [str(path) for path in artifacts]
    replace_json(_end(folder), {"status": status, "time": int(ended * 1000), "artifacts": paths, "delivered": False})


def forget_end(folder: RunFolder) -> None:
    """The run goes on: its end is no longer true."""
    _end(folder).unlink(missing_ok=True)


def has_end(folder: RunFolder) -> bool:
    """Whether an end of the run was noted, delivered or not."""
    return _end(folder).exists()


def has_mail(folder: RunFolder) -> bool:
    """Whether anything of the run is not in MLflow yet."""
    end = read_json(_end(folder))
    return is_waiting(folder.mlflow) or _begin(folder).exists() or (bool(end) and not end["delivered"])


class Courier:
    """Delivers for the run in `folder`, whose outbox it is given."""

    def __init__(self, folder: RunFolder, uri: str, mlflow_run_id: str, outbox: Outbox) -> None:
        self._uri = uri
        self._run_id = mlflow_run_id
        self._folder = folder
        self._outbox = outbox
        self._events = EventTable(folder.events)
        self._batch = _BATCH

    def deliver(self, go_on: Callable[[], bool]) -> None:
        """Deliver all but the end, as long as `go_on` says so; raises whatever MLflow raises."""
        begin = _begin(self._folder)
        if begin.exists():
            resume_run(self._client, self._run_id, read_json(begin).get("parameters", {}))
            forget_resumed(self._folder)
        while go_on():
            entries, end = self._outbox.next(self._batch)
            if not entries:
                break
            try:
                rows = self._hand_over(entries)
            except Exception:
                self._batch = max(_SMALLEST_BATCH, self._batch // 2)  # a slow server may manage a smaller one in time
                raise
            self._batch = min(_BATCH, self._batch * 2)
            self._outbox.done(end, rows)
        if go_on():
            self._events.deliver(self._client, self._run_id)

    def deliver_end(self) -> None:
        """Deliver the end that `note_end` left, if any: artifacts, the final weights as a logged model, the status."""
        end: dict[str, Any] = read_json(_end(self._folder))
        if not end or end["delivered"]:
            return
        for artifact in map(Path, end["artifacts"]):
            if artifact.exists():
                self._client.log_artifact(self._run_id, str(artifact))
        weights = self._folder.weights
        if weights.exists():
            rows = {key: self._outbox.last[key] for key in _FINAL_METRICS if key in self._outbox.last}
            step = max((row.step for row in rows.values()), default=0)
            made = weights.stat().st_mtime_ns // 1_000_000
            put_model(self._client, self._run, self._folder.path.name, weights.as_uri(), step, made, rows)
        self._client.set_terminated(self._run_id, end["status"], end_time=end["time"])
        replace_json(_end(self._folder), end | {"delivered": True})

    @cached_property
    def _client(self) -> MlflowClient:
        return connect(self._uri)

    @cached_property
    def _run(self) -> Run:
        return self._client.get_run(self._run_id)

    def _hand_over(self, entries: list[Entry]) -> dict[str, Row]:
        """Deliver entries as `Outbox.next` groups them; returns the last row of each metric."""
        first = entries[0]
        if "checkpoint" in first:
            return self._hand_over_checkpoint(first)
        if "forget" in first:
            drop_model(self._client, self._run, _name(first["forget"]))
            return {}
        from mlflow.entities import Metric

        rows = [
            (key, Row(entry["step"], entry["time"], value))
            for entry in entries
            for key, value in entry["metrics"].items()
        ]
        metrics = [Metric(key, row.value, row.time, row.step) for key, row in rows]
        for begin in range(0, len(metrics), self._batch):
            self._client.log_batch(self._run_id, metrics=metrics[begin : begin + self._batch])
        return dict(rows)

    def _hand_over_checkpoint(self, entry: Entry) -> dict[str, Row]:
        found = {
            key: self._row_for(key, entry["step"], entry["time"], value) for key, value in entry["metrics"].items()
        }
        rows = {key: row for key, row in found.items() if row is not None}
        name, step = _name(entry["step"]), entry["step"]
        put_model(self._client, self._run, name, entry["checkpoint"], step, entry["time"], rows)
        last = self._outbox.last
        return {key: row for key, row in rows.items() if key not in last or row.step > last[key].step}

    def _row_for(self, key: str, step: int, now: int, value: float) -> Row | None:
        """The row of the run that says `key` was `value` at `step`: the one that MLflow has, or a new one.

        None when MLflow's row of that step says something else, as after a rollback to other batches: the run would
        get the step a second time.
        """
        last = self._outbox.last.get(key)
        if last is None or last.step < step:
            return Row(step, now, value)
        if last.step > step:
            history = self._client.get_metric_history(self._run_id, key)
            last = next((Row(step, old.timestamp, old.value) for old in history if old.step == step), None)
        return last if last is not None and last.value == value else None


def deliver_rest(folder: RunFolder, uri: str, mlflow_run_id: str, seconds: float) -> bool:
    """Deliver what waits for MLflow, the end included, for about `seconds`; False if something is left.

    Raises:
        Locked: another process delivers for this run.
        Exception: whatever MLflow raises.
    """
    end = time.monotonic() + seconds
    outbox = Outbox(folder.mlflow, patience=min(seconds, 5.0))
    try:
        courier = Courier(folder, uri, mlflow_run_id, outbox)
        courier.deliver(lambda: time.monotonic() < end)
        if outbox.empty:
            courier.deliver_end()
        return outbox.empty
    finally:
        outbox.close()


def _begin(folder: RunFolder) -> Path:
    return folder.mlflow / "begin.json"


def _end(folder: RunFolder) -> Path:
    return folder.mlflow / "end.json"


def _name(step: int) -> str:
    return f"checkpoint-{step}"

"""What rank 0 of a training writes down: the log, events, and through the outbox everything that MLflow gets.

`log.jsonl` in the run's folder is the truth about the run and follows it back when it is resumed from a checkpoint.
MLflow gets a copy that only grows: a step that it was given stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from nestling.tracking.client import TrackingError
from nestling.tracking.files import Locked, append_whole, cut_half_line
from nestling.tracking.outbox import Outbox
from nestling.tracking.runs import RunFolder
from nestling.tracking.sender import Sender

_CLOSE_PATIENCE = 15.0  # seconds
_LOCK_PATIENCE = 30.0  # seconds: the rank 0 of a worker group that was killed may live on for some


class Tracker:
    """Records a training; used by one process, rank 0, which never waits for MLflow.

    What a full disk does not take waits in memory and is written, in its order, as soon as there is room.

    Args:
        folder: the run's folder; an existing log is continued.
        uri: tracking URI, resolved.
        mlflow_run_id: the run made by `start`.

    Raises:
        TrackingError: another process records this run and did not end within half a minute.
    """

    def __init__(self, folder: RunFolder, uri: str, mlflow_run_id: str) -> None:
        try:
            outbox = Outbox(folder.mlflow, _LOCK_PATIENCE)
        except Locked as busy:
            raise TrackingError(
                f"run {folder.run_id} is still recorded by {busy}, which had {_LOCK_PATIENCE:.0f} seconds to end; "
                "end it, then resume the run"
            ) from busy
        self._folder = folder
        self._outbox = outbox
        cut_half_line(folder.log)
        self._log = folder.log.open("ab", buffering=0)
        self._sender = Sender(folder, uri, mlflow_run_id, outbox)
        self._waiting: deque[Callable[[], None]] = deque()
        self._refused = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of an optimizer step; MLflow gets those whose step is later than any it got before."""
        values = {key: float(value) for key, value in metrics.items()}
        line = json.dumps({"step": step, **values}).encode() + b"\n"
        # The outbox first: what a kill leaves out of the log is computed again.
        self._write(lambda: self._outbox.put_metrics(values, step), lambda: append_whole(self._log, line))

    def rewind(self, step: int) -> None:
        """Take the log back to the end of `step`: the later records go and will be written anew."""
        self._write(lambda: self._rewind(step))

    def _rewind(self, step: int) -> None:
        self._log.close()
        self._folder.cut_log(step)
        self._log = self._folder.log.open("ab", buffering=0)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Record what happened besides steps; see `RunFolder.event`."""
        self._write(lambda: self._folder.event(kind, message, **fields))

    def checkpoint(self, step: int, location: str, metrics: Mapping[str, float]) -> None:
        """Show a checkpoint as the logged model `checkpoint-<step>` that points at `location`, with these metrics.

        Args:
            step: its optimizer step; another checkpoint of the same step is replaced.
            location: URI of its files, none of which is copied.
            metrics: of the model at that step, under the names of the run's metrics.
        """
        self._write(lambda: self._outbox.put_checkpoint(step, location, metrics))

    def forget(self, step: int) -> None:
        """Take the logged model of a deleted checkpoint away."""
        self._write(lambda: self._outbox.put_forgotten(step))

    def close(self) -> None:
        """Send what is left to MLflow, within seconds; what it does not take is kept on disk."""
        self._write()
        self._log.close()
        self._sender.close(_CLOSE_PATIENCE)

    def _write(self, *actions: Callable[[], None]) -> None:
        """Do what writes to the disk after all that waits for it; each action is done wholly or not at all."""
        self._waiting.extend(actions)
        try:
            while self._waiting:
                self._waiting[0]()
                self._waiting.popleft()
            self._refused = False
        except OSError as error:
            if not self._refused:
                self._refused = True
                print(f"{self._folder.path}: {error}; the training goes on and writes its log later", file=sys.stderr)

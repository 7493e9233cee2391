"""Metrics on their way to MLflow, off the training loop.

A background thread collects what was put and sends it in batches, together with samples of the machine's load. When
MLflow does not answer, everything is kept and sent later; a value keeps the time at which it was made, so that sending
it twice changes nothing. The price: what waits is held in memory, and a killed process loses up to a second of it.
"""

from __future__ import annotations

import queue
import re
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nestling.tracking.client import connect, shown

if TYPE_CHECKING:
    from mlflow.entities import Metric

_BATCH = 1000  # MLflow's limit for one request
_INTERVAL = 1.0  # seconds between two batches
_RETRY = 5.0  # seconds more while MLflow does not answer
_FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in the name of a metric


class Sender:
    """Sends metrics of one MLflow run until it is closed."""

    def __init__(self, uri: str, mlflow_run_id: str) -> None:
        self._uri = uri
        self._run_id = mlflow_run_id
        self._client = connect(uri)
        self._load = _Load(uri, mlflow_run_id)
        self._queue: queue.SimpleQueue[list[Metric]] = queue.SimpleQueue()
        self._waiting: list[Metric] = []
        self._warned = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nestling-tracking", daemon=True)
        self._thread.start()

    def put(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics of one step; returns at once."""
        self._queue.put(_stamped(metrics, step))

    def close(self, patience: float) -> None:
        """Send what is left, for at most `patience` seconds; says so on standard error when MLflow did not take it."""
        self._closing.set()
        self._thread.join(patience)
        if self._waiting or not self._queue.empty():
            self._say("the last values did not reach it; log.jsonl in the run's folder has all of them")

    def _run(self) -> None:
        while not self._closing.wait(_INTERVAL):
            self._waiting += self._load.sample()
            self._collect()
            if not self._send():
                self._closing.wait(_RETRY)
        self._collect()
        self._send()

    def _collect(self) -> None:
        while not self._queue.empty():  # this thread is the only reader
            self._waiting += self._queue.get()

    def _send(self) -> bool:
        while self._waiting:
            batch = self._waiting[:_BATCH]
            try:
                self._client.log_batch(self._run_id, metrics=batch)
            except Exception as error:  # whatever MLflow raises must not end the thread, let alone the training
                if not self._warned:
                    self._warned = True
                    self._say(f"it does not take the metrics; the training goes on and they are sent later ({error})")
                return False
            del self._waiting[: len(batch)]
        return True

    def _say(self, what: str) -> None:
        print(shown(f"MLflow at {self._uri}: {what}"), file=sys.stderr, flush=True)


class _Load:
    """CPU, memory, disk, network and GPU of this machine, read by MLflow's own monitors every ten seconds.

    MLflow's thread around its monitors ends for good at the first failing request, so the samples go through our
    sender. Their step is the number of seconds since the MLflow run began: it goes on rising when a run is resumed.
    """

    def __init__(self, uri: str, mlflow_run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(mlflow_run_id, tracking_uri=uri)
        self._client = connect(uri)
        self._run_id = mlflow_run_id
        self._began: float | None = None
        self._due = time.monotonic()
        self._read()  # the processors' load is counted from one reading to the next

    def sample(self) -> list[Metric]:
        """The present load; nothing when the last sample is younger than the interval."""
        if time.monotonic() < self._due:
            return []
        self._due = time.monotonic() + self._monitor.sampling_interval
        try:
            if self._began is None:
                self._began = self._client.get_run(self._run_id).info.start_time / 1000
            return _stamped(self._read(), int(time.time() - self._began))
        except Exception:  # no sample this time: MLflow away, or a sensor that cannot be read
            return []

    def _read(self) -> dict[str, float]:
        self._monitor.collect_metrics()
        metrics = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in metrics.items()}


def _stamped(metrics: Mapping[str, float], step: int) -> list[Metric]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(_FORBIDDEN.sub("_", key), value, now, step) for key, value in metrics.items()]

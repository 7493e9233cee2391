"""CPU, memory, disk, network and GPU of this machine, read by MLflow's own monitors every ten seconds.

MLflow's thread around its monitors ends for good at the first failing request, so the samples go through the outbox.
Their step is the number of seconds since the run began: it goes on rising when a run is resumed.
"""

from __future__ import annotations

import time
from datetime import datetime

from nestling.tracking.outbox import Outbox
from nestling.tracking.runs import RunFolder


class SystemLoad:
    """Samples the load of this machine into the outbox of a run."""

    def __init__(self, folder: RunFolder, uri: str, mlflow_run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(mlflow_run_id, tracking_uri=uri)
        self._began = datetime.fromisoformat(folder.info()["started"]).timestamp()
        self._due = time.monotonic()
        self._read()  # the processors' load is counted from one reading to the next

    def sample(self, outbox: Outbox) -> None:
        """Put the present load, unless the last sample is younger than the interval."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self._monitor.sampling_interval
            outbox.put_metrics(self._read(), int(time.time() - self._began))

    def _read(self) -> dict[str, float]:
        self._monitor.collect_metrics()
        metrics = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in metrics.items()}

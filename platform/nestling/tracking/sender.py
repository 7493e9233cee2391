"""A run's outbox on its way to MLflow, off the training loop.

A background thread samples the machine's load, and has a courier deliver what is in the outbox. MLflow, its import and
its failures stay in that thread; the training only appends to files.
"""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import suppress

from nestling.tracking.client import reason, shown
from nestling.tracking.courier import Courier, has_mail
from nestling.tracking.load import SystemLoad
from nestling.tracking.outbox import Outbox
from nestling.tracking.runs import RunFolder

log = logging.getLogger(__name__)

_INTERVAL = 1.0  # seconds between two deliveries
_RETRY = 5.0  # seconds more while MLflow does not answer


class Sender:
    """Delivers for one run until it is closed; the outbox is the sender's to close."""

    def __init__(self, folder: RunFolder, uri: str, mlflow_run_id: str, outbox: Outbox) -> None:
        self._uri = uri
        self._run_id = mlflow_run_id
        self._folder = folder
        self._outbox = outbox
        self._courier = Courier(folder, uri, mlflow_run_id, outbox)
        self._load: SystemLoad | None = None
        self._away = False
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="nestling-tracking", daemon=True)
        self._thread.start()

    def close(self, patience: float) -> None:
        """Deliver what is left, for at most `patience` seconds; says so when MLflow did not take everything."""
        self._closing.set()
        self._thread.join(patience)
        self._given_up.set()
        if has_mail(self._folder):
            self._say(
                "mlflow-waiting",
                f"what it has not got is kept in {self._folder.mlflow}; the next run in that runs folder, "
                f"nestling resume {self._folder.run_id} or nestling ui will send it",
            )

    def _work(self) -> None:
        try:
            while not self._closing.wait(_INTERVAL):
                self._sample()
                if not self._deliver():
                    self._closing.wait(_RETRY)
            self._deliver()
        finally:
            self._outbox.close()

    def _sample(self) -> None:
        try:
            if self._load is None:
                self._load = SystemLoad(self._folder, self._uri, self._run_id)
            self._load.sample(self._outbox)
        except Exception:  # no sample this time: a sensor that cannot be read
            log.debug("the load of this machine cannot be read", exc_info=True)

    def _deliver(self) -> bool:
        try:
            self._courier.deliver(lambda: not self._given_up.is_set())
        except Exception as error:  # whatever MLflow raises must not end the thread, let alone the training
            if not self._away:
                self._say(
                    "mlflow-away",
                    f"it does not take what is sent; the training goes on and all is sent later ({reason(error)})",
                )
            self._away = True
            return False
        if self._away:
            self._away = False
            self._say("mlflow-back", "it has everything again")
        return True

    def _say(self, kind: str, what: str) -> None:
        message = shown(f"MLflow at {self._uri}: {what}")
        print(message, file=sys.stderr, flush=True)
        with suppress(OSError):  # a full disk; it has been said
            self._folder.event(kind, message)

"""A Ray cluster for one command: join the one that RAY_ADDRESS names, or start one on this machine.

Three defaults of Ray stop a small machine. Ray Train may take every CPU, and then Ray Data, which reads the corpus,
waits for ever: a cluster started here gets two logical CPUs more than there are workers. `report` waits for the
controller's next poll, two seconds by default: it polls twice a second here. And Ray's head remembers 100,000 tasks, of
which every poll is one, so that it grows for hours: here it remembers 1000.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

#: Logical CPUs beside those of workers and readers, for what Ray Data's tasks feed.
SPARE_CPUS = 1
#: Seconds in which a cluster that is there takes a connection. Ray itself would go on trying for minutes.
ANSWER_SECONDS = 5.0


class ClusterError(RuntimeError):
    """The cluster cannot be reached or lacks what the job needs."""


@contextmanager
def connected(workers: int = 0, gpus: int = 0, readers: int = 1) -> Iterator[None]:
    """Have Ray running with room for `workers` workers, `gpus` of them on a GPU each; leave it as it was found.

    Args:
        readers: tasks of Ray Data that read at the same time.

    Raises:
        ClusterError: RAY_ADDRESS names a cluster that does not answer, or one with too little.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "1000")
    import ray

    ours = not ray.is_initialized()
    if ours:
        with _own_sigterm():
            _start(workers + readers)
    try:
        _check_room(workers, gpus, readers)
        yield
    finally:
        if ours:
            with _own_sigterm():
                ray.shutdown()


def _start(cpus: int) -> None:
    """Start or join Ray; SIGTERM, to which Ray's own answer is in force meanwhile, is a KeyboardInterrupt here too."""
    try:
        _init(cpus)
    except SystemExit as stop:
        raise KeyboardInterrupt from stop


def _init(cpus: int) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.WARNING)
        except (OSError, ValueError) as error:  # ConnectionError is an OSError, ValueError: no address at all
            raise ClusterError(
                f"RAY_ADDRESS: no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, "
                "or unset RAY_ADDRESS to run on this machine alone"
            ) from error
    else:
        # Nobody announces the end of this machine, so no process of its own need ask for it at every start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        there = max(os.cpu_count() or 1, cpus + SPARE_CPUS)
        ray.init(address="local", num_cpus=there, include_dashboard=False, logging_level=logging.WARNING)


def _knock(address: str) -> None:
    """Raises OSError if nothing listens at host:port or ray://host:port; other addresses are left to Ray."""
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.scheme in ("", "ray") and place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), timeout=ANSWER_SECONDS).close()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray puts its own in its place when it starts, and none when it stops."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # Only the main thread may set a handler, and so only there did Ray; None was not set from Python.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_room(workers: int, gpus: int, readers: int) -> None:
    import ray

    has = ray.cluster_resources()
    for kind, needed, fix in (
        ("CPU", workers + readers, "training.workers"),
        ("GPU", gpus, "training.workers, or set training.device=cpu"),
    ):
        if has.get(kind, 0) < needed:
            raise ClusterError(
                f"the Ray cluster has {has.get(kind, 0):g} {kind}s, needs {needed} for {workers} workers "
                f"(and {readers} more to read the data); add nodes or lower {fix}"
            )

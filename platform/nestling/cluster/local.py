"""A Ray cluster for one command: join the one that RAY_ADDRESS names, or start one on this machine.

Two defaults of Ray stop a small machine. Ray Train may take every CPU, and then Ray Data, which reads the corpus, waits
for ever: a cluster started here gets two logical CPUs more than there are workers. And `report` waits for the
controller's next poll, two seconds by default: it polls twice a second here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

#: Logical CPUs beside those of the workers: one for Ray Data's tasks, one for what they feed.
SPARE_CPUS = 2


class ClusterError(RuntimeError):
    """The cluster cannot be reached or lacks what the job needs."""


@contextmanager
def connected(workers: int = 0, gpus: int = 0) -> Iterator[None]:
    """Have Ray running with room for `workers` workers, `gpus` of them on a GPU each; leave it as it was found.

    Raises:
        ClusterError: RAY_ADDRESS names a cluster that does not answer, or one with too little.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray

    ours = not ray.is_initialized()
    if ours:
        _start(workers)
    try:
        _check_room(workers, gpus)
        yield
    finally:
        if ours:
            ray.shutdown()


def _start(workers: int) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise ClusterError(
                f"RAY_ADDRESS: no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, "
                "or unset RAY_ADDRESS to run on this machine alone"
            ) from error
    else:
        cpus = max(os.cpu_count() or 1, workers + SPARE_CPUS)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING)


def _check_room(workers: int, gpus: int) -> None:
    import ray

    has = ray.cluster_resources()
    for kind, needed, fix in (
        ("CPU", workers + 1, "training.workers"),
        ("GPU", gpus, "training.workers, or set training.device=cpu"),
    ):
        if has.get(kind, 0) < needed:
            raise ClusterError(
                f"the Ray cluster has {has.get(kind, 0):g} {kind}s, needs {needed} for {workers} workers "
                f"(and one CPU to read the data); add nodes or lower {fix}"
            )

"""Joining, starting and leaving a Ray cluster: what is missing is said at once, and what was there stays as it was."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from nestling.cluster import ClusterError, connected, local

#: What a process of its own does: it says whether Ray runs inside, and whose answer to SIGTERM stands there and after.
INSIDE = """
import os, signal, sys, time
import ray
from nestling.cluster import ClusterError, connected

def mine(number, frame):
    print("terminated by its own handler", flush=True)
    sys.exit(7)

signal.signal(signal.SIGTERM, mine)
began = time.monotonic()
try:
    with connected(workers=3):
        print("CPUs", ray.cluster_resources()["CPU"], "mine", signal.getsignal(signal.SIGTERM) is mine)
    print("running", ray.is_initialized(), "mine", signal.getsignal(signal.SIGTERM) is mine, flush=True)
except ClusterError as error:
    print(error, "mine", signal.getsignal(signal.SIGTERM) is mine, "seconds", time.monotonic() - began)
    sys.exit(3)
os.kill(os.getpid(), signal.SIGTERM)
"""


def process(address: str | None) -> subprocess.CompletedProcess[str]:
    """`INSIDE` in a process of its own with this RAY_ADDRESS."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if address is not None:
        environment["RAY_ADDRESS"] = address
    return subprocess.run(
        [sys.executable, "-c", INSIDE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("workers", [4, 100])
def test_too_few_cpus_are_counted(ray_local: None, workers: int) -> None:
    needed = f"has 4 CPUs, needs {workers + 1} for {workers} workers .* add nodes or lower training.workers$"
    with pytest.raises(ClusterError, match=needed), connected(workers):
        pytest.fail("the block must not run")


def test_too_few_gpus_are_counted(ray_local: None) -> None:
    needed = "has [0-9]+ GPUs, needs 1000 for 2 workers .* lower training.workers, or set training.device=cpu$"
    with pytest.raises(ClusterError, match=needed), connected(2, 1000):
        pytest.fail("the block must not run")


def test_a_ray_that_runs_is_used_and_left_running(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # not asked: there is one already
    before = ray.get_runtime_context().get_job_id()
    with connected(workers=3):  # three and one for the data: all there is
        assert ray.get_runtime_context().get_job_id() == before
    with pytest.raises(ZeroDivisionError), connected():
        _ = 1 / 0
    with pytest.raises(ClusterError), connected(workers=100):
        pytest.fail("the block must not run")
    assert ray.is_initialized() and ray.get_runtime_context().get_job_id() == before


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "127.0.0.1:port", "nothing"])
def test_an_address_without_a_cluster_fails_within_seconds(address: str) -> None:
    given = address.format(port=free_port())
    done = process(given)
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"RAY_ADDRESS: no Ray cluster answers at {given!r} (" in done.stdout
    assert "start one with `ray start --head`, or unset RAY_ADDRESS to run on this machine alone" in done.stdout
    says, seconds = done.stdout.split(" seconds ")
    assert says.endswith("mine True")
    assert float(seconds) < 15  # a busy machine included; Ray alone goes on for minutes


def test_a_host_that_swallows_connections_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent, contextlib.ExitStack() as callers:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        port = silent.getsockname()[1]
        for _ in range(3):  # the queue is full, and the kernel drops who knocks
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.1", port))
        monkeypatch.setattr(local, "ANSWER_SECONDS", 0.5)
        with pytest.raises(OSError, match="timed out"):
            local._knock(f"127.0.0.1:{port}")


@pytest.mark.slow
def test_a_cluster_of_its_own_has_room_to_spare_and_ends_with_the_block() -> None:
    done = process(None)
    cpus = max(os.cpu_count() or 1, 5)
    assert done.stdout.splitlines() == [
        f"CPUs {float(cpus)} mine True",
        "running False mine True",
        "terminated by its own handler",
    ], done.stdout + done.stderr
    assert done.returncode == 7


def test_the_handler_of_sigterm_is_left_alone(ray_local: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with connected():
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before

"""What all tests share: quiet threads, one small Ray, and a little text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# All must be set before torch or Ray are imported, here and in the processes that Ray starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # as where `nestling` starts a Ray: a process less for each run
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, too


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes the shared Ray is slow; so the rest can be run on several cores at once."""
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray for the whole test session, with room for two workers; never one that happens to run on this machine."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of text: some of the English that comes with Python."""
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("texts")
    for name, text in sorted(pydoc_data.topics.topics.items())[:20]:
        (folder / f"{name}.txt").write_text(text)
    return folder

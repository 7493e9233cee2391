"""What the tests of the platform share: run folders, and places for checkpoints (one speaks S3)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from pyarrow.fs import FileSystem

from nestling.tracking import RunFolder


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder (with a space in its path) and so one MLflow database for a module: making one takes seconds."""
    return tmp_path_factory.mktemp("all runs")


@pytest.fixture
def folder(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """A new run that is being trained."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = RunFolder.create(runs_dir, "quick")
    with folder.claim():
        yield folder


@pytest.fixture(scope="session")
def s3_options() -> Iterator[str]:
    """The options of a URI of pyarrow's that lead to an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


@pytest.fixture
def s3_place(s3_options: str) -> str:
    """The URI of an empty folder on that server, with credentials in it."""
    bucket = f"bucket-{uuid4().hex}"
    uri = f"s3://KEY:SECRET@{bucket}?{s3_options}&allow_bucket_creation=true"
    files, root = FileSystem.from_uri(uri)
    files.create_dir(root)
    return f"s3://KEY:SECRET@{bucket}/runs/one?{s3_options}"


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where checkpoints are kept: a folder, or a URI."""
    return str(tmp_path / "checkpoints") if request.param == "local" else request.getfixturevalue("s3_place")

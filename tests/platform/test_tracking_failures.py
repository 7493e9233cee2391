"""Runs that are resumed or killed, and an MLflow that is away: nothing is lost and no step comes twice."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tests.mlflow_server import Server, wait_for

from nestling.tracking import RunFolder, TrackedRun, Tracker, TrackingError, deliver, finish, start
from nestling.tracking import sender as sender_module
from nestling.tracking import tracker as tracker_module

CONFIG = {"seed": 0, "data": {"source": "embedded:english"}}


def client(run: TrackedRun):
    from mlflow import MlflowClient

    return MlflowClient(run.uri)


def history(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    """The values of a metric in the order in which MLflow has them."""
    return [(metric.step, metric.value) for metric in client(run).get_metric_history(run.mlflow_run_id, key)]


@pytest.fixture
def run(folder: RunFolder) -> TrackedRun:
    return start(CONFIG, folder, None, "tests")


# Runs that are resumed


def models(run: TrackedRun) -> dict[str, dict[str, tuple[int, float]]]:
    """The metrics of the run's logged models, by the models' names."""
    found = client(run).search_logged_models([run.experiment_id])
    return {
        model.name: {metric.key: (metric.step, metric.value) for metric in model.metrics or ()}
        for model in found
        if model.source_run_id == run.mlflow_run_id
    }


def rows(run: TrackedRun, key: str) -> int:
    """How many values of a metric are in the database itself."""
    with closing(sqlite3.connect(run.uri.removeprefix("sqlite:///"))) as database:
        query = "SELECT COUNT(*) FROM metrics WHERE run_uuid = ? AND key = ?"
        return database.execute(query, (run.mlflow_run_id, key)).fetchone()[0]


def test_a_resumed_run_continues_its_mlflow_run(folder: RunFolder, run: TrackedRun) -> None:
    finish(run, folder, "interrupted")
    assert client(run).get_run(run.mlflow_run_id).info.status == "KILLED"
    again = start(CONFIG | {"seed": 1, "training": {"steps": 9}}, folder, None, "another")
    assert again == run
    found = client(run).get_run(run.mlflow_run_id)
    assert found.info.status == "RUNNING"
    assert (found.data.params["seed"], found.data.params["training.steps"]) == ("0", "9")
    assert {key: value for key, value in found.data.tags.items() if "resumed" in key} == {"nestling.resumed.seed": "1"}
    start(CONFIG, folder, None, "another")
    assert client(run).get_run(run.mlflow_run_id).data.tags["nestling.resumed.seed"] == "0"
    finish(run, folder, "finished")
    assert client(run).get_run(run.mlflow_run_id).info.status == "FINISHED"
    assert len(client(run).search_runs([run.experiment_id], f"tags.`nestling.run_id` = '{folder.run_id}'")) == 1


def test_a_run_that_mlflow_does_not_have_cannot_be_resumed(folder: RunFolder, run: TrackedRun, tmp_path: Path) -> None:
    start(CONFIG, RunFolder.create(tmp_path, "other"), None, "tests")  # makes a database
    with pytest.raises(TrackingError, match=rf"does not have the run {run.mlflow_run_id}.* correct tracking\.uri"):
        start(CONFIG, folder, f"sqlite:///{tmp_path}/mlflow.db", "tests")
    client(run).delete_run(run.mlflow_run_id)
    with pytest.raises(TrackingError, match=rf"was deleted there; restore it .* --run-id {run.mlflow_run_id}"):
        start(CONFIG, folder, None, "tests")


def test_a_resumed_run_goes_on_while_mlflow_is_away(
    folder: RunFolder, run: TrackedRun, caplog: pytest.LogCaptureFixture
) -> None:
    finish(run, folder, "interrupted")
    database = Path(run.uri.removeprefix("sqlite:///"))
    with caplog.at_level("WARNING"), away(database):
        assert start(CONFIG | {"seed": 1}, folder, None, "tests") == run
        assert "is away" in caplog.text and "the run goes on" in caplog.text
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    tracker.close()
    found = client(run).get_run(run.mlflow_run_id)
    assert (found.info.status, found.data.tags["nestling.resumed.seed"]) == ("RUNNING", "1")


@contextmanager
def away(database: Path) -> Iterator[None]:
    """MLflow without its table of runs: every request fails at once."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("ALTER TABLE runs RENAME TO elsewhere")
        connection.commit()
        try:
            yield
        finally:
            connection.execute("ALTER TABLE elsewhere RENAME TO runs")
            connection.commit()


# Checkpoints


def test_checkpoints_are_logged_models_with_metrics_and_no_bytes(folder: RunFolder, run: TrackedRun) -> None:
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    for step in (10, 20, 30):
        tracker.log({"train/loss": step / 10, "heldout/loss": step / 5}, step)
        tracker.checkpoint(step, f"file:///checkpoints/{step}", {"train/loss": step / 10, "heldout/loss": step / 5})
    tracker.checkpoint(35, "file:///checkpoints/35", {"train/loss": 3.5})  # a step that is not in the log
    tracker.forget(10)
    tracker.forget(99)
    tracker.log({"train/loss": 9.0}, 35)
    tracker.log({"train/loss": 4.0}, 40)
    tracker.close()
    assert models(run) == {
        "checkpoint-20": {"train/loss": (20, 2.0), "heldout/loss": (20, 4.0)},
        "checkpoint-30": {"train/loss": (30, 3.0), "heldout/loss": (30, 6.0)},
        "checkpoint-35": {"train/loss": (35, 3.5)},
    }
    assert [step for step, _ in history(run, "train/loss")] == [10, 20, 30, 35, 40] and rows(run, "train/loss") == 5
    assert history(run, "train/loss")[-2:] == [(35, 3.5), (40, 4.0)]
    (model,) = client(run).search_logged_models(
        [run.experiment_id], filter_string=f"name = 'checkpoint-20' AND source_run_id = '{run.mlflow_run_id}'"
    )
    assert model.params == {"path": "file:///checkpoints/20", "step": "20"} and str(model.status) == "READY"
    (description,) = [path for path in Path(model.artifact_location).rglob("*") if path.is_file()]
    assert description.name == "MLmodel" and description.stat().st_size < 2000


def test_a_checkpoint_after_a_rollback_adds_no_row_to_the_run(folder: RunFolder, run: TrackedRun) -> None:
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    for step in (10, 20, 30):
        tracker.log({"train/loss": float(step), "train/tokens": float(step)}, step)
    tracker.checkpoint(20, "file:///first", {"train/loss": 20.0})
    tracker.close()
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    tracker.rewind(10)
    tracker.log({"train/loss": 20.5, "train/tokens": 20.0}, 20)  # other batches
    tracker.checkpoint(20, "file:///second", {"train/loss": 20.5, "train/tokens": 20.0})
    tracker.close()
    assert models(run) == {"checkpoint-20": {"train/tokens": (20, 20.0)}}
    assert (rows(run, "train/loss"), rows(run, "train/tokens")) == (3, 3)
    assert folder.records()[-1] == {"step": 20, "train/loss": 20.5, "train/tokens": 20.0}


def test_delivering_everything_twice_changes_nothing(folder: RunFolder, run: TrackedRun) -> None:
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    tracker.log({"train/loss": 1.0, "odd": math.nan}, 1)
    tracker.checkpoint(1, "file:///one", {"train/loss": 1.0, "new": 5.0})
    tracker.log({"train/loss": 2.0}, 2)
    tracker.close()
    before = models(run), client(run).get_run(run.mlflow_run_id).outputs.model_outputs
    (folder.mlflow / "position.json").unlink()  # as if nothing of it had been noted
    with closing(sqlite3.connect(run.uri.removeprefix("sqlite:///"))) as database:  # and the model not finished
        database.execute("UPDATE logged_models SET status = 1 WHERE source_run_id = ?", (run.mlflow_run_id,))
        database.commit()
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    tracker.log({"train/loss": 2.5}, 2)
    tracker.log({"train/loss": 3.0}, 3)
    tracker.close()
    assert (models(run), client(run).get_run(run.mlflow_run_id).outputs.model_outputs) == before
    assert history(run, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert (rows(run, "train/loss"), rows(run, "odd"), rows(run, "new")) == (3, 1, 1)


# What earlier runs left


@pytest.fixture
def left(run: TrackedRun, tmp_path: Path) -> tuple[RunFolder, TrackedRun]:
    """A run in a runs folder of its own, whose driver is gone; in the same database as the others."""
    folder = RunFolder.create(tmp_path, "left")
    return folder, start(CONFIG, folder, run.uri, "tests")


def test_what_a_run_could_not_send_is_delivered_later(
    left: tuple[RunFolder, TrackedRun], caplog: pytest.LogCaptureFixture
) -> None:
    folder, run = left
    folder.config.write_text("seed: 0\n")
    folder.weights.write_bytes(b"weights")
    with away(Path(run.uri.removeprefix("sqlite:///"))):
        with folder.claim():
            tracker = Tracker(folder, run.uri, run.mlflow_run_id)
            for step in (1, 2, 3):
                tracker.log({"train/loss": float(step), "heldout/loss": step / 2}, step)
            tracker.checkpoint(3, "file:///three", {"heldout/loss": 1.5})
            tracker.close()
            folder.update(status="failed")
            ended = time.time()
            finish(run, folder, "failed")
            assert f"everything is in {folder.path}" in caplog.text and "nestling ui will send it" in caplog.text
            assert deliver(folder.path.parent) == {}  # its driver is still there
        assert deliver(folder.path.parent) == {folder.run_id: False}
    assert client(run).get_run(run.mlflow_run_id).info.status == "RUNNING"
    assert deliver(folder.path.parent) == {folder.run_id: True}
    assert deliver(folder.path.parent) == {}
    info = client(run).get_run(run.mlflow_run_id).info
    assert info.status == "FAILED" and abs(info.end_time / 1000 - ended) < 1
    assert history(run, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert models(run) == {"checkpoint-3": {"heldout/loss": (3, 1.5)}, folder.path.name: {"heldout/loss": (3, 1.5)}}
    assert [file.path for file in client(run).list_artifacts(run.mlflow_run_id)] == ["config.yaml"]


def test_a_later_run_delivers_and_ends_what_was_killed(left: tuple[RunFolder, TrackedRun]) -> None:
    folder, run = left
    subprocess.run([sys.executable, "-c", KILLED, str(folder.path), "0"], check=False)
    assert history(run, "train/loss") == []
    start(CONFIG, RunFolder.create(folder.path.parent, "later"), run.uri, "tests")
    assert wait_for(lambda: client(run).get_run(run.mlflow_run_id).info.status == "KILLED", 20)
    assert [step for step, _ in history(run, "train/loss")] == list(range(1, 2001))
    assert folder.status() == "stopped"


# A recorder that is killed

KILLED = """
import os, signal, sys, time
from nestling.tracking import RunFolder, Tracker
folder = RunFolder.open(sys.argv[1])
info = folder.info()
tracker = Tracker(folder, info["tracking_uri"], info["mlflow_run_id"])
for step in range(1, 2001):
    tracker.log({"train/loss": float(step)}, step)
    if step % 500 == 0:
        tracker.checkpoint(step, f"file:///{step}", {"train/loss": float(step)})
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "column", "count"),
    [
        ("metrics", "run_uuid", 1),
        ("metrics", "run_uuid", 501),
        ("logged_models", "source_run_id", 1),
        ("inputs", "source_id", 2),
        ("logged_models", "source_run_id", 4),
    ],
)
def test_killed_at_any_moment_nothing_is_lost_or_twice(
    left: tuple[RunFolder, TrackedRun], table: str, column: str, count: int
) -> None:
    folder, run = left
    program = subprocess.Popen([sys.executable, "-c", KILLED, str(folder.path), "60"])
    with closing(sqlite3.connect(run.uri.removeprefix("sqlite:///"))) as database:
        query = f"SELECT COUNT(*) FROM {table} WHERE {column} = ?"
        while database.execute(query, (run.mlflow_run_id,)).fetchone()[0] < count:
            time.sleep(0.001)
    program.kill()
    program.wait()
    arrived = rows(run, "train/loss")
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    tracker.rewind(1500)
    for step in range(1501, 2101):
        tracker.log({"train/loss": step + 0.5}, step)
    tracker.checkpoint(2100, "file:///2100", {"train/loss": 2100.5})
    tracker.close()
    assert 0 < arrived <= 2000
    expected = [(step, float(step) if step <= 2000 else step + 0.5) for step in range(1, 2101)]
    assert history(run, "train/loss") == expected and rows(run, "train/loss") == 2100
    assert sorted(models(run)) == [
        "checkpoint-1000",
        "checkpoint-1500",
        "checkpoint-2000",
        "checkpoint-2100",
        "checkpoint-500",
    ]
    outputs = client(run).get_run(run.mlflow_run_id).outputs.model_outputs
    assert sorted(output.step for output in outputs) == [500, 1000, 1500, 2000, 2100]


def test_a_new_recorder_waits_for_the_old_one(
    folder: RunFolder, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Tracker(folder, run.uri, run.mlflow_run_id)
    monkeypatch.setattr(tracker_module, "_LOCK_PATIENCE", 0.2)
    with pytest.raises(TrackingError, match=rf"still recorded by process {os.getpid()} on .*; end it, then resume"):
        Tracker(folder, run.uri, run.mlflow_run_id)
    monkeypatch.setattr(tracker_module, "_LOCK_PATIENCE", 20.0)
    closing_soon = threading.Timer(0.5, old.close)
    closing_soon.start()
    Tracker(folder, run.uri, run.mlflow_run_id).close()
    closing_soon.join()


# A server that is frozen, killed and started again


def stored(server: Server, run: TrackedRun, key: str) -> list[tuple[int, float]]:
    """The values of a metric in the server's database itself, in the order of their time."""
    with closing(sqlite3.connect(server.place / "server.db")) as database:
        query = "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY timestamp"
        return database.execute(query, (run.mlflow_run_id, key)).fetchall()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_server_that_goes_away_and_comes_back(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "_RETRY", 0.5)
    folder = RunFolder.create(tmp_path / "runs", "served.1")  # MLflow takes no dot in the name of a model
    folder.config.write_text("seed: 0\n")
    folder.weights.write_bytes(b"weights")
    run = start(CONFIG, folder, server.uri, "tests")
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    tracker.log({"train/loss": 1.0}, 1)
    assert wait_for(lambda: stored(server, run, "train/loss") == [(1, 1.0)], 20)
    server.kill()
    tracker.log({"train/loss": 2.0, "heldout/loss": 2.5}, 2)
    tracker.checkpoint(2, "file:///two", {"heldout/loss": 2.5})
    time.sleep(3)
    server.start()
    assert wait_for(lambda: len(stored(server, run, "train/loss")) == 2, 30)
    tracker.log({"train/loss": 3.0}, 3)
    tracker.close()
    finish(run, folder, "finished")
    assert stored(server, run, "train/loss") == history(run, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert stored(server, run, "heldout/loss") == [(2, 2.5)]
    assert client(run).get_run(run.mlflow_run_id).info.status == "FINISHED"
    assert [file.path for file in client(run).list_artifacts(run.mlflow_run_id)] == ["config.yaml"]
    final = folder.path.name.replace(".", "_")
    assert models(run) == {"checkpoint-2": {"heldout/loss": (2, 2.5)}, final: {"heldout/loss": (2, 2.5)}}
    kinds = [json.loads(line)["kind"] for line in folder.events.read_text().splitlines()]
    assert kinds == ["mlflow-away", "mlflow-back"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_frozen_server_neither_slows_the_training_nor_holds_up_its_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "_CLOSE_PATIENCE", 1.0)
    monkeypatch.setattr(sender_module, "_RETRY", 0.5)
    folder = RunFolder.create(tmp_path / "runs", "frozen")
    run = start(CONFIG, folder, server.uri, "tests")
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    tracker.log({"train/loss": 0.0}, 0)
    assert wait_for(lambda: len(stored(server, run, "train/loss")) == 1, 20)
    seconds = []
    server.signal(signal.SIGSTOP)
    try:
        for step in range(1, 1001):
            began = time.perf_counter()
            tracker.log({"train/loss": float(step), **{f"levels/{level}/updates": step for level in range(20)}}, step)
            seconds.append(time.perf_counter() - began)
            time.sleep(0.005)
        tracker.checkpoint(1000, "file:///1000", {"train/loss": 1000.0})
        began = time.perf_counter()
        tracker.close()
        assert time.perf_counter() - began < 3
    finally:
        server.signal(signal.SIGCONT)
    seconds.sort()
    assert seconds[500] < 0.001 and seconds[-1] < 0.2  # on a quiet machine 85 us, and none over a millisecond
    assert len(stored(server, run, "train/loss")) < 1000
    folder.update(status="failed")
    assert wait_for(lambda: deliver(folder.path.parent).get(folder.run_id, False), 60)
    for key in ("train/loss", "levels/7/updates"):
        first = 0 if key == "train/loss" else 1
        assert stored(server, run, key) == [(step, float(step)) for step in range(first, 1001)]
    assert models(run) == {"checkpoint-1000": {"train/loss": (1000, 1000.0)}}
    assert client(run).get_run(run.mlflow_run_id).info.status == "FAILED"


def test_a_full_disk_holds_nothing_up_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        folder = RunFolder.create(disk, "quick")
        with folder.claim():
            run = start(CONFIG, folder, f"sqlite:///{tmp_path}/mlflow.db", "tests")
            tracker = Tracker(folder, run.uri, run.mlflow_run_id)
            for step in range(1, 11):
                tracker.log({"train/loss": 1.0 / step}, step)
            with pytest.raises(OSError, match="No space left"), (disk / "filler").open("ab", buffering=0) as filler:
                while True:
                    filler.write(bytes(1024))
            for step in range(11, 200):
                tracker.log({"train/loss": 1.0 / step, "note": float(step)}, step)
            tracker.event("save-failed", "no room")
            assert "No space left on device; the training goes on" in capsys.readouterr().err
            assert len(folder.records()) < 199  # whole lines only, or this would raise
            (disk / "filler").unlink()
            tracker.log({"train/loss": 1.0 / 200}, 200)
            tracker.close()
            assert [record["step"] for record in folder.records()] == list(range(1, 201))
            assert [event["kind"] for event in folder.happened()][-1] == "save-failed"
            finish(run, folder, "finished")
        assert history(run, "train/loss") == [(step, 1.0 / step) for step in range(1, 201)]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

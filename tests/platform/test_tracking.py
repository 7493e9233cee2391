"""The MLflow run of a training that goes well, on a real sqlite database."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from tests.mlflow_server import wait_for

from nestling.tracking import (
    RunFolder,
    TrackedRun,
    Tracker,
    TrackingError,
    finish,
    resolve_uri,
    start,
)
from nestling.tracking import sender as sender_module
from nestling.tracking import tracker as tracker_module
from nestling.tracking.parameters import flatten

CONFIG = {
    "seed": 0,
    "model": {"name": "hope", "width": 128, "level_widths": [64, 64], "dropout": None},
    "levels": [{"period": 1, "width": 64}, {"period": 4, "width": 64}],
    "data": {"source": "embedded:english"},
}


def client(run: TrackedRun):
    from mlflow import MlflowClient

    return MlflowClient(run.uri)


def history(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client(run).get_metric_history(run.mlflow_run_id, key))


def in_order(run: TrackedRun, key: str) -> list[int]:
    """The steps of a metric as MLflow orders its history."""
    return [metric.step for metric in client(run).get_metric_history(run.mlflow_run_id, key)]


@pytest.fixture
def run(folder: RunFolder) -> TrackedRun:
    return start(CONFIG, folder, None, "tests")


# Where MLflow is


def test_the_uri_is_the_configured_then_the_environment_then_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert resolve_uri("https://other", "runs") == "https://other"
    assert resolve_uri(None, "runs") == "http://server:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_uri(None, "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri("sqlite:///here.db", "runs") == f"sqlite:///{tmp_path}/here.db"
    assert resolve_uri("sqlite:////abs/there.db", "runs") == "sqlite:////abs/there.db"


def test_a_folder_that_a_sqlite_uri_cannot_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match=r"run\.dir: .*/what\? has a '\?' in it.* choose another run\.dir"):
        resolve_uri(None, tmp_path / "what?")
    assert resolve_uri("http://server", tmp_path / "what?") == "http://server"


def test_an_unreachable_server_is_a_clear_error_within_seconds(folder: RunFolder) -> None:
    with closing(socket.socket()) as reserved:  # bound and not listening: refused
        reserved.bind(("127.0.0.1", 0))
        uri = f"http://me:secret@127.0.0.1:{reserved.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TrackingError) as caught:
            start(CONFIG, folder, uri, "tests")
    assert time.monotonic() - began < 30  # about a second alone; MLflow left to itself retries for minutes
    message = str(caught.value)
    assert "me:***@127.0.0.1" in message and "secret" not in message
    assert "cannot be used" in message and "tracking.uri" in message and "mlflow.db" in message
    assert "mlflow_run_id" not in folder.info()


def test_a_deleted_experiment_is_named_with_the_way_out(folder: RunFolder, run: TrackedRun) -> None:
    gone = client(run).create_experiment("gone")
    client(run).delete_experiment(gone)
    with pytest.raises(TrackingError, match=r"'gone' was deleted .* tracking\.experiment=NAME or restore"):
        start(CONFIG, RunFolder.create(folder.path.parent, "late"), None, "gone")


def test_nothing_is_printed_and_mlflow_is_not_imported_before_it_is_needed(tmp_path: Path) -> None:
    program = f"""
import sys
from nestling.tracking import RunFolder, Tracker, finish, start
assert not {{"mlflow", "matplotlib", "torch"}} & set(sys.modules)
folder = RunFolder.create({str(tmp_path / "runs")!r}, "quiet")
run = start({{"seed": 0}}, folder, None, "nestling")
tracker = Tracker(folder, run.uri, run.mlflow_run_id)
tracker.log({{"train/loss": 2.0}}, 1)
tracker.close()
finish(run, folder, "finished")
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# The MLflow run of a training


def test_a_run_from_start_to_finish(folder: RunFolder, run: TrackedRun) -> None:
    folder.config.write_text("seed: 0\n")
    folder.weights.write_bytes(b"weights " * 1000)
    folder.figure.write_bytes(b"picture")
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    for step in range(1, 31):
        tracker.log({"train/loss": 5.0 / step, "levels/slow (odd)/updates": step // 4}, step)
    tracker.log({"heldout/loss": 1.25, "heldout/bits_per_byte": 1.8}, 30)
    tracker.close()
    finish(run, folder, "finished", folder.figure)

    found = client(run).get_run(run.mlflow_run_id)
    assert found.info.status == "FINISHED" and found.info.run_name == folder.path.name
    assert found.data.params["model.width"] == "128" and found.data.params["levels.1.period"] == "4"
    assert found.data.tags["nestling.run_id"] == folder.run_id
    assert found.data.tags["nestling.run_dir"] == str(folder.path)
    assert found.data.tags["mlflow.source.name"] == "nestling"
    assert history(run, "train/loss") == [(step, 5.0 / step) for step in range(1, 31)]
    assert history(run, "levels/slow _odd_/updates")[-1] == (30, 7)
    assert history(run, "heldout/bits_per_byte") == [(30, 1.8)]
    artifacts = client(run).list_artifacts(run.mlflow_run_id)
    assert sorted(file.path for file in artifacts) == ["config.yaml", "loss.png"]
    assert Path(found.info.artifact_uri).is_relative_to(folder.path.parent)
    assert (folder.info()["tracking_uri"], folder.info()["mlflow_run_id"]) == (run.uri, run.mlflow_run_id)


def test_the_weights_are_a_logged_model_without_copied_bytes(
    folder: RunFolder, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.weights.write_bytes(os.urandom(200_000))
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    tracker.log({"heldout/loss": 2.0, "heldout/bits_per_byte": 2.9}, 10)
    tracker.log({"heldout/loss": 1.0, "heldout/bits_per_byte": 1.4}, 20)
    tracker.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://the-users-own")
    finish(run, folder, "interrupted")
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://the-users-own"

    assert client(run).get_run(run.mlflow_run_id).info.status == "KILLED"
    models = client(run).search_logged_models([run.experiment_id])
    (model,) = [model for model in models if model.source_run_id == run.mlflow_run_id]
    assert model.params["path"] == folder.weights.as_uri() and str(model.status) == "READY"
    assert {metric.key: (metric.step, metric.value) for metric in model.metrics} == {
        "heldout/loss": (20, 1.0),
        "heldout/bits_per_byte": (20, 1.4),
    }
    assert history(run, "heldout/loss") == [(10, 2.0), (20, 1.0)]  # the model's value is not a second one of the run
    outputs = client(run).get_run(run.mlflow_run_id).outputs.model_outputs
    assert [(output.model_id, output.step) for output in outputs] == [(model.model_id, 20)]
    kept = [path for path in (folder.path.parent / "mlartifacts").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in kept) < 10_000


def test_parameters_beyond_the_limits_of_mlflow(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    run = start({"many": {f"k{index}": index for index in range(250)}, "long": "x" * 7000}, folder, None, "tests")
    parameters = client(run).get_run(run.mlflow_run_id).data.params
    assert len(parameters) == 251 and parameters["many.k249"] == "249" and len(parameters["long"]) == 6000


def test_flatten_keeps_every_leaf() -> None:
    assert flatten(CONFIG) == {
        "seed": "0",
        "model.name": "hope",
        "model.width": "128",
        "model.level_widths": "[64, 64]",
        "model.dropout": "null",
        "levels.0.period": "1",
        "levels.0.width": "64",
        "levels.1.period": "4",
        "levels.1.width": "64",
        "data.source": "embedded:english",
    }


def test_a_restarted_worker_records_no_step_twice(folder: RunFolder, run: TrackedRun) -> None:
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    for step in (10, 20, 30):
        tracker.log({"train/loss": float(step)}, step)
    tracker.close()
    with folder.log.open("a") as file:
        file.write('{"step": 40, "train/lo')  # killed while writing
    assert [record["step"] for record in folder.records()] == [10, 20, 30]

    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    tracker.rewind(10)
    for step in (20, 30, 40):
        tracker.log({"train/loss": step + 0.5}, step)
    tracker.log({"heldout/loss": 1.0}, 40)
    tracker.close()
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert lines == [
        {"step": 10, "train/loss": 10.0},
        {"step": 20, "train/loss": 20.5},
        {"step": 30, "train/loss": 30.5},
        {"step": 40, "train/loss": 40.5},
        {"step": 40, "heldout/loss": 1.0},
    ]
    assert history(run, "train/loss") == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.5)]
    assert in_order(run, "train/loss") == [10, 20, 30, 40]
    assert history(run, "heldout/loss") == [(40, 1.0)]


def test_more_values_than_one_request_takes_all_arrive(folder: RunFolder, run: TrackedRun) -> None:
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    for step in range(150):
        tracker.log({f"levels/level{level}/updates": float(step) for level in range(20)}, step)
    tracker.close()
    assert history(run, "levels/level19/updates") == [(step, float(step)) for step in range(150)]


def test_system_metrics_are_recorded_while_it_is_open(
    folder: RunFolder, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    assert wait_for(lambda: len(history(run, "system/cpu_utilization_percentage")) >= 2, 10)
    tracker.close()
    samples = history(run, "system/system_memory_usage_percentage")
    steps = [step for step, _ in samples]
    assert steps == sorted(set(steps)) and all(0 < value < 100 for _, value in samples)


def test_what_mlflow_refuses_is_kept_and_sent_later_with_one_warning(
    folder: RunFolder, run: TrackedRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sender_module, "_INTERVAL", 0.05)
    monkeypatch.setattr(sender_module, "_RETRY", 0.05)
    database = sqlite3.connect(run.uri.removeprefix("sqlite:///"))
    database.execute("ALTER TABLE metrics RENAME TO elsewhere")
    database.commit()
    try:
        tracker = Tracker(folder, run.uri, run.mlflow_run_id)
        for step in range(1, 11):
            tracker.log({"train/loss": float(step)}, step)
            time.sleep(0.05)
    finally:
        database.execute("ALTER TABLE elsewhere RENAME TO metrics")
        database.commit()
        database.close()
    assert wait_for(lambda: len(history(run, "train/loss")) == 10, 10)
    tracker.log({"train/loss": 11.0}, 11)
    tracker.close()
    assert history(run, "train/loss") == [(step, float(step)) for step in range(1, 12)]
    warnings = capfd.readouterr().err
    assert warnings.count("the training goes on and all is sent later") == 1
    assert "nestling ui will send it" not in warnings and warnings.count("it has everything again") == 1


def test_a_stalled_mlflow_neither_slows_the_training_nor_holds_up_its_end(
    folder: RunFolder, run: TrackedRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sender_module, "_INTERVAL", 0.05)
    monkeypatch.setattr(tracker_module, "_CLOSE_PATIENCE", 0.3)
    database = sqlite3.connect(run.uri.removeprefix("sqlite:///"), isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")  # every request now waits
    try:
        tracker = Tracker(folder, run.uri, run.mlflow_run_id)
        slowest = 0.0
        for step in range(1, 101):
            began = time.perf_counter()
            tracker.log({f"levels/level{level}/updates": step for level in range(20)}, step)
            slowest = max(slowest, time.perf_counter() - began)
            time.sleep(0.005)
        began = time.perf_counter()
        tracker.close()
        assert time.perf_counter() - began < 2
    finally:
        database.execute("ROLLBACK")
        database.close()
    assert slowest < 0.2
    assert len(folder.records()) == 100
    assert "nestling ui will send it" in capfd.readouterr().err


def test_mlflow_gone_at_the_end_does_not_fail_the_run(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    finish(TrackedRun("http://127.0.0.1:9", "a" * 32, "1"), folder, "finished")
    assert f"everything is in {folder.path}" in caplog.text


BEGIN = """
import sys
from nestling.tracking import RunFolder, start
print(start({}, RunFolder.create(sys.argv[1], "one"), None, "shared").experiment_id)
"""


def test_two_runs_may_begin_on_a_fresh_database(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    arguments = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen([sys.executable, "-c", BEGIN, str(tmp_path)], **arguments) for _ in range(2)]
    (first, errors), (second, more) = (process.communicate(timeout=120) for process in both)
    assert first.strip() == second.strip() != "", errors + more

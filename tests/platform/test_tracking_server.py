"""Tracking through an `mlflow server` over PostgreSQL, as a team has it, and what a person sees of it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.debian import chromium, program
from tests.mlflow_server import Server, free_port, wait_for

from nestling.tracking import RunFolder, TrackedRun, Tracker, finish, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LOSSES = {1: 5.0, 2: 4.25, 3: 3.5}


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URI of a database in a PostgreSQL that lives in a temporary folder; its programs refuse to be root."""
    initdb = program("/usr/lib/postgresql/*/bin/initdb", "postgresql")
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="postgres") as place:
        if user:
            subprocess.run(["chown", "postgres:postgres", place], check=True)
        data, port = f"{place}/data", free_port()
        made = [initdb, "--pgdata", data, "--username", "mlflow", "--auth", "trust", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, cwd=place, **user)
        server = [str(Path(initdb).with_name("postgres")), "-D", data, "-p", str(port), "-k", place]
        with open(f"{place}/log", "w") as log:
            process = subprocess.Popen([*server, "-h", "127.0.0.1", "-F"], cwd=place, stderr=log, **user)
        try:
            ready = [str(Path(initdb).with_name("pg_isready")), "-h", "127.0.0.1", "-p", str(port)]
            answers = wait_for(lambda: subprocess.run(ready, capture_output=True).returncode == 0, 60)
            assert answers, Path(f"{place}/log").read_text()
            yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # does not wait for those that are connected
            process.wait(60)


@pytest.fixture(scope="module")
def server(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    driver = postgres.replace("postgresql:", "postgresql+psycopg2:")
    server = Server(tmp_path_factory.mktemp("server"), driver)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def pair(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrackedRun, TrackedRun]:
    """A run and one below it, recorded as a training does."""
    from mlflow import MlflowClient

    runs, found = tmp_path_factory.mktemp("runs"), []
    for name in ("parent", "child"):
        folder = RunFolder.create(runs, name)
        folder.write_config("seed: 7\n")
        run = start({"seed": 7, "levels": [{"period": 4}]}, folder, server.uri, "nested")
        if found:
            MlflowClient(server.uri).set_tag(run.mlflow_run_id, "mlflow.parentRunId", found[0].mlflow_run_id)
        tracker = Tracker(folder, run.uri, run.mlflow_run_id)
        for step, loss in LOSSES.items():
            tracker.log({"train/loss": loss}, step)
        tracker.close()
        finish(run, folder, "finished")
        found.append(run)
    return found[0], found[1]


def test_a_nested_pair_comes_back_from_postgresql(
    server: Server, postgres: str, pair: tuple[TrackedRun, TrackedRun]
) -> None:
    import psycopg2
    from mlflow import MlflowClient

    parent, child = pair
    client = MlflowClient(server.uri)
    below = f"tags.`mlflow.parentRunId` = '{parent.mlflow_run_id}'"
    (found,) = client.search_runs([child.experiment_id], below)
    assert found.info.run_id == child.mlflow_run_id and found.info.status == "FINISHED"
    assert found.data.params == {"seed": "7", "levels.0.period": "4"}
    history = client.get_metric_history(child.mlflow_run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == LOSSES and len(history) == 3
    assert [file.path for file in client.list_artifacts(child.mlflow_run_id)] == ["config.yaml"]
    with psycopg2.connect(postgres) as database, database.cursor() as rows:
        query = "SELECT step, value FROM metrics WHERE run_uuid = %s AND key = 'train/loss'"
        rows.execute(query, [child.mlflow_run_id])
        assert dict(rows.fetchall()) == LOSSES


def test_a_browser_shows_the_pair_and_its_curve(server: Server, pair: tuple[TrackedRun, TrackedRun]) -> None:
    parent, child = pair
    experiment = f"{server.uri}/#/experiments/{parent.experiment_id}"
    with chromium() as browser:

        def text() -> str:
            return browser.execute_script("return document.body.innerText")

        def traces() -> list:
            drawn = "[...document.querySelectorAll('.js-plotly-plot')].flatMap((plot) => plot.data ?? [])"
            return browser.execute_script(f"return {drawn}.map((each) => [[...each.x ?? []], [...each.y ?? []]])")

        def links() -> str:
            return browser.execute_script("return [...document.querySelectorAll('a')].map((link) => link.href).join()")

        browser.get(f"{experiment}/runs/{child.mlflow_run_id}")
        assert wait_for(lambda: "Parent run" in text() and parent.mlflow_run_id in links(), 60), text()
        browser.get(f"{experiment}/runs/{child.mlflow_run_id}/model-metrics")
        assert wait_for(lambda: [[*LOSSES], [*LOSSES.values()]] in traces(), 60), (text(), traces())
        browser.get(f"{experiment}/runs")
        assert wait_for(lambda: "parent-" in text(), 60), text()

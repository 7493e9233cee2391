"""The table of a run's events in MLflow: what happened, once, for people who look there."""

from __future__ import annotations

import mlflow
import pytest

from nestling.tracking import RunFolder, TrackedRun, Tracker, event_table, start


@pytest.fixture
def run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    found = start({}, folder, None, "tests")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found.uri)  # where load_table looks
    return found


def table(run: TrackedRun) -> list[tuple[str, int, int]]:
    """Kind, step and window of each event, read as a person would."""
    rows = mlflow.MlflowClient(run.uri).load_table(run.experiment_id, "events.json", [run.mlflow_run_id])
    return [tuple(row) for row in rows[["kind", "step", "window"]].values.tolist()]


def tell(folder: RunFolder, run: TrackedRun, *events: tuple[str, int, int]) -> None:
    """Events as one process records them."""
    tracker = Tracker(folder, run.uri, run.mlflow_run_id)
    for kind, step, window in events:
        tracker.event(kind, f"{kind} at {step}", step=step, window=window)
    tracker.close()


def test_alarms_are_a_table_in_mlflow_with_every_event_once(folder: RunFolder, run: TrackedRun) -> None:
    first = [("drift", 6, 2), ("rolled-back", 4, 2), ("checkpoint", 10, 3)]
    tell(folder, run, *first)
    assert table(run) == first[:2]  # snapshots come all the time
    tell(folder, run, ("resumed", 4, 2), *first, ("rolled-back", 4, 3))  # a crash, and what it had seen once more
    assert table(run) == [*first[:2], ("resumed", 4, 2), ("rolled-back", 4, 3)]
    tags = mlflow.MlflowClient(run.uri).get_run(run.mlflow_run_id).data.tags
    assert tags["mlflow.loggedArtifacts"].count("events.json") == 1


def test_the_table_holds_the_last_events_only(
    folder: RunFolder, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_table, "LIMIT", 2)
    tell(folder, run, *(("drift", step, step) for step in range(5)))
    assert table(run) == [("drift", 3, 3), ("drift", 4, 4)]

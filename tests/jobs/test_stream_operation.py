"""A person works on a stream: levels change while it runs, and it goes back to a snapshot.

Real processes, one of them killed; what must be equal is equal to the bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from tests.jobs.in_process import result
from tests.jobs.streams import begin, outcome, verified
from tests.jobs.test_faults import events
from tests.jobs.test_stream_faults import texts
from typer.testing import CliRunner

from nestling.checkpoint import OpenCheckpoint, Store, grown
from nestling.config import from_yaml
from nestling.jobs.app import app
from nestling.models import build
from nestling.tracking.files import read_json

STEPS = 120

__all__ = ["texts"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def call(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def logits(found: OpenCheckpoint, config_of: OpenCheckpoint | None = None) -> torch.Tensor:
    """What the model of a snapshot says, by its own configuration or that of another one."""
    config = from_yaml((config_of or found).documents["config.yaml"])
    model = build(config.model)
    found = grown(found, config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(found.pieces.read(f"weight/{name}").view(parameter.shape))
    with torch.no_grad():
        said: torch.Tensor = model(torch.arange(128)[None] % 256)[0]
    return said


def end_of(runs: Path, folder: Path) -> dict[str, Any]:
    """Where the stream ends when it goes on."""
    summary = result(runs, "stream", "--resume", json.loads((folder / "run.json").read_text())["run_id"])
    assert summary["steps"] == STEPS
    verified(runs, folder)
    return outcome(folder)


def test_levels_change_while_a_stream_runs(
    ray_local: None,
    tmp_path: Path,
    texts: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NESTLING_RUNS", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    source = tmp_path_factory.mktemp("source")

    def grow(part: slice) -> None:
        for file in texts.iterdir():
            with (source / file.name).open("a") as growing:
                growing.writelines(file.read_text().splitlines(keepends=True)[part])

    grow(slice(20))  # the stream waits behind that, until both changes are asked for
    run = begin(tmp_path, source, "checkpoint.keep=99", "stream.close_after=0.5", steps=STEPS)
    folder = run.reaches(12)
    size = sum(file.stat().st_size for file in source.iterdir())
    run.until(lambda: sum(read_json(folder / "position.json")["offsets"].values()) == size)
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    added = call("level", "add", run_id, "--period", 4, "--width", 16)
    assert (added["level"], added["taken_up"]) == ("level3", False)
    changed = call("level", "period", run_id, "level1", 9)
    assert (changed["period_before"], changed["taken_up"]) == (7, False)
    grow(slice(20, None))
    refused = CliRunner().invoke(app, ["snapshot", "restore", run_id, "--step", "10"])
    assert refused.exit_code == 2 and "is being trained by process" in refused.output
    run.until(lambda: len(events(folder, "resumed")) == 1)
    at = events(folder, "resumed")[0]["step"]
    log = folder / "log.jsonl"
    run.until(lambda: log.read_bytes().count(b"\n") >= at + 25)
    run.kill()
    assert [event["level"] for event in events(folder, "levels")] == ["level3", "level1"]
    live = end_of(tmp_path, folder)

    # The two snapshots around the change: the same logits, and the same state of what was there before.
    store = Store(folder / "checkpoints")
    before, after = (store.open(each) for each in store.checkpoints()[::-1] if each.step in (at, at + 10))
    config = from_yaml(after.documents["config.yaml"])
    assert [(level.name, level.period) for level in config.levels] == [("level3", 4), ("level1", 9), ("level2", 5)]
    assert torch.equal(logits(before), logits(before, config_of=after))
    assert not torch.equal(logits(before), logits(after))
    lineage = json.loads(after.documents["state.json"])["lineage"]
    changes = next(entry for entry in lineage if "levels" in entry)
    assert changes["from"] == before.checkpoint.name
    assert sorted(each["level"] for each in changes["levels"]) == ["level1", "level3"]
    assert {each["step"] for each in call("snapshot", "list", run_id)["snapshots"] if each["good"]} >= {at, at + 10}

    # From then on each level moves at its period, by the steps of the stream.
    updates = {
        record["step"]: [int(record.get(f"levels/level{n}/updates", -1)) for n in (1, 2, 3)]
        for record in map(json.loads, log.read_text().splitlines())
    }
    assert updates[at][2] == -1
    for step in range(at + 1, STEPS + 1):
        expected = [at // 7 + step // 9 - at // 9, step // 5, step // 4 - at // 4]
        assert updates[step] == expected, step
    assert any(row["name"].startswith("CMS level3") for row in call("levels", run_id)["components"])

    # MLflow has the change as tags and new parameters, and what the new level does from there on.
    info = json.loads((folder / "run.json").read_text())
    client = MlflowClient(info["tracking_uri"])
    recorded = client.get_run(info["mlflow_run_id"]).data
    assert recorded.tags["nestling.resumed.levels.0.name"] == "level3" and recorded.params["levels.2.name"] == "level2"
    history = client.get_metric_history(info["mlflow_run_id"], "levels/level3/updates")
    assert [metric.step for metric in history] == list(range(at + 1, STEPS + 1))

    # Back to before the change: it goes on as if there had been none ...
    restored = call("snapshot", "restore", run_id, "--step", at)
    assert restored["set_aside"] == list(range(STEPS, at, -10))
    assert [level.name for level in from_yaml((folder / "config.yaml").read_text()).levels] == ["level1", "level2"]
    stands = call("status", run_id)
    assert (stands["steps"], stands["window"]) == (at, restored["window"])
    plain = end_of(tmp_path, folder)
    same = [a[1:2] == b[1:2] for a, b in zip(live["losses"], plain["losses"], strict=True)]
    assert all(same[: at + 1]) and not all(same[at + 1 :])  # the first loss after the change is by the same logits
    # ... and with the same change, made while it rests, it ends as the one that it was made to while it ran.
    call("snapshot", "restore", run_id, "--step", at)
    assert call("level", "add", run_id, "--period", 4, "--width", 16)["taken_up"]
    assert call("level", "period", run_id, 2, 9)["taken_up"]
    assert end_of(tmp_path, folder) == live

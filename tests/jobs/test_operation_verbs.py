"""What `nestling snapshot` and `nestling level` say, do and refuse; test_stream_operation has a stream under way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from nestling.checkpoint import Piece, Saver, Store, load_final, run_store
from nestling.config import JobConfig, RunConfig, from_yaml, to_yaml
from nestling.config.schema import LevelConfig
from nestling.data import Tokenizer
from nestling.evaluation.prequential import Prequential
from nestling.jobs.app import app
from nestling.models import HopeConfig, build
from nestling.tracking import RunFolder
from nestling.tracking.files import replace_json


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NESTLING_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "runs"


@pytest.fixture
def folder(runs: Path) -> RunFolder:
    """A training that was interrupted at step 30, with snapshots of steps 10, 20 and 30."""
    folder = RunFolder.create(runs, "news")
    model = HopeConfig(vocab_size=257, width=8, layers=2, heads=1)
    config = JobConfig(run=RunConfig(dir=str(runs)), model=model, levels=[LevelConfig(8, 2), LevelConfig(8, 8)])
    folder.write_config(to_yaml(config))
    Tokenizer.bytes().save(folder.tokenizer)
    for step in (10, 20, 30):
        save(run_store(config, folder), step, config)
        with folder.log.open("a") as log:
            log.write(json.dumps({"step": step, "train/tokens_per_second": 100 + step}) + "\n")
    folder.update(status="interrupted", steps=30)
    return folder


def save(store: Store, step: int, config: JobConfig, **more: Any) -> None:
    torch.manual_seed(step)
    pieces = [Piece(f"weight/{name}", 0, p.detach().flatten()) for name, p in build(config.model).named_parameters()]
    state = {"step": step, "loss": 3.0, "lineage": [], "updates": {"level1": step // 2}, "optimizer": {}, **more}
    saver = Saver(store, 0, 1, 5, 0, lambda *_: None, lambda _, reason: print(reason))
    saver.write(step, "token", pieces, {"state.json": json.dumps(state), "config.yaml": to_yaml(config)})
    saver.commit(metric=step / 10)
    assert saver.wait()


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def result(*arguments: object) -> dict[str, Any]:
    ended = call(*arguments, "--json")
    assert ended.exit_code == 0, ended.output
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_snapshots_are_listed_and_checked(folder: RunFolder) -> None:
    newest = folder.path / "checkpoints" / "step-00000030"
    (newest / "rank-00000.safetensors").write_bytes(b"")
    assert result("snapshot", "pin", "news", "--step", 10) == {
        **{"run_id": folder.run_id, "step": 10, "pinned": True, "checkpoint": "step-00000010"},
    }
    found = result("snapshot", "list", "news")
    assert found["damaged"] == [] and [each["step"] for each in found["snapshots"]] == [30, 20, 10]
    assert [each["good"] for each in found["snapshots"]] == [False, True, True]
    assert [each["pinned"] for each in found["snapshots"]] == [False, False, True]
    assert "rank-00000.safetensors has 0 bytes" in found["snapshots"][0]["problem"]
    last = found["snapshots"][2]
    assert (last["metric"], last["window"], last["lineage"]) == (1.0, None, []) and last["bytes"] > 10_000
    said = call("snapshot", "list", "news").output
    assert "damaged" in said and "good, pinned" in said
    assert not result("snapshot", "pin", "news", "--step", 10, "--off")["pinned"]
    assert result("snapshot", "pin", "news")["step"] == 30


def test_a_training_goes_back_to_a_snapshot(folder: RunFolder) -> None:
    result("level", "add", "news", "--period", 4, "--width", 16)
    folder.update(status="finished")
    found = result("snapshot", "restore", "news", "--step", 10)
    assert (found["step"], found["window"], found["set_aside"]) == (10, None, [30, 20])
    assert Path(found["checkpoint"]).name == "step-00000010"
    info = folder.info()
    assert (info["status"], info["steps"], info["tokens"], info["train_loss"]) == ("interrupted", 10, 40960, 3.0)
    assert (folder.path / "checkpoints/set-aside-1/step-00000030/manifest.json").exists()
    stands = result("status", "news")
    assert (stands["snapshot"], stands["steps"], stands["tokens"]) == (found["checkpoint"], 10, 40960)
    assert (stands["levels"], stands["tokens_per_second"]) == ({"level1": 5}, 110.0)
    # The levels are those of then, and so is the model.
    model, _, config = load_final(folder)
    assert [level.name for level in config.levels] == ["level1", "level2"]
    torch.manual_seed(10)
    assert torch.equal(model.head.weight, build(config.model).head.weight)  # type: ignore[union-attr]


def test_status_of_a_stream_at_rest_is_what_it_goes_on_from(folder: RunFolder) -> None:
    """Its log and position are ahead of the newest snapshot, as they are when the run was killed or taken back."""
    config, position = from_yaml(folder.config.read_text()), {"window": 3, "offsets": {"0": 7}, "latest": {}}
    prequential = Prequential(0.98)
    prequential.add({"": 8 * math.log(2)}, {"": 2.0})
    stream = {"position": position, "prequential": prequential.state(), "records": {"mood": 4}, "batches_done": 0}
    save(run_store(config, folder), 15, config, stream=stream)
    save(run_store(config, folder), 25, config, stream=stream | {"position": position | {"window": 4}})
    replace_json(folder.position, {"window": 9, "offsets": {"0": 70}})
    result("snapshot", "restore", "news", "--step", 25)
    names = ("steps", "window", "offsets", "prequential_bits_per_byte", "tokens_per_second")
    assert [result("status", "news")[name] for name in names] == [25, 4, {"0": 7}, 4.0, 120.0]
    (folder.path / "checkpoints/step-00000025/state.json").write_text("{}")  # the one before it is taken
    assert [result("status", "news")[name] for name in names] == [15, 3, {"0": 7}, 4.0, 110.0]
    with folder.claim():  # a run that goes on says so itself
        folder.update(status="running")
        assert [result("status", "news")[name] for name in names] == [30, 9, {"0": 70}, None, 130.0]


def test_a_level_is_added_and_all_verbs_follow(folder: RunFolder) -> None:
    before, text = load_final(folder)[0], torch.arange(64)[None]
    found = result("level", "add", "news", "--period", 4, "--width", 16)
    assert found == {
        **{"run_id": folder.run_id, "level": "level3", "period": 4, "unit": "steps", "width": 16, "taken_up": True},
    }
    after, _, config = load_final(folder)
    assert [level.name for level in config.levels] == ["level1", "level3", "level2"]
    assert torch.equal(before(text)[0], after(text)[0])
    names = {name for name, parameter in after.named_parameters() if not parameter.any()}
    assert names == {f"blocks.{block}.feed_forward.1.out.weight" for block in (0, 1)}
    assert any(row["name"].startswith("CMS level3") for row in result("levels", "news")["components"])
    assert result("generate", "news", "--prompt", "a", "--max-tokens", 3)["tokens"] <= 3
    exported = result("export", "news", "--out", folder.path / "out")
    assert exported["step"] == 30
    assert result("level", "period", "news", "1", 3)["period_before"] == 2
    assert from_yaml(folder.config.read_text()).levels[0].period == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["snapshot", "list", "no"], "no run 'no'"),
        (["snapshot", "pin", "news", "--step", "15"], "has no snapshot of step 15; there are: 30, 20, 10"),
        (["snapshot", "restore", "news", "--step", "15"], "has no snapshot of step 15; there are: 30, 20, 10"),
        (["snapshot", "restore", "news"], "Missing option '--step'"),
        (["snapshot", "list", "empty"], "has no configuration: it ended before it began"),
        (["level", "add", "no", "--period", "4", "--width", "8"], "no run 'no'"),
        (["level", "add", "news", "--period", "0", "--width", "8"], "Input should be greater than or equal to 1"),
        (["level", "add", "news", "--period", "4", "--width", "0"], "Input should be greater than or equal to 1"),
        (
            ["level", "add", "news", "--period", "4", "--width", "8", "--name", "level1"],
            "level1: is the name of a level already",
        ),
        (["level", "add", "empty", "--period", "4", "--width", "8"], "has no configuration: it ended before it began"),
        (["level", "period", "news", "level7", "4"], "got 'level7', needs one of level1, level2, or a number"),
        (["level", "period", "news", "level1", "0"], "Input should be greater than or equal to 1"),
        (["level", "period", "news", "level1", "2"], "level1: moves every 2 already"),
    ],
    ids=str,
)
def test_wrong_usage_changes_nothing(folder: RunFolder, runs: Path, arguments: list[str], message: str) -> None:
    RunFolder.create(runs, "empty")
    before = {path: path.read_bytes() for path in folder.path.rglob("*.*") if path.is_file()}
    ended = call(*arguments, "--json")
    assert ended.exit_code == 2 and message in json.loads(ended.stdout.splitlines()[-1])["error"], ended.output
    after = {path: path.read_bytes() for path in folder.path.rglob("*.*") if path.is_file()}
    new = {path for path in after.keys() - before.keys() if path.suffix in (".lock", ".jsonl")}
    assert {path: text for path, text in after.items() if path not in new} == before


def test_a_training_that_runs_is_left_alone(folder: RunFolder) -> None:
    with folder.claim():
        for arguments in (("snapshot", "restore", "news", "--step", 10), ("level", "period", "news", "level1", 4)):
            ended = call(*arguments)
            assert ended.exit_code == 2 and "is being trained by process" in ended.output.replace("\n", " ")
    assert len(result("snapshot", "list", "news")["snapshots"]) == 3


def test_a_damaged_snapshot_is_nothing_to_go_back_to(folder: RunFolder) -> None:
    (folder.path / "checkpoints" / "step-00000010" / "state.json").write_text("{}")
    ended = call("snapshot", "restore", "news", "--step", 10)
    assert ended.exit_code == 1 and "so the run cannot go on from it" in ended.output.replace("\n", " ")
    assert len(result("snapshot", "list", "news")["snapshots"]) == 3

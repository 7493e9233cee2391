"""`nestling learn` and `nestling forget`: documents in context and by steps, on a small stream that then goes on."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.jobs.test_faults import Run, events
from typer.testing import CliRunner

from nestling.jobs.app import app
from nestling.tracking import RunFolder

JOB = [
    *("training.batch_tokens=256", "data.sequence_length=64", "training.log_every=1", "training.warmup_steps=2"),
    *("training.checkpoint_every=10", "training.steps=4000", "training.learning_rate=0.01", "stream.probe_every=15"),
    *("model.width=32", "model.heads=1", "model.layers=1", "levels=[{width: 32, period: 1}, {width: 32, period: 3}]"),
    *("stream.window_bytes=3000", "stream.carry_state=true"),
]


def called(*arguments: str) -> tuple[int, dict[str, Any], str]:
    ended = CliRunner().invoke(app, [*arguments, "--json"])
    return ended.exit_code, json.loads(ended.stdout.splitlines()[-1]), ended.stderr


def weights(folder: Path) -> dict[str, str]:
    """What every file of weights and state holds."""
    files = [file for file in folder.rglob("*") if file.suffix in (".safetensors", ".json") and "step-" in str(file)]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_documents_are_read_forgotten_and_learnt_and_the_stream_goes_on(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.jsonl"
    one.write_text("The cat sat on the mat, and the cat sat on the hat. " * 8)
    two.write_text("".join(json.dumps({"text": f"row {n} of a table"}) + "\n" for n in range(20)))
    runs = tmp_path / "runs"
    monkeypatch.setenv("NESTLING_RUNS", str(runs))
    run = Run(runs, "stream", "jobs/five-domains.yaml", *JOB)
    folder = run.reaches(25)
    code, found, said = called("learn", "latest", str(one))
    assert code == 2 and "is being trained by" in found["error"]
    run.process.send_signal(signal.SIGTERM)
    code, stream, said = run.ended()
    assert (code, stream["status"]) == (130, "interrupted"), said
    run_id, before = stream["run_id"], weights(folder)

    # In context: no weight changes, what was read adds up, and what is forgotten leaves no trace.
    code, first, said = called("learn", run_id, str(one), "--fast")
    assert code == 0, said
    assert [document["document"] for document in first["documents"]] == [str(one)]
    assert first["documents"][0]["bytes"] == one.stat().st_size and first["steps"] == 0
    assert first["probes"].keys() == {"english"}
    assert all(each["before"] != each["after"] for each in [*first["documents"], *first["probes"].values()])
    code, second, said = called("learn", run_id, str(two), "--fast")
    assert code == 0 and second["probes"]["english"]["before"] == first["probes"]["english"]["after"], said
    sample = ("generate", run_id, "--prompt", "The ", "--max-tokens", "20", "--temperature", "0")
    code, primed, said = called(*sample)
    assert primed["fast_state"] == [str(one), str(two)] and "after reading" in said
    assert called(*sample, "--no-fast")[1]["fast_state"] is None
    assert called("forget", run_id, "--fast")[1] == {"run_id": run_id, "forgotten": True}
    assert called("forget", run_id, "--fast")[1]["forgotten"] is False
    code, again, said = called("learn", run_id, str(one), "--fast")
    assert {**again, "saved": ""} == {**first, "saved": ""}
    assert weights(folder) == before

    # By steps: a new snapshot, from which the stream goes on where it stood; the fast state is of other weights now.
    code, learnt, said = Run(runs, "learn", run_id, str(one), str(two), "--passes", "10").ended()
    assert code == 0, said
    assert all(document["after"] < document["before"] - 0.3 for document in learnt["documents"])
    assert learnt["probes"]["english"]["before"] == pytest.approx(first["probes"]["english"]["before"], rel=1e-6)
    assert (learnt["step"], learnt["steps"]) == (stream["steps"] + 30, 30)
    state = json.loads((Path(learnt["saved"]) / "state.json").read_text())
    older = json.loads((Path(stream["checkpoint"]) / "state.json").read_text())
    assert state["stream"] == older["stream"] and state["updates"]["level1"] == older["updates"]["level1"] + 30
    assert [document["document"] for document in state["lineage"][-1]["learnt"]] == [str(one), str(two)]
    stands, there = called("status", run_id)[1], state["stream"]["position"]
    assert (stands["steps"], stands["levels"]["level1"]) == (learnt["step"], state["updates"]["level1"])
    assert (stands["window"], stands["offsets"]) == (there["window"], there["offsets"])
    assert events(folder, "learnt")[0]["step"] == learnt["step"]
    code, other, said = called(*sample)
    assert other["fast_state"] is None and "which have moved on: it is not used" in said
    steps = learnt["step"] + 30
    code, resumed, said = called("stream", "--resume", run_id, f"training.steps={steps}")
    assert code == 0 and resumed["steps"] == steps and resumed["windows"] > stream["windows"], said
    code, proof, said = called("stream", "--verify", run_id)
    assert code == 0 and proof["ok"] and proof["records"] == resumed["records"], said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learn", "small", "missing.txt"], "missing.txt: cannot be read"),
        (["learn", "small", "empty.txt"], "empty.txt: is empty"),
        (["learn", "small", "broken.jsonl"], "broken.jsonl: line 1 is not JSON"),
        (["learn", "small", "run.dir=runs"], "FILE: got none"),
        (["learn", "other", "text.txt"], "no run 'other'"),
        (["forget", "small"], "needs --fast"),
    ],
)
def test_what_cannot_be_learnt_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("NESTLING_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty.txt", ""), ("broken.jsonl", "{broken\n"), ("text.txt", "a text")):
        (tmp_path / name).write_text(text)
    folder = RunFolder.create(tmp_path / "runs", "small")
    folder.weights.write_bytes(b"weights")
    folder.config.write_text("seed: 0\n")
    folder.update(status="finished", steps=10)
    code, found, _ = called(*arguments)
    assert code == 2 and message in found["error"]

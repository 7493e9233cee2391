"""What tests of streams and the soak share: a small job, streams in processes of their own, and what must be true of
one in the end."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
from tests.jobs.in_process import result
from tests.jobs.test_faults import Run

STEPS = 60
#: Periods of 7 and 5 steps (and EWC's of 7) are in the middle of an accumulation at most snapshots.
JOB = [
    *("training.batch_tokens=256", "data.sequence_length=64", "training.log_every=1", "training.warmup_steps=2"),
    *("training.schedule=constant", "training.evaluate_every=0", "training.checkpoint_every=10"),
    *("model.width=32", "model.heads=1", "model.layers=1", "training.zero_stage=2"),
    *("levels=[{width: 32, period: 7}, {width: 32, period: 5, optimizer: sgd}]", "stream.window_bytes=2000"),
    *("stream.dead_share=0.5", "stream.probe_every=15", "stream.probe_percent=10", "stream.replay_share=0.1"),
    *("stream.replay_bytes=262144", "stream.der_alpha=0.5", "stream.ewc_strength=10000", "stream.ewc_every=7"),
    *("stream.rewarm_factor=2", "stream.carry_state=true"),
]


def job(source: Path | str, *more: str, workers: int = 1, steps: int | None = STEPS) -> list[str]:
    """Arguments of `nestling stream`; the last of a key's values counts."""
    limit = "null" if steps is None else steps
    places = [f"data.source={source}", f"training.workers={workers}", f"training.steps={limit}"]
    return ["jobs/five-domains.yaml", *JOB, *places, *more]


def begin(runs: Path, source: Path | str, *more: str, workers: int = 1, steps: int | None = STEPS) -> Run:
    """A stream of its own."""
    return Run(runs, "stream", *job(source, *more, workers=workers, steps=steps))


def resumed(runs: Path, folder: Path, *more: str) -> Run:
    """A stream that goes on."""
    return Run(runs, "stream", "--resume", json.loads((folder / "run.json").read_text())["run_id"], *more)


def readers(run: Run) -> list[psutil.Process]:
    """The processes of the tasks that read."""
    children = psutil.Process(run.process.pid).children(recursive=True)
    return [child for child in children if "ReadWindows" in "".join(child.cmdline())]


def head(run: Run) -> psutil.Process:
    """Ray's head."""
    children = psutil.Process(run.process.pid).children(recursive=True)
    return next(child for child in children if child.name().startswith("gcs_server"))


def truncate_newest(folder: Path) -> None:
    """Cut the end of the newest snapshot's shard off."""
    shard = max((folder / "checkpoints").glob("step-*")) / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be growing."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be equal to the bit."""
    records = lines(folder / "log.jsonl")
    # Which snapshot a line came with depends on when there was one; what was learnt does not.
    ledger = [
        {key: value for key, value in line.items() if key not in ("ckpt_id", "previous")}
        for line in lines(folder / "ledger.jsonl")
    ]
    return {
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "losses": [(record["step"], record["train/loss"], record["prequential/bits_per_byte"]) for record in records],
        "ledger": ledger,
        "letters": (folder / "dead_letters.jsonl").read_text(),
    }


def verified(runs: Path, folder: Path) -> dict[str, Any]:
    """What `nestling stream --verify` says of a stream that has ended, which must be good; its page in MLflow, too."""
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    found = result(runs, "stream", "--verify", run_id)
    assert found["ok"]
    once_in_mlflow(folder)
    return found


def once_in_mlflow(folder: Path) -> None:
    """No step of a metric has two values in MLflow's database, whatever the run went through."""
    info = json.loads((folder / "run.json").read_text())
    with closing(sqlite3.connect(info["tracking_uri"].removeprefix("sqlite:///"))) as database:
        query = "SELECT key, step, COUNT(*) FROM metrics WHERE run_uuid = ? GROUP BY key, step"
        counted = database.execute(query, (info["mlflow_run_id"],)).fetchall()
    assert {"train/loss", "stream/position_total", "stream/lag_worst"} <= {key for key, _, _ in counted}
    assert [row for row in counted if row[2] > 1] == []


def in_mlflow(folder: Path) -> list[tuple[str, int, int]]:
    """Kind, step and window of the events in MLflow's table of them."""
    run = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
    table = json.loads(next(folder.parent.glob(f"mlartifacts/{run}/artifacts/events.json")).read_text())
    return [tuple(row[table["columns"].index(name)] for name in ("kind", "step", "window")) for row in table["data"]]

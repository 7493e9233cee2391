"""Runs and sweeps as if they had been trained: real folders with numbers that are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from nestling.config import load, to_yaml
from nestling.tracking import RunFolder
from nestling.tuning.comparison.gather import read_run

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
SMALL = ("training.workers=1", "training.zero_stage=0", "model.vocab_size=257", "model.layers=1")
DOMAINS = ("english", "cxx", "js")


def make_run(
    runs: Path, name: str, overrides: Sequence[str] = (), losses: Sequence[float] = (5.0, 4.0), probes: bool = False
) -> RunFolder:
    """A finished run of 512 tokens a step and 1000 tokens a second, evaluated after each; `probes` as of a stream."""
    folder = RunFolder.create(runs, name)
    config = load(JOB, [*SMALL, *overrides])
    folder.write_config(to_yaml(config))
    records: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, 1):
        record = {
            "step": step,
            "train/loss": loss,
            "train/tokens": step * 512.0,
            "train/tokens_per_second": 1000.0,
            "heldout/bits_per_byte": loss,
            "levels/level1/update_norm": 0.5 / step,
            "levels/level2/update_norm": 0.0 if step % 2 else 0.25,
        }
        if probes:
            record |= {f"probe/{name}/bits_per_byte": loss + place for place, name in enumerate(DOMAINS[:step])}
            record |= {"probe/mean_bits_per_byte": loss, "probe/forgetting": 0.5 * step}
        records.append(record)
    folder.log.write_text("".join(json.dumps(record) + "\n" for record in records))
    by_position = [losses[-1] + 0.1 - 0.01 * place for place in range(8)]
    evaluation = {"heldout_bits_per_byte": losses[-1], "bits_per_byte_by_position": by_position, "tokens": 512}
    folder.evaluation.write_text(json.dumps(evaluation))
    folder.update(status="finished")
    return folder


def make_sweep(runs: Path) -> RunFolder:
    """Periods 4 and 16 by two rates with three seeds each: the lower rate is 0.2 better, and 16 is 0.1 better.

    One arm failed before it began, and one was stopped early.
    """
    folder = RunFolder.create(runs / "sweeps", "levels")
    sweep = {
        "name": "levels",
        "question": "How slow may the second level be?",
        "job": "quickstart",
        "objectives": [{"metric": "heldout_bits_per_byte", "mode": "min"}],
        "budget": {"tokens": 2048},
        "seeds": 3,
        "searcher": "grid",
        "scheduler": "asha",
        "command": "nestling sweep tuning/levels.yaml",
        "default": "period 4, rate 0.003",
    }
    folder.write_config(yaml.safe_dump(sweep, sort_keys=False))
    lines: list[dict[str, Any]] = []
    for place, period in enumerate((4, 16)):
        for rate in (0.003, 0.001):
            for seed in range(3):
                lines.append(_trial(runs, folder, place, period, rate, seed))
    broken = dict.fromkeys(("run_id", "parameters")) | {"arm": "period 3, rate 0.003", "seed": 0, "state": "failed"}
    broken |= {"values": {"period": 3, "rate": 0.003}, "error": "3 is <no> multiple", "objectives": {}, "cost": {}}
    first = {**lines[0], "state": "failed", "error": "killed", "objectives": {}}  # before it was run again
    (folder.path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [first, *lines, broken]))
    folder.update(status="finished")
    return folder


def _trial(runs: Path, sweep: RunFolder, place: int, period: int, rate: float, seed: int) -> dict[str, Any]:
    stopped = (period, rate) == (16, 0.003)
    last = 3.0 - 0.1 * place - 0.2 * (rate == 0.001) + 0.05 * seed + 0.01 * ((seed + place) % 2)
    losses = (6.0, 5.0, 4.0, last)[: 2 if stopped else 4]
    overrides = [f"levels.1.period={period}", f"training.learning_rate={rate}", f"seed={seed}"]
    run, arm = make_run(runs, "levels", overrides, losses), f"period {period}, rate {rate:g}"
    run.update(sweep=sweep.run_id, arm=arm, seed=seed)
    found = read_run(run)
    assert found.anatomy is not None
    return {
        "arm": arm,
        "values": {"period": period, "rate": rate},
        "seed": seed,
        "run_id": run.run_id,
        "state": "stopped" if stopped else "finished",
        "error": None,
        "objectives": {"heldout_bits_per_byte": losses[-1]},
        "parameters": found.anatomy.parameters,
        "cost": found.cost,
    }

"""What a trial of a sweep costs beyond its training: `python tests/benchmarks/sweeps.py [--json FILE]`.

Sweeps over one arm with ten seeds, 20 tiny steps a trial, one worker a trial, as many at once as there are cores, with
Ray started by the sweep. Wall time from the end of the first trial to the end of the last, divided by the trials
between, times the trials that run at once, minus the seconds of a trial's optimizer steps. Target: at most 8 s a trial
on two cores after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
import yaml

from nestling.config.load import changed, read_job
from nestling.tuning.sweeps import load_sweep
from nestling.tuning.sweeps.outcome import Outcome
from nestling.tuning.sweeps.plan import make_folder, make_plan
from nestling.tuning.sweeps.run import run_sweep

TRIALS, STEPS, BATCH_TOKENS = 10, 20, 128
JOB = {
    "model": {"name": "hope", "width": 32, "layers": 1, "heads": 2},
    "levels": [{"width": 32, "period": 1}],
    "data": {"source": "embedded:english", "sequence_length": 64},
    "training": {"batch_tokens": BATCH_TOKENS, "warmup_steps": 2, "evaluate_every": 0},
    "evaluation": {"tokens": 1024, "final_tokens": 1024},
}


def measure(place: Path) -> dict[str, float]:
    """Seconds of one sweep, by what they are of."""
    (place / "job.yaml").write_text(yaml.safe_dump(JOB | {"run": {"dir": str(place / "runs")}}))
    space = {"training.learning_rate": [1e-3]}
    sweep = {
        "job": str(place / "job.yaml"),
        "space": space,
        "seeds": TRIALS,
        "budget": {"tokens": STEPS * BATCH_TOKENS},
    }
    (place / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    config = load_sweep(place / "sweep.yaml")
    plan = make_plan(config, changed(read_job(config.job), config.overrides), "")
    ends: list[float] = []
    steps: list[float] = []

    def ended(outcome: Outcome) -> None:
        ends.append(time.perf_counter())
        steps.append(outcome.cost["seconds"])

    began = time.perf_counter()
    run_sweep(plan, make_folder(place / "runs", plan), ended)
    last = time.perf_counter()
    at_once = len(os.sched_getaffinity(0))
    between = (ends[-1] - ends[0]) / (TRIALS - 1)
    return {
        "until the first trial has ended": ends[0] - began,
        "from one trial's end to the next": between,
        "optimizer steps of a trial": sum(steps[1:]) / (TRIALS - 1),
        "overhead of a trial": at_once * between - sum(steps[1:]) / (TRIALS - 1),
        "page and end": last - ends[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = {name: round(seconds, 2) for name, seconds in measure(Path(place)).items()}
    machine = f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), torch {torch.__version__}"
    print(machine)
    for name, seconds in found.items():
        print(f"{name:34} {seconds:6.2f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "trials": TRIALS, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

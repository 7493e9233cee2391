"""How long a run takes to come back: `python tests/benchmarks/faults.py [--json FILE] [--repeats 3]`.

The small run of `tests/jobs/test_faults.py` (two workers, ZeRO 2), of which a worker is killed, then another one whose
driver is killed, then one that is interrupted. Seconds from the kill, or from the start of `nestling resume`, to the
first optimizer step after it; of an interrupt, to the end of the process. Targets: 30 seconds each, on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory_ops import chip

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.jobs.test_faults import JOB, Run, events

LONG = [*JOB, "training.steps=2000"]
AT = 45  # a step in the middle between two checkpoints


def first_step(run: Run, folder: Path, since: float) -> float:
    """Seconds until the run has taken a step after it resumed."""
    resumed = len(events(folder, "resumed"))
    run.until(lambda: len(events(folder, "resumed")) > resumed)
    log = folder / "log.jsonl"
    at_checkpoint = log.read_bytes().count(b"\n")
    run.until(lambda: log.read_bytes().count(b"\n") > at_checkpoint)
    return time.monotonic() - since


def measure(runs: Path) -> dict[str, float]:
    """One of each fault."""
    run = Run(runs, "train", "quickstart", *LONG)
    folder = run.reaches(AT)
    killed = time.monotonic()
    run.workers()[1].kill()
    worker = first_step(run, folder, killed)
    run.kill()

    started = time.monotonic()
    run = Run(runs, "resume", folder.name.rpartition("-")[2])
    driver = first_step(run, folder, started)
    asked = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    code, summary, err = run.ended()
    assert code == 130, err
    return {
        "a worker killed": worker,
        "nestling resume after the driver was killed": driver,
        "Ctrl-C to the end": time.monotonic() - asked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = [measure(Path(folder)) for _ in range(options.repeats)]
    print(f"{chip()}, two workers of one thread; torch {torch.__version__}, Python {platform.python_version()}")
    seconds = {fault: [found[fault] for found in measured] for fault in measured[0]}
    for fault, values in seconds.items():
        print(f"{fault:>44} {statistics.median(values):5.1f} s  (from {min(values):.1f} to {max(values):.1f})")
    if options.json:
        facts = {"chip": chip(), "torch": torch.__version__, "python": platform.python_version()}
        options.json.write_text(json.dumps(facts | {"seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()

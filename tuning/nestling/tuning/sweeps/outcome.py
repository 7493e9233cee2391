"""What a trial came to, read from the folder of its run; a line of `trials.jsonl`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestling.tracking import RunFolder
from nestling.tracking.runs import list_runs

#: Objectives that a run logs, by the keys of its log.
LOGGED = {
    "heldout_bits_per_byte": "heldout/bits_per_byte",
    "prequential_bits_per_byte": "prequential/bits_per_byte",
    "train_loss": "train/loss",
}
#: Objectives that are known of an arm, or follow from how far a run came.
COSTS = ("tokens", "seconds", "flops", "parameters", "flops_per_token")
METRICS = (*LOGGED, *COSTS)


@dataclass(frozen=True)
class Outcome:
    """A trial that ended.

    Attributes:
        arm: label of its configuration, the same for all seeds.
        values: what varies, as a person would name it.
        seed: the job's seed.
        run_id: its run; None if it never began.
        state: `finished`, `stopped` by the scheduler, or `failed`.
        error: why it failed, on one line.
        objectives: what the sweep compares by; without those that are not known.
        parameters: of its model.
        cost: tokens, seconds of training (evaluation aside) and flops.
    """

    arm: str
    values: dict[str, Any]
    seed: int
    run_id: str | None
    state: str
    error: str | None
    objectives: dict[str, float]
    parameters: int
    cost: dict[str, float] = field(default_factory=dict)


class Lines:
    """`trials.jsonl` of a sweep: a line for each trial that ended, of which the last for an arm and seed counts."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.path / "trials.jsonl"

    def append(self, outcome: Outcome) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")

    def outcomes(self) -> dict[tuple[str, int], Outcome]:
        """The last outcome of each arm and seed."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [Outcome(**json.loads(line)) for line in lines if line.endswith("\n")]
        return {(each.arm, each.seed): each for each in found}


def trial_folders(runs_dir: Path, sweep_id: str) -> dict[tuple[str, int], RunFolder]:
    """The runs of a sweep's trials by arm and seed."""
    found = {}
    for folder in list_runs(runs_dir):
        info = folder.info()
        if info.get("sweep") == sweep_id:
            found[info["arm"], info["seed"]] = folder
    return found


def costs(folder: RunFolder, flops_per_token: float, until: float = math.inf) -> dict[str, float]:
    """What a run has used up by a step."""
    tokens = seconds = 0.0
    for record in folder.records():
        if record["step"] > until or "train/tokens" not in record:
            continue
        rate = record.get("train/tokens_per_second")
        seconds += (record["train/tokens"] - tokens) / rate if rate else 0.0
        tokens = record["train/tokens"]
    return {"tokens": int(tokens), "seconds": seconds, "flops": tokens * flops_per_token}


def measured(
    folder: RunFolder, metrics: list[str], parameters: int, flops_per_token: float, until: float = math.inf
) -> dict[str, float]:
    """The objectives of a run by a step; those that it has not come to are left out."""
    last: dict[str, float] = {}
    for record in folder.records():
        if record["step"] <= until:
            last |= record
    known = {name: last[key] for name, key in LOGGED.items() if key in last}
    known |= costs(folder, flops_per_token, until) | {"parameters": parameters, "flops_per_token": flops_per_token}
    return {metric: known[metric] for metric in metrics if math.isfinite(known.get(metric, math.nan))}

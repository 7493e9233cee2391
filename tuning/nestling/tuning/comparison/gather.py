"""Runs from their folders: what they were to do, what they measured, and what that took.

A run's `log.jsonl` and `evaluation.json` are the truth; MLflow is not asked. What a token costs in floating-point
operations, and how many parameters move how often, is derived from the configuration as `nestling levels` does it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from nestling.config import JobConfig, RunConfig, from_yaml, to_mapping, to_yaml
from nestling.tracking import RunFolder
from nestling.tracking.parameters import flatten

#: What a run's length may be measured in, and what people call that.
AXES = {"tokens": "tokens", "seconds": "seconds", "flops": "FLOPs"}

#: Keys that decide where a run is kept and how often it is looked at, not what it learns; and what is handed on from
#: `levels`. The seed tells the runs of an arm apart.
_BESIDE = (
    *("seed", "run.", "tracking.", "checkpoint.", "model.level_widths", "model.level_layers", "training.max_failures"),
    *("training.log_every", "training.evaluate_every", "training.checkpoint_every"),
)


class ComparisonError(ValueError):
    """What was given cannot be compared; the message is complete and ready to print."""


@dataclass(frozen=True)
class Anatomy:
    """What a configuration says of the model and of its training.

    Attributes:
        parameters: trained numbers.
        flops_per_token: as `nestling levels` adds it up: reading, and every component's own rule; no backward pass.
        periods: trained numbers by the optimizer steps from one of their moves to the next.
    """

    parameters: int
    flops_per_token: float
    periods: dict[float, int]


@dataclass(frozen=True)
class Run:
    """One run: a configuration with one seed.

    Attributes:
        run_id, name, status: as in `run.json`; a trial of a sweep that never began has no id.
        seed: of the configuration.
        settings: what decides about what is learnt: dotted keys, and values as JSON.
        records: those of `log.jsonl`.
        metrics: the last value of everything that was measured, by its name in MLflow with `_` for `/`.
        by_position: held-out bits per byte in equal stretches of a sequence, from its beginning; empty if not measured.
        places: of each logged step the tokens, seconds and FLOPs until then.
        cost: tokens, seconds and FLOPs of the whole run.
        anatomy: None where the run has no configuration.
    """

    run_id: str | None
    name: str
    status: str
    seed: int
    settings: dict[str, str] = field(default_factory=dict)
    records: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    by_position: list[float] = field(default_factory=list)
    places: dict[int, dict[str, float]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    anatomy: Anatomy | None = None


def read_run(folder: RunFolder) -> Run:
    """Take up a run from its folder.

    Raises:
        ComparisonError: it has logged nothing.
    """
    info, records = folder.info(), [record for record in folder.records() if "train/tokens" in record]
    if not records or not folder.config.is_file():
        raise ComparisonError(
            f"run {folder.run_id} ({folder.name}, {info['status']}) has logged no step in {folder.log}; "
            "leave it out, or train it first (nestling resume, nestling stream --resume)"
        )
    config = from_yaml(folder.config.read_text(encoding="utf-8"))
    evaluation = json.loads(folder.evaluation.read_text(encoding="utf-8")) if folder.evaluation.is_file() else {}
    anatomy = _anatomy(to_yaml(replace(config, seed=0, run=RunConfig("run", "runs"))))
    places = _places(records, anatomy.flops_per_token)
    return Run(
        run_id=folder.run_id,
        name=folder.name,
        status=info["status"],
        seed=config.seed,
        settings=_settings(config),
        records=records,
        metrics=_metrics(records, evaluation),
        by_position=evaluation.get("bits_per_byte_by_position", []),
        places=places,
        cost=list(places.values())[-1],
        anatomy=anatomy,
    )


def _settings(config: JobConfig) -> dict[str, str]:
    flat = flatten(to_mapping(config))
    return {key: value for key, value in flat.items() if not key.startswith(_BESIDE)}


def _metrics(records: list[dict[str, float]], evaluation: Mapping[str, Any]) -> dict[str, float]:
    last = {key.replace("/", "_"): value for record in records for key, value in record.items()}
    return last | {key: value for key, value in evaluation.items() if isinstance(value, float)}


def _places(records: list[dict[str, float]], flops_per_token: float) -> dict[int, dict[str, float]]:
    """The seconds are those of the optimizer steps: tokens by tokens per second, from record to record."""
    places, tokens, seconds = {}, 0.0, 0.0
    for record in records:
        if record.get("train/tokens_per_second"):
            seconds += (record["train/tokens"] - tokens) / record["train/tokens_per_second"]
        tokens = record["train/tokens"]
        places[int(record["step"])] = {"tokens": tokens, "seconds": seconds, "flops": tokens * flops_per_token}
    return places


@cache
def _anatomy(job: str) -> Anatomy:
    """Of a job without seed and name, so that it is derived once for all of them."""
    from nestling.training.nested import nested_view

    rows = nested_view(from_yaml(job))
    periods: dict[float, int] = {}
    for row in rows:
        if row.component.parameters:
            every = round(1 / row.updates_per_step, 6)
            periods[every] = periods.get(every, 0) + row.component.parameters
    return Anatomy(
        parameters=sum(row.component.parameters for row in rows),
        flops_per_token=sum(row.component.flops_per_token for row in rows),
        periods=dict(sorted(periods.items())),
    )

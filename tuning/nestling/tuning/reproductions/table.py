"""Outcomes as rows: ours with its spread over the seeds, the paper's number, the chance level."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nestling.tuning.reproductions.engine import Failure, best_candidate, chosen
from nestling.tuning.reproductions.experiment import Arm, Experiment, Trial

Row = dict[str, Any]


def rows(experiment: Experiment, ended: Sequence[Trial | Failure]) -> list[Row]:
    """One row for each arm and metric, in the experiment's order.

    `ours` is the mean over the seeds and `spread` their standard deviation (None for one seed); `lowest` and `highest`
    stand beside it. Where `ours` is None, `why` says "failed" (no trial came to an end), "diverged" (with some seed) or
    "not measured" (only the paper has it; our trials' counts do not belong to it).
    """
    return [row for arm in experiment.arms for row in _rows(arm, ended)]


def _rows(arm: Arm, ended: Sequence[Trial | Failure]) -> list[Row]:
    trials = chosen(arm, ended)
    made = []
    for metric in arm.metrics:
        values = [trial.outcome.metrics[metric] for trial in trials if metric in trial.outcome.metrics]
        known = bool(values) and all(map(math.isfinite, values))
        why = None if known else "diverged" if values else "not measured" if trials else "failed"
        made.append(
            {
                "task": arm.task,
                "model": arm.model,
                "metric": metric,
                "ours": statistics.mean(values) if known else None,
                "spread": statistics.stdev(values) if known and len(values) > 1 else None,
                "paper": arm.paper.get(metric),
                "chance": trials[0].outcome.chance.get(metric) if trials else None,
                "seeds": len(values),
                "why": why,
                "tokens": round(statistics.mean(trial.outcome.tokens for trial in trials)) if values else None,
                "parameters": trials[0].outcome.parameters if values else None,
                "unit": arm.units.get(metric, ""),
                "lowest": min(values) if known else None,
                "highest": max(values) if known else None,
                "candidate": best_candidate(arm, ended) if len(arm.candidates) > 1 else None,
                "seconds": round(statistics.mean(trial.seconds for trial in trials), 1) if trials else None,
            }
        )
    return made


HEADINGS = {
    "task": "task",
    "model": "model",
    "metric": "metric",
    "ours": "ours",
    "paper": "paper",
    "chance": "chance",
    "seeds": "seeds",
    "tokens": "tokens",
    "parameters": "parameters",
}


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as a person reads it, by the keys of `HEADINGS`."""
    ours = with_spread(row["ours"], row["spread"]) if row["ours"] is not None else row["why"]
    model = f"{row['model']} ({row['candidate']})" if row["candidate"] else row["model"]
    counts = {key: "" if row[key] is None else f"{row[key]:,}" for key in ("seeds", "tokens", "parameters")}
    given = {key: "" if row[key] is None else number(row[key]) for key in ("paper", "chance")}
    return {"task": row["task"], "model": model, "metric": row["metric"], "ours": ours, **given, **counts}


def with_spread(value: float, spread: float | None) -> str:
    """Value ± spread, both to the second digit of the spread; without one, the value as `number` has it."""
    if not spread:
        return number(value) if spread is None else f"{number(value)} ± 0"
    decimals = min(max(1 - math.floor(math.log10(spread)), 0), 4)
    return f"{value:.{decimals}f} ± {spread:.{decimals}f}"


def number(value: float) -> str:
    """Four decimals at most; what is smaller than that in two digits."""
    return f"{value:.2g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}".rstrip("0").rstrip(".")


def markdown(
    experiment: Experiment, made: Sequence[Row], command: str, setting: str, trials: Sequence[Trial] = ()
) -> str:
    """The table with its heading, what made it, and the notes; the figure lies beside it under the same name."""
    lines = [
        f"# {experiment.title}",
        "",
        f"{experiment.source}. Made by `{command}`; {setting}.",
        "",
        _line_by_line(made) if experiment.tabulate is None else experiment.tabulate(trials),
        "",
        f"![{experiment.title}](reproduce-{experiment.name}.png)",
    ]
    if experiment.notes:
        lines += ["", *(f"- {note}" for note in experiment.notes)]
    return "\n".join(lines) + "\n"


def _line_by_line(made: Sequence[Row]) -> str:
    """A line for each arm and metric."""
    lines = [
        f"| {' | '.join(HEADINGS.values())} |",
        "|---" * len(HEADINGS) + "|",
        *(f"| {' | '.join(cells(row)[key] for key in HEADINGS)} |" for row in made),
        "",
        "Ours: mean over the seeds ± standard deviation; in the picture, from the lowest seed to the highest. "
        "Chance: what guessing scores.",
    ]
    return "\n".join(lines)

"""Runs as arms: those that differ in nothing but the seed are one, and what tells the arms apart is named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from nestling.tuning.comparison.gather import ComparisonError, Run
from nestling.tuning.comparison.statistics import Mode, interval

#: What stands for a setting that an arm does not have.
ABSENT = "–"


@dataclass(frozen=True)
class Metric:
    """Something to compare by: its name in `Run.metrics`, what people read, and which way is better."""

    name: str
    label: str
    mode: Mode = "min"


_KNOWN = (
    Metric("heldout_bits_per_byte", "held out, b/B"),
    Metric("prequential_bits_per_byte", "before learning, b/B"),
    Metric("probe_mean_bits_per_byte", "probes, b/B"),
    Metric("probe_worst_bits_per_byte", "worst probe, b/B"),
    Metric("probe_forgetting", "forgetting, b/B"),
    Metric("probe_stability_gap", "stability gap, b/B"),
)
#: What every run has, for comparisons of runs that have nothing better: one batch says little.
_LAST_RESORT = Metric("train_loss", "last batch, nats a token")


@dataclass(frozen=True)
class Arm:
    """What was tried, over its seeds.

    Attributes:
        label: what it is called, unique among the arms that are compared.
        differs: what tells it from the others, in the same order in all of them.
        runs: one for each seed, by seed.
    """

    label: str
    differs: dict[str, str]
    runs: list[Run]

    @property
    def finished(self) -> bool:
        """Whether each of its runs came to its end."""
        return all(run.status == "finished" for run in self.runs)

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    def values(self, metric: str) -> dict[int, float]:
        """By seed; seeds without the metric are left out."""
        return {run.seed: run.metrics[metric] for run in self.runs if metric in run.metrics}

    def interval(self, metric: str) -> tuple[float, float | None] | None:
        """Mean and half the width of its interval; None if no seed has the metric."""
        values = list(self.values(metric).values())
        return interval(values) if values else None

    def cost(self, axis: str) -> float | None:
        """Mean over the seeds of the tokens, seconds or FLOPs that a run took; None if not known."""
        values = [run.cost[axis] for run in self.runs if axis in run.cost]
        return fmean(values) if values else None

    @property
    def parameters(self) -> int | None:
        return next((run.anatomy.parameters for run in self.runs if run.anatomy), None)


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """The arms of at least two runs, in the order of their first ones.

    A second run of the same settings and seed is no more evidence about them, so it goes into an arm of its own.

    Raises:
        ComparisonError: fewer than two runs.
    """
    if len(runs) < 2:
        given = f"only run {runs[0].run_id} ({runs[0].name})" if runs else "no run"
        raise ComparisonError(f"got {given}, needs at least two different ones; nestling runs lists them")
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if group[0].settings == run.settings and run.seed not in (other.seed for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    differing = _differing([group[0].settings for group in groups])
    labels = _labels(groups, differing)
    return [
        Arm(label, differs, sorted(group, key=lambda run: run.seed))
        for label, differs, group in zip(labels, differing, groups, strict=True)
    ]


def metrics_of(arms: Iterable[Arm]) -> list[Metric]:
    """What there is to compare the arms by, the most telling first."""
    measured = {name for arm in arms for run in arm.runs for name in run.metrics}
    return [metric for metric in _KNOWN if metric.name in measured] or [_LAST_RESORT]


def known_metric(name: str, mode: Mode) -> Metric:
    """The metric of a name, called by that name if we have no better one."""
    label = next((metric.label for metric in _KNOWN if metric.name == name), name.replace("_", " "))
    return Metric(name, label, mode)


def _differing(settings: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Of each arm the settings that are not the same in all; levels of different number are one setting."""
    if len({_level_count(each) for each in settings}) > 1:
        settings = [_with_levels_in_one(each) for each in settings]
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    return [{key: _plain(each[key]) if key in each else ABSENT for key in differing} for each in settings]


def _level_count(settings: Mapping[str, str]) -> int:
    return len({key.split(".")[1] for key in settings if key.startswith("levels.")})


def _with_levels_in_one(settings: Mapping[str, str]) -> dict[str, str]:
    """`levels` as "192 every 1, 192 every 4": what is wide how often, and what is not usual."""
    usual = {"unit": "steps", "optimizer": "adamw", "learning_rate": "null"}
    told = []
    for place in range(_level_count(settings)):
        prefix = f"levels.{place}."
        level = {key.removeprefix(prefix): _plain(value) for key, value in settings.items() if key.startswith(prefix)}
        what = next((level[key] for key in ("width", "parameters", "layers") if level[key] not in ("null", "[]")), "")
        others = (f"{key} {level[key]}" for key, value in usual.items() if level[key] != value)
        told.append(" ".join([what, "every", level["period"], *others]))
    rest = {key: value for key, value in settings.items() if key.partition(".")[0] != "levels"}
    return {"levels": ", ".join(told) or "none", **rest}


def _plain(value: str) -> str:
    """A flat setting as a person writes it: texts have no quotes there already, numbers are told briefly."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    return f"{parsed:g}" if isinstance(parsed, float) else value


def _labels(groups: Sequence[Sequence[Run]], differing: Sequence[Mapping[str, str]]) -> list[str]:
    """The arms' names if these tell them apart, else what differs if that is brief, else their runs' ids as well."""
    names = [group[0].name for group in groups]
    if len(set(names)) == len(names) and all(len({run.name for run in group}) == 1 for group in groups):
        return names
    told = [
        ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in each.items())
        for each in differing
    ]
    if len(set(told)) == len(told) and max(map(len, told)) <= 40:
        return told
    return [f"{name} ({group[0].run_id})" for name, group in zip(names, groups, strict=True)]

"""What a sweep found: its trials as arms, the page and figures that show them, and the answer in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nestling.tracking import RunFolder, list_runs
from nestling.tuning.comparison import sweep_charts
from nestling.tuning.comparison.answer import answer
from nestling.tuning.comparison.arms import Arm, Metric, known_metric, metrics_of
from nestling.tuning.comparison.comparison import charts_of
from nestling.tuning.comparison.gather import Anatomy, ComparisonError, Run, read_run
from nestling.tuning.comparison.page import Chart, Page
from nestling.tuning.comparison.table import rows


@dataclass(frozen=True)
class SweepReport:
    """Where the report of a sweep is, and what it says.

    Attributes:
        page: `report.html` in the sweep's folder.
        figures: by name, self-contained HTML files beside it.
        answer: in words.
        best: label of the arm whose mean of the first objective is best; None if no arm finished.
        arms: best first; those that did not finish are last.
        metrics: the objectives, and what else was measured.
    """

    page: Path
    figures: dict[str, Path]
    answer: str
    best: str | None
    arms: list[Arm]
    metrics: list[Metric]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each arm; see `nestling.tuning.comparison.table.rows`."""
        return rows(self.arms, self.metrics)


def sweep_report(folder: RunFolder, runs_dir: Path) -> SweepReport:
    """Write the report of a sweep from its `config.yaml` and `trials.jsonl`, as far as it has come.

    If `config.yaml` names the label of an arm as `default`, the best one is compared with that, too.

    Args:
        folder: the sweep's folder.
        runs_dir: where the trials' runs are.

    Raises:
        ComparisonError: no trial has ended.
    """
    sweep = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    objectives = [known_metric(each["metric"], each["mode"]) for each in sweep["objectives"]]
    trials = _trials(folder)
    arms = _ranked(_arms(trials, runs_dir), objectives[0])
    names = [metric.name for metric in objectives]
    metrics = [*objectives, *(metric for metric in metrics_of(arms) if metric.name not in names)]
    best, said = answer(arms, objectives, sweep.get("default"))
    axis = next(axis for axis in ("flops", "seconds", "tokens") if not sweep["budget"].get(axis))
    charts = _charts(arms, objectives)
    lead = [*filter(None, [sweep["question"]]), said, *_failures(trials)]
    page = Page(f"Sweep {sweep['name']}", lead, arms, metrics, charts, sweep["command"], axis)
    page.write(folder.path / "report.html")
    figures = folder.path / "figures"
    figures.mkdir(exist_ok=True)
    wanted = [chart for chart in charts if chart.name in _FIGURES or chart.name == _curve_name(objectives, charts)]
    for chart in wanted:
        alone = replace(page, title=chart.heading, lead=[chart.note], charts=[replace(chart, heading="", note="")])
        replace(alone, table=False).write(figures / f"{chart.name}.html")
    files = {chart.name: figures / f"{chart.name}.html" for chart in wanted}
    return SweepReport(folder.path / "report.html", files, said, best, arms, metrics)


_FIGURES = ("by-parameter", "parallel", "by-cost", "level-frequencies")


def _charts(arms: Sequence[Arm], objectives: Sequence[Metric]) -> list[Chart]:
    own = [
        Chart(
            "by-parameter",
            "Objective against each parameter",
            sweep_charts.by_parameter(arms, objectives),
            "Means over the seeds with their 95 % intervals; the colours are the arms'.",
        ),
        Chart("parallel", "Parameters and objective, a line for each arm", sweep_charts.parallel(arms, objectives)),
        Chart(
            "by-cost",
            "Objective against cost",
            sweep_charts.by_cost(arms, objectives),
            "Dotted: the Pareto front, arms that no cheaper one is as good as.",
        ),
        Chart(
            "level-frequencies",
            "How often parameters move",
            sweep_charts.level_frequencies(arms),
            "Share of each arm's parameters by the steps from one of their moves to the next; the best arm is on top.",
        ),
    ]
    return [*(chart for chart in own if chart.figure is not None), *charts_of(arms)]


def _curve_name(objectives: Sequence[Metric], charts: Sequence[Chart]) -> str | None:
    """The learning curves that go with the first objective, else the first ones there are."""
    names = [chart.name for chart in charts if chart.name not in _FIGURES]
    return next((name for name in names if name.replace("-", "_") == objectives[0].name), next(iter(names), None))


def _trials(folder: RunFolder) -> list[dict[str, Any]]:
    """The last line of each arm and seed."""
    path = folder.path / "trials.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    trials = [json.loads(line) for line in lines if line.endswith("\n")]
    if not trials:
        raise ComparisonError(
            f"sweep {folder.run_id} ({folder.name}, {folder.status()}) has no trial that ended; "
            f"go on with it: nestling sweep --resume {folder.run_id}"
        )
    return list({(trial["arm"], trial["seed"]): trial for trial in trials}.values())


def _arms(trials: Sequence[Mapping[str, Any]], runs_dir: Path) -> list[Arm]:
    folders = {folder.run_id: folder for folder in list_runs(runs_dir)}
    keys = dict.fromkeys(key for trial in trials for key in trial["values"])
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        grouped.setdefault(trial["arm"], []).append(trial)
    return [
        Arm(
            label,
            {key: _told(group[0]["values"].get(key, "–")) for key in keys},
            sorted((_run(trial, folders.get(trial["run_id"])) for trial in group), key=lambda run: run.seed),
        )
        for label, group in grouped.items()
    ]


def _told(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _run(trial: Mapping[str, Any], folder: RunFolder | None) -> Run:
    """A trial's run, with what the sweep knows of it."""
    try:
        run = read_run(folder) if folder else Run(trial["run_id"], trial["arm"], trial["state"], trial["seed"])
    except ComparisonError:  # it failed before its first step
        run = Run(trial["run_id"], trial["arm"], trial["state"], trial["seed"])
    known = {metric: value for metric, value in trial["objectives"].items() if value is not None}
    return replace(
        run,
        status=trial["state"],
        metrics=run.metrics | known,
        cost=run.cost | {axis: value for axis, value in trial["cost"].items() if value is not None},
        anatomy=run.anatomy or (Anatomy(trial["parameters"], 0.0, {}) if trial["parameters"] else None),
    )


def _ranked(arms: Sequence[Arm], objective: Metric) -> list[Arm]:
    """The best mean first, then what did not finish."""

    def place(arm: Arm) -> tuple[bool, float]:
        found = arm.interval(objective.name)
        mean = found[0] if found else 0.0
        return not (found and arm.finished), mean if objective.mode == "min" else -mean

    return sorted(arms, key=place)


def _failures(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"Failed: {trial['arm']}, seed {trial['seed']}: {trial['error']}"
        for trial in trials
        if trial["state"] == "failed"
    ]

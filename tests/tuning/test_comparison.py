"""Runs beside each other: which are one arm, what differs, what the seeds allow to say, and where the numbers go."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tests.tuning.finished import make_run

from nestling.config import load
from nestling.tracking import RunFolder
from nestling.tuning.comparison import ComparisonError, compare
from nestling.tuning.comparison.answer import answer
from nestling.tuning.comparison.arms import Arm, Metric, arms_of
from nestling.tuning.comparison.gather import Run, read_run
from nestling.tuning.comparison.statistics import interval, paired, pareto_front, verdict
from nestling.tuning.comparison.table import cells

BITS = Metric("heldout_bits_per_byte", "held out, b/B")


def arm(label: str, *values: float, status: str = "finished") -> Arm:
    runs = [Run(label, label, status, seed, metrics={BITS.name: value}) for seed, value in enumerate(values)]
    return Arm(label, {}, runs)


def test_intervals_and_paired_differences_are_those_of_scipy() -> None:
    own, other = np.random.default_rng(0).normal(size=(2, 5))
    mean, half = interval(own.tolist())
    low, high = stats.t.interval(0.95, 4, loc=own.mean(), scale=stats.sem(own))
    assert (mean, half) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-12)
    difference = paired(dict(enumerate(own)), {seed + 1: value for seed, value in enumerate(other)} | {0: 9.0})
    assert difference is not None and difference.seeds == 5
    reference = stats.ttest_rel(own, [9.0, *other[:4]]).confidence_interval(0.95)
    assert difference.mean - difference.half == pytest.approx(reference.low, rel=1e-12)
    assert difference.mean + difference.half == pytest.approx(reference.high, rel=1e-12)
    assert paired({0: 1.0}, {1: 1.0}) is None and interval([3.0]) == (3.0, None)


def test_who_wins_has_beaten_each_other_arm() -> None:
    seeds = {0: 1.0, 1: 5.0, 2: 3.0}  # seeds differ by far more than arms, which pairing takes away
    low = {seed: value - 0.1 - 0.001 * seed for seed, value in seeds.items()}
    near = {seed: value - 0.1 + 0.05 * (-1) ** seed for seed, value in seeds.items()}
    found = verdict({"all": seeds, "low": low}, "min")
    assert (found.best, found.wins) == ("low", True)
    assert found.against["all"].mean == pytest.approx(-0.101)
    assert not verdict({"all": seeds, "low": low, "near": near}, "min").wins
    assert verdict({"all": seeds, "low": low}, "max").best == "all" and verdict({"all": seeds, "low": low}, "max").wins
    assert not verdict({"all": {0: 1.0}, "low": {0: 0.5}}, "min").wins  # one seed says nothing
    assert not verdict({"alone": seeds}, "min").wins
    elsewhere = {0: 2.0, 1: 6.0, 9: -9.0, 2: 4.0}  # its best seed has no pair, and all of its pairs are worse
    assert (found := verdict({"all": seeds, "other": elsewhere}, "min")).best == "other" and found.unclear == ["all"]


def test_of_equal_arms_one_is_called_the_winner_in_one_case_of_twenty_at_most() -> None:
    wins = {}
    for count in (2, 4):
        draws = np.random.default_rng(0).normal(size=(2000, count, 3))
        arms = [{str(arm): dict(enumerate(values)) for arm, values in enumerate(draw)} for draw in draws]
        wins[count] = np.mean([verdict(values, "min").wins for values in arms])
    assert wins[4] < wins[2] == pytest.approx(0.05, abs=0.01)


def test_the_pareto_front_by_hand() -> None:
    points = {"a": [1.0, 9.0], "b": [2.0, 5.0], "c": [2.0, 6.0], "d": [4.0, 5.0], "e": [3.0, 1.0], "twin": [3.0, 1.0]}
    assert pareto_front(points, ["min", "min"]) == ["a", "b", "e", "twin"]
    assert pareto_front(points, ["min", "max"]) == ["a"]


def test_what_the_answer_says() -> None:
    arms = [arm("base", 2.0, 2.2, 2.1), arm("new", 1.9, 2.1, 2.01)]
    best, said = answer(arms, [BITS], default="base")
    assert best == "new" and "new is best" in said and "-0.097 ± 0.014 (paired over 3 seeds)" in said
    best, said = answer([*arms, arm("near", 1.8, 2.2, 2.05)], [BITS], default="base")
    assert best == "new" and "do not tell it apart from near" in said and "Against the default, base" in said
    best, said = answer([*arms, arm("stopped", 0.1, 0.2, status="stopped")], [BITS])
    assert best == "new" and "1 of 3 arms did not finish" in said
    assert answer([arm("failed", 1.0, status="failed")], [BITS])[0] is None
    assert "nothing tells it apart" in answer([arm("a", 1.0), arm("b", 2.0)], [BITS])[1]
    for each, tokens in zip(arms, (1000.0, 2000.0), strict=True):
        for run in each.runs:
            run.metrics["tokens"] = tokens
    _, said = answer(arms, [BITS, Metric("tokens", "tokens")])
    assert said.endswith("No arm is better than these in all of held out, b/B and tokens (Pareto front): new and base.")


def test_runs_become_arms(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path, "slow", ["levels.1.period=8", "seed=1"]),
        make_run(tmp_path, "quick", ["seed=0"], [5.0, 3.0]),
        make_run(tmp_path, "quick", ["seed=1", "training.checkpoint_every=7"], [5.0, 3.5]),
        make_run(tmp_path, "quick", ["seed=1"], [5.0, 3.5]),  # the same once more, which is no other seed
        make_run(tmp_path, "deep", ["levels=[{width: 192}, {width: 192, period: 8}, {width: 32, period: 64}]"]),
    ]
    slow, quick, again, deep = arms_of([read_run(folder) for folder in folders])
    assert quick.seeds == [0, 1] and again.seeds == [1]
    assert slow.differs == {"levels": "192 every 1, 192 every 8"}
    assert deep.differs == {"levels": "192 every 1, 192 every 8, 32 every 64"}
    assert len({each.label for each in (slow, quick, again, deep)}) == 4
    assert [each.differs for each in arms_of([read_run(folder) for folder in folders[:2]])] == [
        {"levels.1.period": "8"},
        {"levels.1.period": "4"},
    ]
    mean, half = quick.interval(BITS.name)
    assert mean == 3.25 and half == pytest.approx(0.25 * stats.t.ppf(0.975, 1))


def test_what_a_run_took_is_what_its_log_and_its_levels_say(tmp_path: Path) -> None:
    from nestling.training.nested import nested_view

    folder = make_run(tmp_path, "quick")
    run = read_run(folder)
    rows = nested_view(load(folder.config))
    each = sum(row.component.flops_per_token for row in rows)
    assert run.cost == pytest.approx({"tokens": 1024, "seconds": 1.024, "flops": 1024 * each})
    assert run.anatomy.parameters == sum(row.component.parameters for row in rows)
    assert run.anatomy.periods[4] == 2 * 128 * 192 + 128 and sum(run.anatomy.periods.values()) == run.anatomy.parameters
    shown = [cell.text for cell in cells(arms_of([run, read_run(make_run(tmp_path, "b", ["seed=1"]))])[0], [BITS])]
    assert shown[1:] == ["2", "4 ± 0", f"{run.anatomy.parameters:,}", "1,024", "1.02", f"{1024 * each:.3g}"]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "quick")
    with pytest.raises(ComparisonError, match=f"only run {folder.run_id} .quick., needs at least two different ones"):
        compare([folder, folder])
    empty = RunFolder.create(tmp_path, "empty")
    with pytest.raises(ComparisonError, match=f"run {empty.run_id} .empty, stopped. has logged no step"):
        compare([folder, empty])


def test_seeds_without_a_metric_are_left_out_of_its_mean() -> None:
    runs = [Run("a", "a", "finished", 0, metrics={BITS.name: 2.0}), Run("b", "a", "failed", 1)]
    mixed = Arm("a", {}, runs)
    assert mixed.interval(BITS.name) == (2.0, None) and math.isnan(mixed.runs[1].metrics.get(BITS.name, math.nan))
    assert [cell.text for cell in cells(mixed, [BITS])][1] == "2, 1 failed"

"""Sweep files, spaces and arms: what is refused before anything starts, and what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nestling.config import ConfigError
from nestling.config.load import changed, read_job
from nestling.tuning.sweeps import SweepConfig, load_sweep
from nestling.tuning.sweeps.arms import Arms
from nestling.tuning.sweeps.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
JOB = """
data: {source: embedded:english, sequence_length: 64}
model: {name: hope, width: 16, layers: 1, heads: 2, chunk_size: 16}
levels: [{width: 8, period: 1}]
training: {batch_tokens: 128, warmup_steps: 2}
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Any:
    """Makes a sweep of a small job; `text` is its file without the job."""
    job, file = tmp_path / "job.yaml", tmp_path / "tried.yaml"
    job.write_text(JOB)

    def make(text: str, *overrides: str, quick: bool = False) -> SweepConfig:
        file.write_text(f"job: {job}\n{text}")
        return load_sweep(file, overrides, quick)

    return make


def plan(config: SweepConfig) -> Plan:
    return make_plan(config, changed(read_job(config.job), config.overrides), "")


GRID = "space: {training.learning_rate: [1e-3, 1e-2]}\nbudget: {tokens: 2560}\n"


def test_a_file_its_quick_settings_and_overrides_come_together(sweep: Any) -> None:
    quick = GRID + "quick: {seeds: 1, training.clip: 0.5}\n"
    assert sweep(quick).seeds == 3 and sweep(quick).name == "tried"
    config = sweep(quick, "budget.tokens=1280", "model.width=32", quick=True)
    assert (config.seeds, config.budget.tokens) == (1, 1280)
    assert config.overrides == {"training.clip": 0.5, "model.width": 32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space: {seed: [1]}\n", "budget: got none of tokens, seconds and flops"),
        (GRID + "serchers: grid\n", "serchers: unknown key; the nearest known one is searcher"),
        (GRID + "searcher: best\n", "searcher: got 'best', needs one of grid, random, optuna"),
        (GRID + "searcher: random\n", "budget.trials: is missing"),
        (GRID + "scheduler: pbt\n", "seeds: got 3"),
        (GRID + "objectives: [{metric: accuracy}]\n", "objectives.0.metric: got 'accuracy'"),
        ("budget: {tokens: 100}\n", "space: is empty"),
        (GRID + "budget: {tokens: 1, flops: 1}\n", "is no valid YAML"),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_its_key(sweep: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(text)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{model.chunk_sise: [16, 32]}", r"space.model.chunk_sise: .*the nearest known one is model.chunk_size"),
        ("{training.learning_rate: [0.1], nonsense: [1]}", r"space.nonsense: .*nonsense: unknown key"),
        ("{model.chunk_size: [16, 0]}", r"space.model.chunk_size: with 0 no arm is possible"),
        ("{model.heads: [3]}", r"space.model.heads: with 3 no arm is possible"),
        ("{levels: {ladder: {count: [1, 3], ratio: 64}}}", r"space.levels.ladder.count: with 3 .*would never move"),
        ("{levels: {ladder: {cont: [1]}}}", r"space.levels.ladder.cont: unknown key; .*levels.ladder.count"),
        ("{training.learning_rate: {log_uniform: [0, 1]}}", "needs values above 0"),
        ("{training.learning_rate: {uniform: [0.1, 1]}}", "is a range, and searcher=grid needs a list"),
    ],
)
def test_a_space_with_what_cannot_be_is_refused_naming_it(sweep: Any, space: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(sweep(f"space: {space}\nbudget: {{tokens: 2560}}\n"))


def test_a_grid_leaves_out_what_is_impossible_or_there_already(sweep: Any) -> None:
    found = plan(sweep("space: {levels: {ladder: {count: [1, 2], ratio: [4, 64]}}}\nbudget: {tokens: 2560}\n"))
    assert found.fixed is not None
    assert [arm.label for arm in found.fixed] == ["levels every 1", "levels every 1, 4"]
    assert [arm.changes["training.steps"] for arm in found.fixed] == [20, 20]
    assert len(found.refused) == 2 and "would never move" in found.refused[1]


def test_random_arms_are_the_same_every_time_and_all_possible(sweep: Any) -> None:
    text = (
        "space: {training.learning_rate: {log_uniform: [1e-4, 1e-2]}, model.width: [16, 18], model.heads: [2, 4]}\n"
        "searcher: random\nbudget: {tokens: 2560, trials: 6}\n"
    )
    first, again = plan(sweep(text)).fixed, plan(sweep(text)).fixed
    assert first == again and first is not None and len(first) == 6
    assert all(arm.point["model.width"] % arm.point["model.heads"] == 0 for arm in first)
    assert plan(sweep(text, "draw_seed=1")).fixed != first


def test_a_budget_in_flops_buys_fewer_steps_of_what_costs_more_and_widths_are_matched(sweep: Any) -> None:
    text = "space: {levels: {ladder: {count: [1, 3], ratio: 2, width: 32}}}\n"
    flops = plan(sweep(text + "budget: {flops: 1e8}\n")).fixed
    assert flops is not None and flops[0].changes["training.steps"] > flops[1].changes["training.steps"]
    spent = [arm.changes["training.steps"] * 128 * arm.flops_per_token for arm in flops]
    assert all(0.95e8 < some <= 1e8 for some in spent)
    config = sweep(text + "budget: {tokens: 2560}\nmatch_parameters: true\n")
    arms = Arms(config, read_job(config.job))
    assert {arm.parameters for arm in arms.grid()[0]} <= set(range(10000, 11500))


def test_a_population_varies_only_what_a_run_may_change(sweep: Any) -> None:
    text = "searcher: random\nscheduler: pbt\nseeds: 1\nbudget: {tokens: 2560, trials: 4}\n"
    plan(sweep(text + "space: {training.learning_rate: {uniform: [0.001, 0.1]}, levels.0.period: [1, 2]}\n"))
    with pytest.raises(ConfigError, match="space.model.chunk_size: cannot change in the middle of a run"):
        plan(sweep(text + "space: {model.chunk_size: [8, 16]}\n"))
    with pytest.raises(ConfigError, match="space.levels.ladder.count: cannot change"):
        plan(sweep(text + "space: {levels: {ladder: {count: [1, 2], ratio: 2}}}\n"))


@pytest.mark.parametrize("file", sorted((ROOT / "tuning").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_ready_sweeps_have_arms(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_sweep(file).question.endswith("?")
    found = plan(load_sweep(file, quick=True))
    assert found.fixed is not None and len(found.fixed) >= 3
    assert not [reason for reason in found.refused if "is there already" not in reason]


def test_the_arm_that_is_the_job_itself_is_known(sweep: Any) -> None:
    found = plan(sweep("space: {model.chunk_size: [8, 16]}\nbudget: {tokens: 2560}\n"))
    assert found.default == "chunk_size 16"
    assert plan(sweep("space: {model.chunk_size: [8, 32]}\nbudget: {tokens: 2560}\n")).default is None

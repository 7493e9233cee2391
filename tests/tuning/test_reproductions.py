"""Reproductions: the papers' numbers, every experiment through the real engine, failures, candidates, interruptions."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

from nestling.models import MODEL_CONFIGS
from nestling.optim import COMPONENTS
from nestling.tasks import Mixture, Task
from nestling.tracking.client import connect
from nestling.tuning.reproductions import NAMES, Arm, Experiment, Outcome, Trial, Work, experiment, sizes
from nestling.tuning.reproductions.engine import Failure, Progress, run_trials
from nestling.tuning.reproductions.figure import bars
from nestling.tuning.reproductions.long_context import LongContext
from nestling.tuning.reproductions.recipe import Recipe
from nestling.tuning.reproductions.run import make_docs, make_folder, reproduce
from nestling.tuning.reproductions.split_digits import SplitDigits
from nestling.tuning.reproductions.stream import Stream
from nestling.tuning.reproductions.table import cells, markdown, rows, with_spread
from nestling.tuning.reproductions.text import Text
from nestling.tuning.reproductions.training import Training
from nestling.tuning.reproductions.two_timescales import LEARNERS, METRICS, PUBLISHED, NoiseFloor

#: As arXiv:2512.24695 prints them: task, then the models' numbers.
MAD = """
compression: transformer 49.4 titans 49.8 hope 51.2
in-context recall: transformer 100 titans 100 hope 100
fuzzy recall: transformer 47.9 titans 50.0 hope 52.1
selective copying: transformer 96.2 titans 99.4 hope 99.7
memorisation: transformer 83.7 titans 83.4 hope 85.2
"""
FORMAL = """
parity: transformer 46.4/0 linear_attention 78.1/0 delta_net 98.2/10.1 hope 100/100 lstm 100/100
(aa)*: transformer 0/0 linear_attention 0/0 delta_net 0/0 hope 100/100 lstm 100/100
(abab)*: transformer 0/0 linear_attention 0/0 delta_net 0/0 hope 100/100 lstm 100/100
a^n b^n: transformer 100/100 linear_attention 100/100 delta_net 100/100 hope 100/100 lstm 100/100
a^n b^n c^n: transformer 100/100 linear_attention 100/100 delta_net 100/100 hope 100/100 lstm 100/100
Shuffle-2: transformer 100/100 linear_attention 100/100 delta_net 100/100 hope 100/100 lstm 100/100
"""
ABLATION = (
    "HOPE 12.24; w/o DGD 13.41; w/o momentum 13.58; w/o weight decay 13.71; w/o CMS (one MLP, every step) 13.04; "
)
ABLATION += "w/o inner projection k 13.77; w/o inner projection v 13.90; w/o inner projection q 12.19"
NEEDLES = {
    "transformer": (88.6, 76.4),
    "hope_attention": (100, 100),
    "hope": (100, 100),
    "titans": (100, 100),
}


#: The toy of two time scales in the order of `METRICS`: what the published script prints, and numpy for the others.
TIMESCALES = {
    "one level, rate 0.05 (as published)": (1.7994, 3.6090, 655.3868, 2.1846, 2.3417, 0.3843),
    "two levels, 0.05 / 0.8, retention 0.5 (as published)": (2.0883, 1.4736, 549.5944, 1.8320, 2.0423, 0.2189),
    "two levels, 0.05 / 0.8, retention 0.9": (1.9892, 2.9425, 165.3740, 0.5512, 0.4988, 0.0832),
    "two levels, 0.05 / 0.8, no decay": (1.9587, 3.3619, 114.3407, 0.3811, 0.2513, 0.0516),
    "one level, rate 0.2": (1.7526, 3.8424, 232.0404, 0.7735, 0.7389, 0.2401),
    "one level, rate 0.5": (1.8114, 3.4716, 126.5281, 0.4218, 0.4204, 0.3268),
    "one level, rate 0.8": (1.8443, 3.4206, 177.0211, 0.5901, 0.9214, 0.7947),
}
FLOOR = (2.0, 46.0394, 0.1535, 0.1478, 0.0)
#: What a row has for outside programs.
ROW = ("task", "model", "metric", "ours", "spread", "paper", "chance", "seeds", "tokens", "parameters")


def paper(name: str) -> dict[tuple[str, str], tuple[float, ...]]:
    """The numbers beside each task and model."""
    return {(arm.task, arm.model): tuple(arm.paper.values()) for arm in experiment(name).arms}


def listed(text: str) -> dict[tuple[str, str], tuple[float, ...]]:
    found = {}
    for line in text.strip().splitlines():
        task, numbers = line.split(": ")
        for model, values in re.findall(r"([a-z_]+) ([\d./]+)", numbers):
            found[task, model] = tuple(float(value) for value in values.split("/"))
    return found


@pytest.mark.parametrize(("name", "text"), [("mad", MAD), ("formal-languages", FORMAL)])
def test_the_papers_numbers_of_tables_4_and_5(name: str, text: str) -> None:
    shown, known = {cell: numbers for cell, numbers in paper(name).items() if numbers}, listed(text)
    assert shown and all(known[cell] == numbers for cell, numbers in shown.items())
    assert {task for task, _ in shown} == {task for task, _ in known}


def test_the_papers_numbers_of_tables_1_and_6() -> None:
    known = {name: float(value) for name, value in re.findall(r"([^;]+?) ([\d.]+)(?:; |$)", ABLATION)}
    shown = {model: numbers for (_, model), numbers in paper("ablation").items()}
    assert {model: numbers for model, numbers in shown.items() if numbers} == {key: (n,) for key, n in known.items()}
    for (_, model), numbers in paper("long-context").items():
        assert numbers == tuple(map(float, NEEDLES.get(model, ())))


@pytest.mark.parametrize("name", NAMES)
def test_the_full_protocol_has_every_model(name: str) -> None:
    small, full = experiment(name), experiment(name, full=True)
    assert {arm.model for arm in full.arms} >= {arm.model for arm in small.arms}
    assert len({(arm.task, arm.model) for arm in full.arms}) == len(full.arms)
    assert (small.name, full.name) == (name, f"{name}-full")  # one does not replace the other's files


def test_two_timescales_to_the_published_digits() -> None:
    """Both printed lines of the published script and the recomputed ones, by the project's own levels."""
    for name, numbers in TIMESCALES.items():
        assert list(LEARNERS[name](0).metrics.values()) == pytest.approx(numbers, abs=1e-4)
    floor = NoiseFloor()(0).metrics
    assert list(floor.values()) == pytest.approx(FLOOR, abs=1e-4)
    # What survives: no single rate is good at both, two levels without decay are.
    plan = experiment("two-timescales")
    published = [name for name in TIMESCALES if name.endswith("(as published)")]
    assert {arm.model: tuple(arm.paper.values()) for arm in plan.arms if arm.paper} == PUBLISHED
    assert {name: TIMESCALES[name] for name in published} == PUBLISHED
    rates = [learner.slow for learner in LEARNERS.values() if learner.slow == learner.fast]
    assert rates == sorted(rates)
    good = []
    for arm in plan.arms[:-1]:
        (learner,) = arm.candidates.values()
        found = dict(zip(METRICS, learner(0).metrics.values(), strict=True))
        if found["mean absolute error"] <= 0.40 and found["mean slope error, last 100"] <= 0.10:
            good.append(arm.model)
    assert good == ["two levels, 0.05 / 0.8, no decay"]


def test_equal_parameters_by_construction() -> None:
    from nestling.models import build

    for name in ("mad", "mqar", "long-context"):
        counts: dict[str, set[int]] = {}  # by task, because vocabularies differ
        for arm in experiment(name).arms:
            work, *_ = arm.candidates.values()
            vocabulary = work.task.vocab_size if isinstance(work, Training) else 257
            if name != "mad" or arm.task == "fuzzy recall":
                with torch.device("meta"):
                    model = build({**work.model, "vocab_size": vocabulary})  # type: ignore[attr-defined]
                counts.setdefault(arm.task, set()).add(sum(parameter.numel() for parameter in model.parameters()))
        assert all(max(same) <= 1.02 * min(same) for same in counts.values())


def test_the_notes_say_what_is_not_tuned_left_out_or_short_of_seeds() -> None:
    notes = {name: " ".join(experiment(name).notes) for name in NAMES}
    for component in ("muon", "m3"):
        first, second = COMPONENTS[component].settings["betas"][:2]
        assert f"betas of {first} and {second} under" in notes["optimizers"].replace("and of", "betas of")
    assert "Noisy recall" in notes["mad"] and "--full" in notes["mad"]
    assert all(experiment(name).seeds >= 3 or "seed" in notes[name] for name in NAMES)


def test_a_model_that_is_not_there_is_no_silent_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MODEL_CONFIGS, "titans")
    sizes._matched.cache_clear()
    with pytest.raises(KeyError, match="titans"):
        experiment("long-context")


# --- every experiment through the engine, at a tiny size


def tiny_task(task: Task) -> Task:
    if isinstance(task, Mixture):
        return replace(task, parts=tuple((name, share, tiny_task(part)) for name, share, part in task.parts))
    if isinstance(task, Text):
        return Text("unicode", length=32, test_length=32, test_bytes=64)
    return replace(task, **{"test_examples": 4}) if hasattr(task, "test_examples") else task


def tiny_model(model: Mapping[str, Any]) -> dict[str, Any]:
    small = {"name": model["name"], "width": 16, "heads": 1, "layers": model["layers"]}
    kept = {key: value for key, value in model.items() if key not in small and not key.endswith(("width", "widths"))}
    widths = [8] * len(model["level_widths"]) if "level_widths" in model else None
    return small | kept | ({"level_widths": widths} if widths is not None else {})


def tiny(work: Work) -> Work:
    if isinstance(work, Stream):
        sizes = ("data.sequence_length=64", "training.batch_tokens=256", "stream.probe_bytes=512")
        return replace(work, domain_bytes=1000, overrides=(*work.overrides, *sizes, "model.layers=1"))
    if isinstance(work, SplitDigits):
        return replace(work, steps=3)
    if not isinstance(work, Training | LongContext):
        return work
    recipe = replace(work.recipe, steps=4, batch=2, batch_tokens=0, check_every=2, examples=work.recipe.examples and 4)
    small = replace(work, recipe=recipe, model=tiny_model(work.model))
    if isinstance(small, LongContext):
        return replace(small, domain="unicode", lengths=(512, 1024), trials=1, depths=(0.5,))
    return replace(small, task=tiny_task(small.task), stages=tuple((1, tiny_task(task)) for _, task in small.stages))


def one_arm_a_model(plan: Experiment) -> Experiment:
    arms = list({arm.model: arm for arm in reversed(plan.arms)}.values())
    small = [
        replace(arm, candidates={label: tiny(work) for label, work in list(arm.candidates.items())[:2]}) for arm in arms
    ]
    return replace(plan, arms=small)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs(name: str, ray_local: None, tmp_path: Path) -> None:
    plan = one_arm_a_model(experiment(name))
    ended = run_trials(plan, 1, lambda progress: None)
    failures = [each for each in ended if isinstance(each, Failure)]
    assert not failures
    made = rows(plan, ended)
    for row in made:
        assert {"task", "model", "metric", "ours", "spread", "paper", "chance", "seeds", "tokens", "parameters"} <= set(
            row
        )
        assert (row["ours"] is not None or row["why"] == "not measured") or "1024" in row["metric"]
        if row["metric"] not in ("final bias",) and name != "two-timescales" and row["why"] is None:
            assert row["chance"] is not None and row["tokens"] > 0 and row["parameters"] > 0
    assert all(cells(row) for row in made)
    assert plan.title in markdown(plan, made, "nestling reproduce", "here")
    picture = tmp_path / "figure.png"
    if plan.draw is not None:
        plan.draw(ended, str(picture))  # type: ignore[arg-type]
    else:
        bars(made, str(picture))
    assert picture.stat().st_size > 5000


# --- the engine


def test_what_only_the_paper_has_stands_apart(tmp_path: Path) -> None:
    """Another unit has a panel of its own, our counts do not stand beside it, and no label leaves the picture."""
    plan = experiment("ablation")
    metrics = list(plan.arms[0].metrics)
    found = Outcome(dict.fromkeys(metrics[:2], 2.0), tokens=10, parameters=20)
    made = rows(plan, [Trial(arm.task, arm.model, "", 0, 1.0, found) for arm in plan.arms])
    assert [(row["ours"], row["seeds"], row["tokens"], row["parameters"]) for row in made[:3]] == [
        (2.0, 1, 10, 20),
        (2.0, 1, 10, 20),
        (None, 0, None, None),
    ]
    assert made[2]["paper"] == 12.24 and made[0]["unit"] == made[1]["unit"] != made[2]["unit"]
    widths = []
    for name, drawn in {"both": made, "ours": [row for row in made if row["ours"] is not None]}.items():
        picture = tmp_path / f"{name}.png"
        bars(drawn, str(picture))
        pixels = image.imread(picture)[..., :3]
        assert min(side.min() for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])) == 1  # a white frame
        widths.append(pixels.shape[1])
    assert widths[0] > widths[1]


@dataclass(frozen=True)
class Fixed:
    """Work that is told what it finds; some of it goes wrong."""

    value: float = 1.0
    validation: float | None = None
    error: str = ""

    def __call__(self, seed: int) -> Outcome:
        if self.error == "exit":
            os._exit(3)
        if self.error:
            raise ValueError(self.error)
        return Outcome({"score": self.value + seed}, {"score": 0.5}, 10, 20, self.validation)


def plan_of(*arms: Arm) -> Experiment:
    return Experiment("mqar", "A title", "A source", arms, notes=("A note.",))


def arm(model: str, **candidates: Fixed) -> Arm:
    return Arm("a task", model, candidates, ("score",), {"score": 99.0})


@pytest.mark.slow
def test_what_fails_is_told_and_the_rest_goes_on(ray_local: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plan = plan_of(
        arm("good", only=Fixed(1.0)),
        arm("bad", only=Fixed(error="no such thing")),
        arm("dead", only=Fixed(error="exit")),
        arm("tuned", a=Fixed(3.0, 0.1), b=Fixed(5.0, 0.3), c=Fixed(7.0, None), d=Fixed(error="unstable")),
        arm("nan", only=Fixed(float("nan"))),
    )
    folder, told, docs = make_folder(tmp_path, "mqar"), list[Progress](), tmp_path / "docs"
    make_docs(docs)
    result = reproduce(
        plan,
        folder,
        seeds=3,
        uri=None,
        command="nestling reproduce mqar",
        docs=docs,
        tell=told.append,
    )
    by_model = {row["model"]: row for row in result.rows}
    good, tuned = by_model["good"], by_model["tuned"]
    assert (good["ours"], good["spread"], good["seeds"], good["chance"]) == (2.0, 1.0, 3, 0.5)
    assert (tuned["ours"], tuned["candidate"], tuned["seeds"]) == (6.0, "b", 3)
    assert by_model["bad"]["ours"] is None and by_model["bad"]["why"] == "failed"
    assert by_model["nan"]["ours"] is None and by_model["nan"]["why"] == "diverged"
    errors = {failure.model: failure.error for failure in result.failures}
    assert errors["bad"] == "ValueError: no such thing" and errors["tuned"] == "ValueError: unstable"
    assert "dead" in errors and len(result.failures) == 7
    # a, b, c and d with the first seed; only b goes on.
    ran = [(trial["candidate"], trial["seed"]) for trial in lines(folder) if trial["model"] == "tuned"]
    assert sorted(ran) == [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("d", 0)]
    assert [progress.done for progress in told] == list(range(1, 19)) and told[-1].total == 18
    assert folder.status() == "failed"
    table = result.table.read_text()
    assert "| a task | good | score | 2.0 ± 1.0 | 99 | 0.5 | 3 | 10 | 20 |" in table
    assert "| a task | tuned (b) | score | 6.0 ± 1.0 |" in table and "nestling reproduce mqar" in table
    files = {f"reproduce-mqar.{suffix}" for suffix in ("md", "png", "json")}
    assert files <= {path.name for path in folder.path.iterdir()}
    assert json.loads((folder.path / "reproduce-mqar.json").read_text())["rows"] == result.rows
    # What is incomplete replaces nothing that was kept.
    assert not list(docs.iterdir()) and result.table.parent == folder.path
    assert result.not_kept is not None and str(result.table) in result.not_kept
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(folder.info()["mlflow_run_id"])
    assert run.info.status == "FAILED" and run.data.metrics["a task/good/score/ours"] == 2.0
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"config.yaml", *files}


@pytest.mark.slow
def test_an_interruption_leaves_what_has_ended(ray_local: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = make_folder(tmp_path, "mqar")

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(plan_of(arm("good", only=Fixed())), folder, seeds=3, uri=None, command="", docs=None, tell=interrupt)
    (line,) = lines(folder)
    assert line["outcome"]["metrics"] == {"score": 1.0 + line["seed"]}
    assert folder.status() == "interrupted"


@pytest.mark.slow
def test_a_folder_that_takes_no_more_loses_nothing(ray_local: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder, docs = make_folder(tmp_path, "mqar"), tmp_path / "docs"
    make_docs(docs)

    def gone(progress: Progress) -> None:
        shutil.rmtree(docs, ignore_errors=True)

    plan = plan_of(arm("good", only=Fixed()))
    result = reproduce(plan, folder, seeds=2, uri=None, command="", docs=docs, tell=gone)
    assert result.rows[0]["ours"] == 1.5 and folder.status() == "finished"
    assert result.not_kept is not None and f"the table is {folder.path}" in result.not_kept
    assert result.table.exists() and result.table.parent == folder.path


def lines(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.path / "trials.jsonl").read_text().splitlines()]


def test_a_spread_says_how_many_digits_count() -> None:
    shown = {(2.33149, 0.01234): "2.331 ± 0.012", (55.5556, 20.97): "56 ± 21", (100.0, 0.0): "100 ± 0"}
    shown |= {(0.00012345, 0.0000012): "0.0001 ± 0.0000", (942.7003, None): "942.7003"}
    assert {given: with_spread(*given) for given in shown} == shown


def test_a_recipes_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=110, warmup=10, final_learning_rate=0.1)
    factors = [recipe.rate_factor(step) for step in range(1, 111)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0.1 < factors[-1] < 0.101
    assert Recipe(steps=5, warmup=0).rate_factor(5) > 0

"""The loop that trains small models on tasks: what it optimises, when it ends, and what it measures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nestling.models import build
from nestling.models.hope import mixers
from nestling.tasks import IGNORE, Examples, Metric, Mixture, Mqar, Task, generator
from nestling.tuning.reproductions.recipe import Recipe
from nestling.tuning.reproductions.text import SEPARATOR, Text, stream, text_bytes
from nestling.tuning.reproductions.training import Training, _groups

TRANSFORMER = {"name": "transformer", "width": 8, "layers": 1, "heads": 2}
HOPE = {"name": "hope", "width": 8, "layers": 1, "heads": 2, "level_widths": [8, 8], "redraw_chunk_sizes": [3, 5]}


@dataclass(frozen=True)
class Copy(Task):
    """Say each token as it is read; `shift` makes another task of it."""

    name = "copy"
    shift: int = 0
    shown: Metric = "accuracy"
    seen: list[tuple[int, int]] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        return 6

    def metric_of(self, test: str) -> Metric:
        return self.shown

    def sample(self, count: int, source: torch.Generator) -> Examples:
        self.seen.append((self.shift, count))
        inputs = torch.randint(6, (count, 8), generator=source)
        return Examples(inputs, (inputs + self.shift) % 6)

    def tests(self, seed: int) -> dict[str, Examples]:
        return {"test": self.sample(20, generator(99))}

    def chance(self, test: str) -> float:
        return 1 / 6 if self.shown != "bits" else math.log2(6)


def test_it_learns_and_ends_when_validation_is_right() -> None:
    work = Training(Copy(), TRANSFORMER, Recipe(steps=400, batch=16, learning_rate=1e-2, check_every=20, enough=1.0))
    outcome = work(0)
    assert outcome.details["stopped"] == "enough" and outcome.details["steps"] < 400
    assert outcome.details["steps"] % 20 == 0 and outcome.validation == 1.0
    assert outcome.metrics == {"test": 100.0}
    assert outcome.chance["test"] == pytest.approx(100 / 6)
    assert outcome.tokens == outcome.details["steps"] * 16 * 8
    again, other = work(0), work(1)
    assert again == outcome and other.details["losses"] != outcome.details["losses"]


def test_a_recipe_can_go_through_fixed_examples_in_epochs() -> None:
    task = Copy(seen=[])
    Training(task, TRANSFORMER, Recipe(steps=7, batch=4, examples=12))(0)
    assert [count for _, count in task.seen] == [128, 12, 20]  # validation, the training set once, the test


def test_stages_come_before_the_task() -> None:
    seen: list[tuple[int, int]] = []
    first, then = Copy(shift=1, seen=seen), Copy(seen=seen)
    Training(then, TRANSFORMER, Recipe(steps=7, batch=4), stages=((3, first),))(0)
    assert seen == [(0, 128), (1, 128), *[(1, 4)] * 3, *[(0, 4)] * 4, (0, 20)]  # validations, training, the test


@pytest.mark.parametrize(("enough", "easy_steps"), [(0.0, 2), (2.0, 6)], ids=["learnt at the first look", "never"])
def test_a_stage_that_is_learnt_leaves_its_steps_to_the_next(enough: float, easy_steps: int) -> None:
    """And short sequences come in larger batches: 4 of 4 tokens, 3 of 8."""
    easy, task = Mqar(pairs=1, length=4, test_examples=4), Mqar(pairs=1, length=8, test_examples=4)
    recipe = Recipe(steps=10, batch=3, batch_tokens=16, check_every=2, stage_enough=enough)
    outcome = Training(task, TRANSFORMER, recipe, ((6, easy),))(0)
    assert (outcome.details["stopped"], outcome.details["steps"]) == ("steps", 10)
    assert outcome.tokens == easy_steps * 16 + (10 - easy_steps) * 24


def test_what_diverges_is_no_number() -> None:
    outcome = Training(Copy(), TRANSFORMER, Recipe(steps=50, batch=4, learning_rate=1e30, warmup=0))(0)
    assert outcome.details["stopped"] == "diverged" and outcome.validation is None
    assert math.isnan(outcome.metrics["test"])


def test_writes_off_is_the_same_model_without_its_writes() -> None:
    task = Copy(shown="bits")
    outcome = Training(task, HOPE, Recipe(steps=0), writes_off=True)(0)
    torch.manual_seed(0)
    model = build({**HOPE, "vocab_size": 6})
    inputs, targets = task.tests(0)["test"]

    def bits() -> float:
        with torch.no_grad():
            return F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten()).item() / math.log(2)

    on = bits()
    for mixer in mixers(model):
        mixer.writes = False
    assert outcome.metrics == pytest.approx({"test": on, "test, writes off": bits()}, abs=1e-6)
    assert abs(on - bits()) > 1e-5


def test_levels_keep_their_periods_and_matrices_their_rate() -> None:
    model = build({**HOPE, "vocab_size": 6})
    recipe = Recipe(periods=(1, 4), optimizer="muon", settings={}, learning_rate=0.5, other_rate=0.25)
    groups = _groups(model, model, recipe)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    periods = {group["name"]: group["period"] for group in groups}
    assert periods == {"level0": 1, "level1": 1, "level2": 4}
    for group in groups:
        assert group["peak"] == (0.5 if group["matrix"] else 0.25)
    slow = {id(p) for group in groups if group["name"] == "level2" for p in group["params"]}
    assert slow == {id(p) for p in model.level_parameters()[1]}


def test_bits_are_the_mean_loss_and_validation_prefers_fewer() -> None:
    outcome = Training(Copy(shown="bits"), TRANSFORMER, Recipe(steps=0))(0)
    assert outcome.metrics["test"] == pytest.approx(math.log2(6), abs=0.5)
    by_position = outcome.details["scores"]["test"]["by_position"]
    assert len(by_position) == 8 and sum(by_position) / 8 == pytest.approx(outcome.metrics["test"])
    assert outcome.validation is not None and outcome.validation < 0
    assert outcome.chance["test"] == pytest.approx(math.log2(6))


def test_text_is_split_by_document_and_separators_are_not_scored() -> None:
    text = Text("unicode", length=64, test_length=128, test_bytes=1280)
    sides = {side: text_bytes("unicode", side) for side in ("train", "validation", "test")}
    assert all(sides.values()) and len(sides["train"]) > 5 * len(sides["test"])
    assert sides["test"][:300] not in sides["train"] and sides["validation"][:300] not in sides["train"]
    test = text.tests(0)["held-out"]
    assert test.inputs.shape == (10, 128)
    flat = stream("unicode", "test")
    assert bytes(test.inputs[0, 1:50].tolist()) in sides["test"] and flat[0] == SEPARATOR
    every = Text("unicode", test_length=128, test_bytes=len(flat)).tests(0)["held-out"]
    assert (every.targets == IGNORE).any() and not (every.targets == SEPARATOR).any()
    targets = test.targets[test.targets != IGNORE]
    shares = [targets.tolist().count(byte) / len(targets) for byte in set(targets.tolist())]
    assert text.chance("held-out") == pytest.approx(-sum(share * math.log2(share) for share in shares))


def test_a_mixture_draws_each_batch_from_one_task() -> None:
    mixture = Mixture((("same", 0.75, Copy()), ("next", 0.25, Copy(shift=1, shown="bits"))))
    source, counts = generator(0), {0: 0, 1: 0}
    for _ in range(200):
        inputs, targets = mixture.sample(3, source)
        shifts = ((targets - inputs) % 6).unique()
        assert len(shifts) == 1
        counts[int(shifts)] += 1
    assert 35 < counts[1] < 65
    assert list(mixture.tests(0)) == ["same/test", "next/test"]
    assert (mixture.metric_of("next/test"), mixture.metric_of("validation")) == ("bits", "accuracy")
    assert mixture.chance("same/test") == pytest.approx(1 / 6)
    outcome: Any = Training(mixture, TRANSFORMER, Recipe(steps=2, batch=2))(0)
    assert set(outcome.metrics) == {"same/test", "next/test"}

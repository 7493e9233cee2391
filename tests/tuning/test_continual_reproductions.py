"""Learning one thing after another: the figures against hand values, equal data for every arm, controls that differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nestling.config import from_yaml
from nestling.data.streams import Record
from nestling.data.streams.five_domains import ORDER
from nestling.models.parameters import parameter_count
from nestling.tuning.reproductions import Outcome, Trial, experiment
from nestling.tuning.reproductions.engine import chosen
from nestling.tuning.reproductions.five_domains import TRANSFORMER
from nestling.tuning.reproductions.frontier import by_arm, differences, interval, table
from nestling.tuning.reproductions.split_digits import METRICS as DIGITS_METRICS
from nestling.tuning.reproductions.split_digits import Network, SplitDigits, split
from nestling.tuning.reproductions.stream import (
    BACKWARD,
    FINAL,
    FORGETTING,
    JOB,
    LEARN,
    PREQUENTIAL,
    SHARE,
    WORST,
    WRITES_OFF,
    Stream,
    earlier,
    figures,
    parts,
    unigram_entropy,
)

#: Losses on three domains before anything was learnt and after each of them.
LOSSES = [[8.0, 8.0, 8.0], [4.0, 6.0, 7.0], [5.0, 3.0, 6.5], [4.5, 5.0, 2.0]]


def test_figures_of_a_matrix_by_hand() -> None:
    assert figures(LOSSES, in_order=True) == pytest.approx(
        {
            LEARN: (4.0 + 3.0 + 2.0) / 3,
            FORGETTING: ((4.5 - 4.0) + (5.0 - 3.0)) / 2,
            BACKWARD: ((4.0 - 4.5) + (3.0 - 5.0)) / 2,
            SHARE: 100 * (0.5 / 4.0 + 2.0 / 5.0) / 2,
            FINAL: 11.5 / 3,
            WORST: 5.0,
        },
        abs=1e-12,
    )
    unlearnt = figures([row[:2] + [9.0] for row in LOSSES[:1]] + [row[:2] + [9.5] for row in LOSSES[1:]], in_order=True)
    assert SHARE not in unlearnt and unlearnt[FORGETTING] == pytest.approx(1.25)
    assert figures(LOSSES, in_order=False) == pytest.approx({FINAL: 11.5 / 3, WORST: 5.0}, abs=1e-12)


def test_unigram_entropy() -> None:
    assert unigram_entropy(["abab", "cdcd"]) == pytest.approx(2.0)


def test_intervals_and_paired_differences_by_hand() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.302653 / 3**0.5, abs=1e-5)  # t with two degrees of freedom, 97.5 %
    assert interval([5.0]) == (5.0, None)
    values = {"a": [1.0, 2.0], "b": [1.5, 4.0], "c": [9.0, float("nan")]}
    trials = [
        Trial("task", arm, "", seed, 1.0, Outcome({"score": value}))
        for arm, scores in values.items()
        for seed, value in enumerate(scores)
    ]
    found = by_arm(trials, "score")
    assert found == {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 4.0}, "c": {0: 9.0}}
    assert differences(found, "a") == {"b": {0: 0.5, 1: 2.0}, "c": {0: 8.0}}
    shown = table({"score": found, "minus a": differences(found, "a")})
    assert "| c | 9 | 8 |" in shown and "| a | 1.50 ± 6.35 |  |" in shown


def test_only_the_chosen_rate_goes_into_table_and_picture() -> None:
    arm = next(arm for arm in experiment("five-domains").arms if len(arm.candidates) > 1)
    slow, fast, *_ = arm.candidates
    results = [(fast, 1, None), (slow, 0, -5.0), (fast, 0, -4.0)]
    ended = [
        Trial(arm.task, arm.model, label, seed, 1.0, Outcome({LEARN: float(seed)}, validation=validation))
        for label, seed, validation in results
    ]
    assert [(trial.candidate, trial.seed) for trial in chosen(arm, ended)] == [(fast, 0), (fast, 1)]


def records() -> list[Record]:
    return [
        Record("0", number, number + 1, f"{domain} {number} " * 5, f"{domain}/{number}", None, domain)
        for number, domain in enumerate(np.repeat(ORDER, 20).tolist())
    ]


def test_every_arm_reads_the_same_records_in_the_same_order() -> None:
    read = parts(records(), True, 300, 0)
    assert [{record.domain for record in part} for part in read] == [{domain} for domain in ORDER]
    for part in read:
        assert 300 <= sum(len(record.text.encode()) for record in part) < 300 + 100
    assert parts(list(reversed(records())), True, 300, 0) == read  # whatever the order of the source
    mixed = parts(records(), False, 300, 0)
    together = [record for part in mixed for record in part]
    assert {record.key for record in together} == {record.key for part in read for record in part}
    assert len(mixed) == len(read) and len({record.domain for record in mixed[0]}) > 2
    before = earlier(records(), 300, 300, 0)
    assert not {record.key for record in before} & {record.key for record in together}
    assert {record.domain for record in before} == set(ORDER)
    other = parts(records(), True, 300, 1)
    assert [record.key for record in other[0]] != [record.key for record in read[0]]


def test_arms_have_equal_parameters_and_bytes_and_run_the_settings_that_their_names_say() -> None:
    counts, sizes = set(), set()
    for arm in experiment("five-domains").arms:
        for work in arm.candidates.values():
            assert isinstance(work, Stream)
            config = from_yaml(JOB, work.overrides)
            counts.add(parameter_count(config.model))
            sizes.add(work.domain_bytes)
            assert (config.model.name == "transformer") == arm.model.startswith(TRANSFORMER)
            periods = {level.period for level in config.levels}
            assert (len(periods) > 1) == ("several" in arm.model)
            assert (config.stream.replay_share > 0) == ("replay" in arm.model)
            assert (config.stream.ewc_strength > 0) == ("EWC" in arm.model)
            assert (work.learnt < len(ORDER)) == ("frozen" in arm.model)
            assert (work.pretrained > 0) == ("pretrained" in arm.model)
            slowed = any(level.parameters == ["*"] for level in config.levels)
            assert slowed == ("all but the levels" in arm.model)
            assert (config.continuum.drive == "stream") == ("moving" in arm.model)
            assert config.data.source.endswith("shuffled") == ("joint" in arm.model)
    assert len(sizes) == 1 and max(counts) <= 1.01 * min(counts)


def test_the_trials_job_is_that_of_the_stream() -> None:
    shipped, ours = (from_yaml(text) for text in (open("jobs/five-domains.yaml", encoding="utf-8").read(), JOB))
    for section in ("optimizers", "continuum"):
        assert getattr(shipped, section) == getattr(ours, section)
    different = {"batch_tokens": ours.training.batch_tokens, "checkpoint_every": ours.training.checkpoint_every}
    assert replace(shipped.training, **different) == ours.training
    assert replace(shipped.model, vocab_size=257, level_widths=[64, 64, 64]) == ours.model


SMALL = (
    *("data.sequence_length=64", "training.batch_tokens=128", "stream.probe_bytes=512", "training.warmup_steps=2"),
    *("model.width=16", "model.heads=1", "model.layers=1"),
)


@pytest.mark.slow
def test_a_stream_learns_forgets_and_is_the_same_again() -> None:
    torch.set_num_threads(1)

    def run(*overrides: str, seed: int = 0, learnt: int = len(ORDER)) -> Outcome:
        return Stream((*SMALL, "training.learning_rate=1e-2", *overrides), 3000, learnt)(seed)

    levels = "levels=[{width: 32, period: 1}, {width: 32, period: %d}]"
    one, again, several, other = run(levels % 1), run(levels % 1), run(levels % 8), run(levels % 1, seed=1)
    assert one == again
    matrix, first = one.details["losses"], [trial.details["losses"][0] for trial in (one, several, other)]
    assert len(matrix) == 6 and {len(row) for row in matrix} == {5}
    assert first[0] == first[1] != first[2]  # a pair begins alike, another seed does not
    assert several.details["losses"] != matrix and several.tokens == one.tokens > 5 * 3000
    assert several.details["updates"]["level2"] == one.details["updates"]["level2"] // 8
    assert all(matrix[place + 1][place] < matrix[place][place] for place in range(5))  # every domain is learnt
    assert set(one.metrics) == {LEARN, FORGETTING, BACKWARD, SHARE, FINAL, WRITES_OFF, WORST, PREQUENTIAL}
    assert one.metrics[FINAL] == pytest.approx(sum(matrix[-1]) / 5) and one.metrics[WRITES_OFF] != one.metrics[FINAL]

    transformer = run("model.name=transformer", "stream.ewc_strength=1e4", "stream.ewc_every=10")
    assert WRITES_OFF not in transformer.metrics
    held = run("model.name=transformer", "stream.ewc_strength=0")
    assert held.details["losses"][-1] != transformer.details["losses"][-1]

    joint = run(levels % 1, "data.source=embedded:five-domains-shuffled")
    assert set(joint.metrics) == {FINAL, WRITES_OFF, WORST, PREQUENTIAL} and joint.tokens == one.tokens

    ready = Stream((*SMALL, "training.learning_rate=1e-2", levels % 1), 3000, pretrained=6000)(0)
    assert sum(ready.details["losses"][0]) < sum(matrix[0]) - 1
    assert ready.tokens > 2 * one.tokens and PREQUENTIAL not in ready.metrics

    frozen = run(levels % 1, learnt=1)
    assert frozen.details["losses"][:2] == matrix[:2] and frozen.details["losses"][1:] == [matrix[1]] * 5
    assert frozen.metrics[FORGETTING] == 0 and PREQUENTIAL not in frozen.metrics


# --- split digits


def test_digits_are_split_once_and_for_every_method() -> None:
    sides = split(3)
    assert sum(len(task) for side in sides for task in side) == 1797
    for side in sides:
        assert [sorted(set(task[:, 1, 0].tolist())) for task in side] == [[2 * n, 2 * n + 1] for n in range(5)]
    images = {task[number, 0].tobytes() for side in sides for task in side for number in range(len(task))}
    assert len(images) == 1797  # no image is on two sides
    assert all(np.array_equal(a, b) for a, b in zip(sides[0], split(3)[0], strict=True))
    assert not np.array_equal(sides[0][0], split(4)[0][0])
    assert 16_000 < sum(parameter.numel() for parameter in Network().parameters()) < 18_000


def test_digits_are_forgotten_and_replay_or_a_penalty_keeps_some() -> None:
    torch.set_num_threads(1)
    naive = SplitDigits(steps=60)
    outcome = naive(0)
    scores = outcome.details["scores"]
    assert len(scores) == 5 and all(len(row) == 5 for row in scores)
    assert all(scores[task][task] > 0.9 for task in range(5)) and max(scores[0][1:]) == 0  # never seen, never named
    accuracy, transfer = (outcome.metrics[metric] for metric in DIGITS_METRICS)
    assert accuracy == pytest.approx(100 * sum(scores[-1]) / 5)
    assert transfer == pytest.approx(100 * sum(scores[-1][task] - scores[task][task] for task in range(4)) / 4)
    assert accuracy < 25 and transfer < -90
    replayed = replace(naive, replayed=100)(0).metrics["ACC"]
    joint = replace(naive, joint=True)(0).metrics
    assert replayed > 60 and joint["ACC"] > replayed and "BWT" not in joint
    assert replace(naive, ewc_strength=1e5)(0).metrics["BWT"] > transfer + 20
    # Controls: what changes nothing gives the same numbers, to the bit.
    assert replace(naive, ewc_strength=1e-30)(0).details == outcome.details == naive(0).details
    assert naive(1).details != outcome.details

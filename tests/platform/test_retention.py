"""The metrics of continual learning on hand-made matrices with hand-made values, probes, and drift."""

import json
import random

import pytest

from nestling.data import Tokenizer
from nestling.evaluation import retention
from nestling.evaluation.drift import PageHinkley
from nestling.evaluation.probes import Probes

#: Score on domain j after learning domain i.
SCORES = [[0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.7, 0.4, 0.9]]
#: Loss on domain j: untrained, then after each domain.
LOSSES = [[8.0, 8.0, 8.0], [2.0, 7.0, 6.0], [4.0, 3.0, 6.5], [5.0, 3.5, 2.5]]


def exactly(value):
    return pytest.approx(value, abs=1e-12)


def test_scores_by_hand():
    assert retention.average_score(SCORES) == exactly((0.7 + 0.4 + 0.9) / 3)
    assert retention.worst_score(SCORES) == exactly(0.4)
    assert retention.backward_transfer(SCORES) == exactly(((0.7 - 0.9) + (0.4 - 0.8)) / 2)
    assert retention.forward_transfer(SCORES, [0.1, 0.1, 0.1]) == exactly(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert retention.forgetting(SCORES) == exactly(((0.9 - 0.7) + (0.8 - 0.4)) / 2)
    assert retention.intransigence(SCORES, [0.9, 0.85, 0.95]) == exactly((0 + 0.05 + 0.05) / 3)
    assert retention.accuracy_diaz(SCORES) == exactly((0.9 + 0.5 + 0.8 + 0.7 + 0.4 + 0.9) / 6)
    diaz = ((0.5 - 0.9) + (0.7 - 0.9) + (0.4 - 0.8)) / 3
    assert retention.backward_transfer_diaz(SCORES) == exactly(diaz)
    assert retention.remembering_diaz(SCORES) == exactly(1 + diaz)
    assert retention.learning_curve_area([[0.0, 0.4, 0.6], [0.2, 0.6, 0.6]]) == exactly((0.1 + 0.5 + 0.6) / 3)


def test_forgetting_is_over_earlier_rows_only():
    better = [[0.5, 0.0], [0.8, 0.9]]  # the first domain has gained by the second
    assert retention.forgetting(better) == exactly(-0.3) and retention.backward_transfer(better) == exactly(0.3)


def test_worst_cases_by_hand():
    curves = {0: [0.9, 0.3, 0.6], 1: [0.8, 0.7]}
    assert retention.minimum_score(curves) == exactly(0.5)
    assert retention.worst_case_score(0.9, curves) == exactly(0.9 / 3 + 2 / 3 * 0.5)
    scores = [0.9, 0.5, 0.7, 0.2, 0.8]
    assert retention.windowed_drop(scores, 2) == exactly(0.5) and retention.windowed_drop(scores, 4) == exactly(0.7)
    assert retention.windowed_rise(scores, 2) == exactly(0.6) and retention.windowed_drop([0.1, 0.2], 2) <= 0


def test_losses_by_hand():
    assert retention.plasticity(LOSSES) == exactly((2.0 + 3.0 + 2.5) / 3)
    assert retention.backward_transfer_loss(LOSSES) == exactly(((2.0 - 5.0) + (3.0 - 3.5)) / 2)
    assert retention.forgetting_loss(LOSSES) == exactly(((5.0 - 2.0) + (3.5 - 3.0)) / 2)
    assert retention.normalised_forgetting(LOSSES) == exactly((3.0 / 6.0 + 0.5 / 5.0) / 2)
    curves = {"a": [3.0, 2.0, 5.0, 2.5], "b": [4.0, 4.5]}
    assert retention.stability_gap(curves) == exactly((3.0 + 0.5) / 2)
    assert retention.lost_since_best(curves) == exactly((0.5 + 0.5) / 2)


def test_one_domain_has_no_transfer():
    with pytest.raises(ValueError, match="needs at least 2"):
        retention.backward_transfer([[0.5]])
    with pytest.raises(ValueError, match="window: got 1, needs at least 2"):
        retention.windowed_drop([0.5], 1)


def test_probes_are_a_bounded_sample_that_no_order_changes():
    texts = [f"record number {n} " * 5 for n in range(400)]
    held = texts[::8]
    orders = [held, held[::-1], held + held]
    made = []
    for order in orders:
        probes = Probes(limit=1000)
        for text in order:
            probes.add("a", text)
        made.append(probes.state()["kept"]["a"])
    assert made[0] == made[1] == made[2] and sum(len(text) for _, text in made[0]) <= 1000
    one = Probes(limit=5)
    one.add("", "longer than that")
    assert one.domains == ["all"]  # one record is always kept


def test_domains_without_end_stay_bounded():
    probes = Probes(100)
    for number in range(300):
        probes.add(f"user {number}", f"text of user {number}")
    assert len(probes.domains) == 101 and "other" in probes.domains


def test_rows_of_probes_predict_every_byte_they_count():
    probes = Probes(1000)
    for text in ("héllo", "second text"):
        probes.add("a", text)
    rows, size = probes.rows("a", Tokenizer.bytes(), 4)
    assert rows.shape == (4, 5) and (rows[1:, 0] == rows[:-1, 4]).all()
    assert size == (rows[:, 1:] != 256).sum()
    again = Probes(1000)
    again.load(json.loads(json.dumps(probes.state())))
    assert (again.rows("a", Tokenizer.bytes(), 4)[0] == rows).all()


def test_the_figures_of_an_evaluation():
    probes = Probes(10)
    probes.record({"a": 3.0})
    figures = probes.record({"a": 5.0, "b/c": 4.0})
    assert figures["probe/a/bits_per_byte"] == 5.0 and figures["probe/b_c/bits_per_byte"] == 4.0
    assert (figures["probe/mean_bits_per_byte"], figures["probe/worst_bits_per_byte"]) == (4.5, 5.0)
    assert figures["probe/forgetting"] == exactly(1.0)


def test_the_figures_are_those_of_the_whole_curves():
    source, probes = random.Random(1), Probes(10)
    curves = {name: [source.uniform(2, 8) for _ in range(20)] for name in ("a", "b", "c")}
    for row in zip(*curves.values(), strict=True):
        figures = probes.record(dict(zip(curves, row, strict=True)))
    assert figures["probe/forgetting"] == exactly(retention.lost_since_best(curves))
    assert figures["probe/stability_gap"] == exactly(retention.stability_gap(curves))


def test_page_hinkley_by_the_definition():
    """The alarm stands where the sums of the definition, written out, say it must."""
    noise = random.Random(0)
    values = [4 + noise.gauss(0, 0.1) for _ in range(60)] + [4.8 + noise.gauss(0, 0.1) for _ in range(20)]
    detector = PageHinkley()
    alarm = next(place for place, value in enumerate(values) if detector.add(value))
    sums, mean = [0.0], 0.0
    for place, value in enumerate(values, 1):
        mean += (value - mean) / place
        sums.append(sums[-1] + value - mean - 0.1)
    expected = next(t for t in range(10, len(sums)) if sums[t] - min(sums[: t + 1]) > 3.0) - 1
    assert alarm == expected and 60 <= alarm < 68


def test_a_single_strange_batch_is_no_drift():
    steady = [4.0] * 30
    assert not any(map(PageHinkley().add, [*steady, 30.0, *steady]))
    detector = PageHinkley(most=100.0)  # the control: without the bound it is
    assert any(map(detector.add, [*steady, 30.0]))
    three = [PageHinkley().add for _ in range(2)]
    assert not any(map(three[0], [*steady, 6.0, 6.0, 6.0])) and any(map(three[1], [*steady, 6.0, 6.0, 6.0, 6.0]))


def test_half_a_batch_counts_half():
    whole, half = PageHinkley(threshold=1.5), PageHinkley(threshold=1.5)
    for _ in range(20):
        whole.add(4.0)
        half.add(4.0)
    steps = [next(n for n in range(1, 20) if each.add(8.0, weight)) for each, weight in ((whole, 1.0), (half, 0.5))]
    assert steps == [2, 4]


def test_a_falling_loss_is_no_alarm():
    detector = PageHinkley()
    assert not any(detector.add(8 - 0.05 * step) for step in range(100))

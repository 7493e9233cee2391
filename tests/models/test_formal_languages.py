"""Formal languages and associative recall: every label recomputed by another method from the tokens alone."""

from __future__ import annotations

import random
import re

import pytest
import torch

from nestling.tasks import IGNORE, Examples, FormalLanguage, Mqar, generator, scores
from nestling.tasks.formal_languages import LANGUAGES, WINDOWS


def texts(language: str, examples: Examples) -> list[tuple[str, list[int]]]:
    symbols = LANGUAGES[language].symbols
    found = []
    for inputs, targets in zip(*examples, strict=True):
        scored = int((targets != IGNORE).sum())
        assert (targets[scored:] == IGNORE).all(), "only a string's own symbols are scored, and all of them"
        found.append(("".join(symbols[token] for token in inputs[:scored]), targets[:scored].tolist()))
    return found


def nested(text: str, pair: str) -> bool:
    """Whether brackets of one kind are all closed, by striking out neighbours."""
    text = re.sub("[^" + re.escape(pair) + "]", "", text)
    while pair in text:
        text = text.replace(pair, "")
    return not text


def expected(language: str, prefix: str) -> int:
    if language == "parity":
        return int(re.fullmatch("(0*10*1)*0*", prefix) is not None)
    if language in ("(aa)*", "(abab)*"):
        return int(re.fullmatch(language, prefix) is not None)
    if language == "Shuffle-2":
        return (not nested(prefix, "()")) + 2 * (not nested(prefix, "[]"))
    # What may follow: all strings of the language that begin so.
    letters = LANGUAGES[language].symbols
    whole = ["".join(letter * n for letter in letters) + "$" for n in range(1, 102)]
    follow = "".join(sorted({word[len(prefix)] for word in whole if word.startswith(prefix)}))
    return ["ab", *letters[1:], "$"].index(follow)


@pytest.mark.parametrize("language", LANGUAGES)
def test_labels_follow_from_the_language_by_another_method(language: str) -> None:
    task = FormalLanguage(language, test_examples=20)
    tests = task.tests(1)
    assert list(tests) == ["bin0", "bin1"]
    for examples in (task.sample(20, generator(0)), tests["bin1"]):
        seen = set()
        for text, labels in random.Random(0).sample(texts(language, examples), 6):
            for place in range(1, len(text) + 1):
                assert labels[place - 1] == expected(language, text[:place]), text[:place]
            seen.update(labels)
        assert max(seen) < task.classes <= task.vocab_size


@pytest.mark.parametrize("language", LANGUAGES)
def test_strings_are_in_their_window_and_of_the_language(language: str) -> None:
    task = FormalLanguage(language)
    per_size = {"a^n b^n": 2, "a^n b^n c^n": 3}.get(language, 1)
    for test, examples in task.tests(2).items():
        low, high = WINDOWS[test]
        strings = [text for text, _ in texts(language, examples)]
        assert len(set(strings)) == len(strings) <= 2000
        sizes = {len(text) // per_size for text in strings}
        assert low <= min(sizes) and max(sizes) <= high
        counts = {"(aa)*": (25, 25), "(abab)*": (12, 13), "a^n b^n": (49, 50), "a^n b^n c^n": (49, 50)}
        assert len(strings) == counts.get(language, (2000, 2000))[test == "bin1"]
        ends = {"parity": 1, "(aa)*": 1, "(abab)*": 1, "a^n b^n": 2, "a^n b^n c^n": 3, "Shuffle-2": 0}
        assert {labels[-1] for _, labels in texts(language, examples)} == {ends[language]}, "whole words only"


@pytest.mark.parametrize("language", LANGUAGES)
def test_validation_has_strings_of_both_windows(language: str) -> None:
    task, size = FormalLanguage(language), {"a^n b^n": 2, "a^n b^n c^n": 3}.get(language, 1)
    validation = task.validation(generator(0), 40)
    sizes = [len(text) // size for text, _ in texts(language, validation)]
    assert len(sizes) == 40 and max(sizes[:20]) <= WINDOWS["bin0"][1] < WINDOWS["bin1"][0] <= min(sizes[20:])
    assert all(labels[-1] == expected(language, text) for text, labels in texts(language, validation))


def test_parity_strings_are_as_long_as_the_generator_makes_them() -> None:
    """Symbols come with equal odds; a string of 2 to 50 goes on with probability 26 / 27."""
    strings = [text for text, _ in texts("parity", FormalLanguage("parity").sample(4000, generator(3)))]
    assert len(set(strings)) == 4000
    assert sum(text.count("1") for text in strings) / sum(map(len, strings)) == pytest.approx(0.5, abs=0.02)
    short, middle = (sum(low <= len(text) < low + 10 for text in strings) for low in (11, 31))
    assert middle / short == pytest.approx((26 / 27) ** 20, abs=0.08)


def test_the_same_seed_makes_the_same_strings_and_another_one_others() -> None:
    for task in (FormalLanguage("parity"), FormalLanguage("Shuffle-2"), Mqar(), Mqar(updates=4)):
        first, again, other = (task.sample(16, generator(seed)) for seed in (0, 0, 1))
        assert torch.equal(first.inputs, again.inputs) and torch.equal(first.targets, again.targets)
        assert not torch.equal(first.targets, other.targets)


def test_guessing_scores_the_chance_level() -> None:
    for task, test in ((FormalLanguage("(aa)*"), "bin0"), (Mqar(test_examples=4000), "test")):
        targets = task.tests(0)[test].targets.repeat(200 if test == "bin0" else 1, 1)
        classes = targets[targets != IGNORE].unique()
        guesses = classes[torch.randint(len(classes), targets.shape, generator=generator(4))]
        assert scores(guesses, targets)[task.metric] == pytest.approx(task.chance(test), rel=0.1)


@pytest.mark.parametrize("task", [Mqar(), Mqar(updates=4), Mqar(pairs=16, length=128, updates=16), Mqar(1, 0, 8, 1, 1)])
def test_queries_are_answered_by_replaying_the_pairs(task: Mqar) -> None:
    examples = task.sample(50, generator(0))
    assert examples.inputs.shape == (50, task.length)
    for row, answers in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        bound: dict[int, list[int]] = {}
        context = 2 * (task.pairs + task.updates)
        for place in range(0, context, 2):
            key, value = row[place : place + 2]
            assert 1 <= key <= task.keys < value < task.vocab_size
            bound.setdefault(key, []).append(value)
            assert answers[place : place + 2] == [IGNORE, IGNORE]
        assert sorted(map(len, bound.values())) == [1] * (task.pairs - task.updates) + [2] * task.updates
        assert all(len(set(values)) == len(values) for values in bound.values()), "another value"
        asked = [row[place] for place in range(context, task.length) if row[place]]
        assert sorted(asked) == sorted(bound), "each key once"
        for place in range(context, task.length):
            assert answers[place] == (bound[row[place]][-1] if row[place] else IGNORE)


def test_queries_come_soon_more_often_than_late() -> None:
    """One query among 15 slots has odds of slot^(power - 1), about 1 / slot."""
    targets = Mqar(pairs=1, length=32).sample(4000, generator(0)).targets
    taken = (targets[:, 2::2] != IGNORE).double().mean(0)
    odds = torch.arange(1, 16, dtype=torch.float64) ** -0.99
    assert torch.allclose(taken, odds / odds.sum(), atol=0.02)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pairs": 33, "length": 256}, "pairs: got 33, needs 1 to 32"),
        ({"length": 30}, "length: got 30, needs an even number of at least 32"),
        ({"updates": 9}, "updates: got 9, needs 0 to 8"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Mqar(**settings)


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="language: got 'dyck', needs one of parity"):
        FormalLanguage("dyck")

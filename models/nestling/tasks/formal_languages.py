"""Six formal languages, labelled symbol by symbol (Bhattamishra et al. 2020, arXiv:2009.11264, as in Irie et al. 2023).

A model reads a string and names the class of every prefix; the string counts only if all positions are right. Training
strings have sizes 2 to 50; the second test set is longer than anything trained on: a state was learned, or it was not.
The task of arXiv:2512.24695, Table 5.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from nestling.tasks.task import Examples, Metric, Task, drawn, generator, padded

#: Draws in a row without a new string after which a language has no more of them in the window.
PATIENCE = 1000
#: Sizes of the strings: trained on and tested first, and tested second.
WINDOWS = {"bin0": (2, 50), "bin1": (51, 100)}


@dataclass(frozen=True)
class Language:
    """How the strings of one language are drawn and labelled.

    Attributes:
        symbols: the alphabet; token i is its i-th symbol.
        classes: number of classes that a prefix can have.
        draw: a string from a generator and the window (lowest, highest size); outside the window it is drawn again.
        label: the classes of a string's prefixes.
        blocks: symbols that one unit of size takes: a^n b^n is 2 n long, and its size is n.
        repeats: training strings may repeat, because there are only so many.
    """

    symbols: str
    classes: int
    draw: Callable[[random.Random, int, int], str]
    label: Callable[[str], list[int]]
    blocks: int = 1
    repeats: bool = True

    def strings(self, count: int, window: tuple[int, int], rng: random.Random, repeats: bool) -> list[str]:
        """`count` strings with sizes in the window; without repeats fewer, if the language has fewer."""
        low, high = window
        found: list[str] = []
        seen: set[str] = set()
        misses = 0
        while len(found) < count and misses < PATIENCE:
            text = self.draw(rng, low, high)
            if low <= len(text) // self.blocks <= high and (repeats or text not in seen):
                found.append(text)
                seen.add(text)
                misses = 0
            else:
                misses += 1
        return found


@dataclass(frozen=True)
class FormalLanguage(Task):
    """Prefix labelling of one language; chance is a uniform guess at every position.

    Attributes:
        language: one of `LANGUAGES`.
        test_examples: strings of each test at most, no string twice; the small languages have 12 to 50.

    Raises:
        ValueError: an unknown language.
    """

    name: ClassVar[str] = "formal language"
    metric: ClassVar[Metric] = "sequence_accuracy"

    language: str = "parity"
    test_examples: int = 2000

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ValueError(f"language: got {self.language!r}, needs one of {', '.join(LANGUAGES)}")

    @property
    def vocab_size(self) -> int:
        return max(len(self._rule.symbols), self.classes)

    @property
    def classes(self) -> int:
        return self._rule.classes

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        return self._encoded(self._rule.strings(count, WINDOWS["bin0"], drawn(generator), self._rule.repeats))

    def validation(self, generator: torch.Generator, count: int = 128) -> Examples:
        """Strings of both windows, half and half, so that what is chosen by them extrapolates if anything does.

        Periodic and counting languages have one string of each size, which the tests have as well.
        """
        rng = drawn(generator)
        windows = [self._rule.strings(count // 2, window, rng, repeats=True) for window in WINDOWS.values()]
        return self._encoded(sum(windows, []))

    def tests(self, seed: int) -> dict[str, Examples]:
        rng = drawn(generator(4 * seed))  # training and validation draw from the next ones
        return {
            test: self._encoded(self._rule.strings(self.test_examples, window, rng, repeats=False))
            for test, window in WINDOWS.items()
        }

    def chance(self, test: str) -> float:
        """A uniform guess at every position gets a string of L symbols right with probability classes^-L."""
        if test not in WINDOWS:
            raise ValueError(f"test: got {test!r}, needs one of {', '.join(WINDOWS)}")
        strings = self._rule.strings(self.test_examples, WINDOWS[test], random.Random(0), repeats=False)
        return sum(float(self.classes) ** -len(text) for text in strings) / len(strings)

    @property
    def _rule(self) -> Language:
        return LANGUAGES[self.language]

    def _encoded(self, strings: list[str]) -> Examples:
        token = {symbol: index for index, symbol in enumerate(self._rule.symbols)}
        return padded([[token[symbol] for symbol in text] for text in strings], [*map(self._rule.label, strings)])


def _parity(rng: random.Random, low: int, high: int) -> str:
    """Symbols until a stop, so that the mean length is about the window's middle; a last 1 makes the ones even."""
    mean = (low + high) // 2
    p = mean / (2 * (1 + mean))
    text = ""
    while len(text) < high and (u := rng.random()) < 2 * p:
        text += "0" if u < p else "1"
    return text + "1" if text.count("1") % 2 else text


def _label_parity(text: str) -> list[int]:
    """1 where the prefix has an even number of ones."""
    odd, labels = False, []
    for symbol in text:
        odd ^= symbol == "1"
        labels.append(int(not odd))
    return labels


def _star(word: str) -> Language:
    """word*: class 1 where the prefix is a whole number of words."""
    size = len(word)
    return Language(
        symbols="".join(dict.fromkeys(word)),
        classes=2,
        draw=lambda rng, low, high: word * (rng.randint(low, high) // size),
        label=lambda text: [int(place % size == 0) for place in range(1, len(text) + 1)],
    )


def _counted(symbols: str) -> Language:
    """a^n b^n (c^n): what may come next. Class 0 is a or b, class i is symbol i, and the class behind them the end."""

    def draw(rng: random.Random, low: int, high: int) -> str:
        n = rng.randint(low, high)
        return "".join(symbol * n for symbol in symbols)

    def label(text: str) -> list[int]:
        n = len(text) // len(symbols)
        labels = [0] * n
        for block in range(1, len(symbols)):
            labels += [block] * (n - 1) + [block + 1]
        return labels

    return Language(symbols, len(symbols) + 1, draw, label, blocks=len(symbols))


def _shuffle(rng: random.Random, low: int, high: int) -> str:
    """S -> (S) or [S] (1/2), SS (1/4), nothing (1/4), cut where it exceeds the window, as in the released generator.

    Its strings are well nested, so they are a subset of the shuffles of two Dyck languages.
    """

    def expand(used: int) -> str:
        u = rng.random()
        if used >= high or u >= 0.75:
            return ""
        if u >= 0.5:
            text = expand(used) + expand(used)
        else:
            left, right = rng.choice(("()", "[]"))
            text = left + expand(used + 2) + right
        return text if len(text) <= high else ""

    return expand(0)


def _label_shuffle(text: str) -> list[int]:
    """Which brackets are open: 1 for round ones, plus 2 for square ones."""
    open_round = open_square = 0
    labels = []
    for symbol in text:
        open_round += (symbol == "(") - (symbol == ")")
        open_square += (symbol == "[") - (symbol == "]")
        labels.append((open_round > 0) + 2 * (open_square > 0))
    return labels


LANGUAGES: dict[str, Language] = {
    "parity": Language("01", 2, _parity, _label_parity, repeats=False),
    "(aa)*": _star("aa"),
    "(abab)*": _star("abab"),
    "a^n b^n": _counted("ab"),
    "a^n b^n c^n": _counted("abc"),
    "Shuffle-2": Language("()[]", 4, _shuffle, _label_shuffle, repeats=False),
}

"""The search space: what varies in a job, as independent dimensions, and what a point in them changes.

    training.learning_rate: {log_uniform: [1e-4, 1e-2]}     # uniform, integers (both ends included), choice
    model.chunk_size: [16, 64]                              # a list is a choice
    levels: {ladder: {count: [1, 2, 3], base: 1, ratio: [2, 4], width: 96}}

A ladder makes the job's list of levels: `count` of them with the periods base x ratio^i, or `periods`, a choice of
lists. Its other fields (width, unit, optimizer, learning_rate) hold for each of its levels. A field that is one value
does not vary.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nestling.config import ConfigError
from nestling.config.build import unknown_key

#: A value for each dimension, by its name.
Point = dict[str, Any]

LADDER = "levels.ladder."
_LADDER_FIELDS = ("count", "base", "ratio", "periods", "width", "unit", "optimizer", "learning_rate")
_RANGES = ("uniform", "log_uniform", "integers")
#: Significant digits of a number that is drawn, so that a label says all of it.
DIGITS = 4


@dataclass(frozen=True)
class Dimension:
    """One thing that varies: values to choose from, or a range.

    Attributes:
        key: the job's key, or `levels.ladder.FIELD`.
        choices: the values; empty for a range.
        low, high: the ends of a range.
        log: whether equal ratios are equally likely in it, and not equal differences.
        whole: whether it holds whole numbers only.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @property
    def varies(self) -> bool:
        return len(self.choices) != 1

    def draw(self, generator: random.Random) -> Any:
        """A random value."""
        if self.choices:
            return generator.choice(self.choices)
        if self.log:
            return self.tidy(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))
        return (
            generator.randint(int(self.low), int(self.high))
            if self.whole
            else self.tidy(generator.uniform(self.low, self.high))
        )

    def tidy(self, value: float) -> Any:
        """The number in the range that is next to `value` and has few digits."""
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else float(f"{value:.{DIGITS}g}")

    def near(self, value: Any, generator: random.Random) -> Any:
        """A neighbour of a value, or itself: the next choice on either side, or 0.8 or 1.25 times as much."""
        if self.choices:
            place = self.choices.index(value) + generator.choice((-1, 0, 1))
            return self.choices[min(max(place, 0), len(self.choices) - 1)]
        return self.tidy(value * generator.choice((0.8, 1.25)))

    def ends(self) -> tuple[Any, ...]:
        """The values that are tried before anything starts: all choices, or both ends."""
        return self.choices or (self.tidy(self.low), self.tidy(self.high))


class Space:
    """The dimensions of a sweep.

    Args:
        given: the section `space` of the sweep.

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.dimensions: list[Dimension] = []
        for key, values in given.items():
            if key == "levels" and isinstance(values, Mapping) and set(values) == {"ladder"}:
                self.dimensions += _ladder(values["ladder"])
            else:
                self.dimensions.append(_dimension(str(key), values))

    def grid(self) -> Iterator[Point]:
        """Every combination. Raises ConfigError for a range, which has no end of values."""
        for each in self.dimensions:
            if not each.choices:
                raise ConfigError(
                    f"space.{each.key}: is a range, and searcher=grid needs a list of values; or choose searcher=random"
                )
        for values in itertools.product(*(each.choices for each in self.dimensions)):
            yield dict(zip((each.key for each in self.dimensions), values, strict=True))

    def draw(self, generator: random.Random) -> Point:
        """A random point."""
        return {each.key: each.draw(generator) for each in self.dimensions}

    def near(self, point: Point, generator: random.Random) -> Point:
        """A point beside another one."""
        return {each.key: each.near(point[each.key], generator) for each in self.dimensions}

    def changes(self, point: Point, width: int | None) -> dict[str, Any]:
        """What the job gets at a point, by its keys; `width` is that of a ladder's levels which gives none."""
        found = {key: value for key, value in point.items() if not key.startswith(LADDER)}
        ladder = {key.removeprefix(LADDER): value for key, value in point.items() if key.startswith(LADDER)}
        if ladder:
            periods = ladder.pop("periods", None) or _periods(ladder)
            each = {"width": width} | {name: ladder[name] for name in _LADDER_FIELDS[4:] if name in ladder}
            found["levels"] = [{**each, "period": period} for period in periods]
        return found

    def values(self, point: Point) -> dict[str, Any]:
        """What varies at a point, as a person would name it; a ladder is `levels`, such as "every 1, 4"."""
        varying = [each.key for each in self.dimensions if each.varies]
        made = {}
        timing = {LADDER + name for name in _LADDER_FIELDS[:4]}
        if timing & set(varying):
            made["levels"] = said(self.changes({key: point[key] for key in point if key in timing}, None)["levels"])
        for key in varying:
            if key not in timing:
                name = key.replace(LADDER, "levels.")
                made[name] = said(point[key]) if isinstance(point[key], list) else point[key]
        return made


def said(value: list[Any]) -> str:
    """A list as a person would say it; levels by their periods."""
    if value and all(isinstance(item, Mapping) and "period" in item for item in value):
        return f"every {', '.join(str(item['period']) for item in value)}"
    return ", ".join(item if isinstance(item, str) else json.dumps(item) for item in value) or "none"


def label(values: Mapping[str, Any]) -> str:
    """The name of an arm: what varies, without the sections that its keys are in; `job` if nothing does."""
    short = {key: key.rpartition(".")[2] for key in values}
    unique = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
    return "; ".join(f"{unique[key]} {_number(value)}" for key, value in values.items()) or "job"


def _number(value: Any) -> str:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def _periods(ladder: Mapping[str, Any]) -> list[int]:
    return [ladder.get("base", 1) * ladder.get("ratio", 1) ** number for number in range(ladder.get("count", 1))]


def _ladder(given: Any) -> list[Dimension]:
    where = LADDER.rstrip(".")
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f"space.{where}: got {given!r}, needs a mapping such as {{count: [1, 2], base: 1, ratio: [4]}}"
        )
    for name in given:
        if name not in _LADDER_FIELDS:
            raise unknown_key(f"space.{LADDER}{name}", [f"space.{LADDER}{known}" for known in _LADDER_FIELDS])
    timing = [name for name in ("count", "base", "ratio") if name in given]
    if "periods" in given and timing:
        raise ConfigError(f"space.{LADDER}periods: was given beside {', '.join(timing)}; needs one or the other")
    if "periods" in given and not all(isinstance(each, list) for each in _listed(given["periods"])):
        raise ConfigError(f"space.{LADDER}periods: got {given['periods']!r}, needs lists, such as [[1], [1, 4]]")
    if "periods" not in given and "count" not in given:
        raise ConfigError(f"space.{where}: has neither count nor periods; give count: [1, 2, 3], for example")
    dimensions = [_dimension(LADDER + name, values) for name, values in given.items()]
    for each in dimensions:
        if each.key.removeprefix(LADDER) in ("count", "base", "ratio", "width"):
            for value in each.ends():
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ConfigError(f"space.{each.key}: got {value!r}, needs whole numbers of at least 1")
    return dimensions


def _dimension(key: str, values: Any) -> Dimension:
    where = f"space.{key}"
    if isinstance(values, Mapping):
        if len(values) != 1 or next(iter(values)) not in (*_RANGES, "choice"):
            raise ConfigError(f"{where}: got {dict(values)}, needs one of choice, {', '.join(_RANGES)}")
        ((kind, values),) = values.items()
        if kind != "choice":
            return _range(key, kind, values)
    choices = _listed(values)
    if not choices:
        raise ConfigError(f"{where}: got an empty list, needs at least one value")
    return Dimension(key, tuple(choices))


def _range(key: str, kind: str, ends: Any) -> Dimension:
    numbers = isinstance(ends, list) and [each for each in ends if isinstance(each, (int, float))]
    if not numbers or len(numbers) != 2 or len(ends) != 2 or not numbers[0] < numbers[1]:
        raise ConfigError(f"space.{key}.{kind}: got {ends!r}, needs [lowest, highest]")
    low, high = numbers
    if kind == "log_uniform" and low <= 0:
        raise ConfigError(f"space.{key}.{kind}: got {ends!r}, needs values above 0")
    if kind == "integers" and not all(isinstance(each, int) for each in numbers):
        raise ConfigError(f"space.{key}.{kind}: got {ends!r}, needs whole numbers")
    return Dimension(key, low=low, high=high, log=kind == "log_uniform", whole=kind == "integers")


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [values]

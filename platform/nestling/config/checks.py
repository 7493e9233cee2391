"""Checks of single values, with messages that name the full key, what was given and what is needed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable


def need(where: str, config: object, needs: str, holds: Callable[[float], bool], *names: str) -> None:
    """Checks the named fields of a section; None stands for "filled in later" and passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{where}.{name}: got {value}, needs {needs}")


def need_name(where: str, value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError(
            f"{where}: got {value!r}, needs letters, digits, '_', '-' and '.' only, and a letter or digit first"
        )


def need_different(where: str, what: str, names: list[str | None]) -> None:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(
                f"{where}.{place}.name: {name!r} is the name of {where}.{names.index(name)} too; "
                f"give each {what} a name of its own"
            )


def whole(value: float) -> bool:
    return value >= 1


def positive(value: float) -> bool:
    return 0 < value < math.inf


def not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def fraction(value: float) -> bool:
    return 0 <= value <= 1

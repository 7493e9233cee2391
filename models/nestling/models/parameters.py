"""Models of equal size: how many parameters a configuration has, and the width that gives it as many as another.

Parameters are counted on the meta device, so that a model of any size is counted without its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from nestling.models.config import SkeletonConfig
from nestling.models.factory import make

Config = TypeVar("Config", bound=SkeletonConfig)
#: The fields that close the gap which the width leaves; a model has one of them, or uses one.
INNER_WIDTHS = ("mlp_width", "level_widths", "inner_width", "hidden_width")


def parameter_count(config: SkeletonConfig) -> int:
    """Parameters of the model, those that a tied head shares counted once. Raises ValueError without `vocab_size`."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make(config).parameters())


def match_parameters(config: Config, target: int | SkeletonConfig, *, tolerance: float = 0.005) -> Config:
    """The configuration with another width, so that it has as many parameters as the target.

    The residual width is the multiple of two per head that comes nearest, everything else in proportion. What is left
    is closed by the model's inner width (SwiGLU, Continuum Memory System levels, Mamba-2's mixer, LSTM cells): a
    multiple of 8, or where none comes within the tolerance any whole number, the nearest (times `heads` for Mamba-2).

    Args:
        config: what to change; layers, heads, vocabulary and all else stay.
        target: a number of parameters, or the configuration of the model that has it.
        tolerance: largest relative difference.

    Raises:
        ValueError: no width comes within the tolerance, or a `vocab_size` is missing.
    """
    wanted = target if isinstance(target, int) else parameter_count(target)
    unit = 2 * config.heads
    wide = _scaled(config, unit * _nearest(lambda units: parameter_count(_scaled(config, unit * units)), wanted))
    best, gap = wide, abs(parameter_count(wide) - wanted)
    field = _inner_width(config)
    for multiple in (8, 1):
        if field is None or gap <= tolerance * wanted:
            break
        closest = _filled(wide, field, multiple, wanted)
        best, gap = min((best, gap), (closest, abs(parameter_count(closest) - wanted)), key=lambda pair: pair[1])
    if gap > tolerance * wanted:
        raise ValueError(
            f"match_parameters: {config.name} with {config.layers} layers and {config.heads} heads comes to "
            f"{parameter_count(best):,} parameters at width {best.width}, needs {wanted:,} within {tolerance:.2%}; "
            "change its layers or heads, the vocabulary, or raise the tolerance"
        )
    return best


def _filled(config: Config, field: str, multiple: int, wanted: int) -> Config:
    """With the multiple for the inner width that brings the number of parameters nearest to `wanted`."""
    step = multiple * (config.heads if field == "inner_width" else 1)

    def with_steps(steps: int) -> Config:
        changes: dict[str, Any] = {field: _resized(getattr(config, field), steps * step)}
        return replace(config, **changes)

    return with_steps(_nearest(lambda steps: parameter_count(with_steps(steps)), wanted))


def _inner_width(config: SkeletonConfig) -> str | None:
    """The field that is set, else the one whose default follows the width; levels that are left out stay out."""
    given = [name for name in INNER_WIDTHS if getattr(config, name, None)]
    following = [name for name in INNER_WIDTHS if hasattr(config, name) and not hasattr(config, "level_widths")]
    return next(iter(given + following), None)


def _scaled(config: Config, width: int) -> Config:
    """At another residual width; inner widths that are given keep their ratio to it, the others follow by default."""
    changes: dict[str, Any] = {"width": width}
    for name in INNER_WIDTHS:
        value = getattr(config, name, None)
        if value:
            first = value[0] if isinstance(value, list) else value
            unit = config.heads if name == "inner_width" else 1
            changes[name] = _resized(value, max(1, round(first * width / config.width / unit)) * unit)
    return replace(config, **changes)


def _resized(value: int | list[int] | None, first: int) -> int | list[int]:
    """An inner width of `first`; of several, the others in proportion to the first."""
    if isinstance(value, list):
        return [max(1, round(first * other / value[0])) for other in value]
    return first


def _nearest(count: Callable[[int], int], wanted: int) -> int:
    """The n >= 1 whose count, which grows with n, is nearest to `wanted`."""
    high = 1
    while count(high) < wanted:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    return high if low == 0 or count(high) - wanted < wanted - count(low) else low

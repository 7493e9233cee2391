"""Update rules that a level can move by, under their names, each with its settings and what they have to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nestling.optim.delta import bind, delta_momentum, release
from nestling.optim.matrices import Whole
from nestling.optim.orthogonal import MODES, m3, muon
from nestling.optim.rules import State, adamw, deep_momentum, descent, sgd

Rule = Callable[[Tensor, Tensor, State, dict[str, Any], Whole], Tensor]


@dataclass(frozen=True)
class Component:
    """A rule, its settings' defaults, and what it is for."""

    rule: Rule
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: The rule is for matrices; vectors and what has `matrix=False` move by AdamW.
    matrices_only: bool = False
    #: The rule works on whole matrices, see `nestling.optim.matrices.Whole`.
    sees_whole: bool = False
    #: Called with every new group of the rule.
    prepare: Callable[[dict[str, Any]], None] = release


COMPONENTS: dict[str, Component] = {
    "adamw": Component(adamw, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "sgd": Component(sgd, {"momentum": 0.0}),
    "m3": Component(
        m3,
        {
            "betas": (0.95, 0.99, 0.9),
            "slow_weight": 0.5,
            "slow_period": 10,
            "ns_steps": 5,
            "eps": 1e-8,
            "mode": "ema",
        },
        matrices_only=True,
        sees_whole=True,
    ),
    "muon": Component(
        muon,
        {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "betas": (0.9, 0.95), "eps": 1e-8},
        matrices_only=True,
        sees_whole=True,
    ),
    "delta_momentum": Component(delta_momentum, {"momentum": 0.9}, sees_whole=True),
    "deep_momentum": Component(deep_momentum, {"betas": (0.9, 0.999), "hidden": 2, "eps": 1e-8}),
    "delta_gradient_descent": Component(descent, prepare=bind),
}

#: Every setting of some rule; None stands for "the rule's own default".
SETTINGS = sorted({name for component in COMPONENTS.values() for name in component.settings})


def rule_name(group: dict[str, Any], parameter: Tensor, whole: Whole) -> str:
    """The name of the rule that moves a parameter of a group."""
    component = COMPONENTS[group["optimizer"]]
    if component.matrices_only and not (group["matrix"] and whole.is_matrix(parameter)):
        return "adamw"
    return str(group["optimizer"])


def rule_of(group: dict[str, Any], parameter: Tensor, whole: Whole) -> Rule:
    """The rule that moves a parameter of a group."""
    return COMPONENTS[rule_name(group, parameter, whole)].rule


def check_settings(group: dict[str, Any], level: str) -> None:
    """Raises ValueError, naming the `level`, for a setting that the group's rule cannot work with."""
    for name in ("lr", "weight_decay", *COMPONENTS[group["optimizer"]].settings):
        needs, holds = _CHECKS[name]
        if name == "betas":
            length = len(COMPONENTS[group["optimizer"]].settings["betas"])
            needs = f"{'two' if length == 2 else 'three'} {needs}"
            right = isinstance(group[name], tuple | list) and len(group[name]) == length and holds(group[name])
        else:
            right = holds(group[name])
        if not right:
            raise ValueError(f"{name} of {level}: got {group[name]!r}, needs {needs}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _not_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _factor(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _whole_number(value: Any) -> bool:
    return type(value) is int and value >= 1


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "betas": ("numbers in [0, 1)", lambda betas: all(map(_factor, betas))),
    "momentum": ("a number in [0, 1)", _factor),
    "nesterov": ("True or False", lambda value: isinstance(value, bool)),
    "mode": (f"one of {', '.join(MODES)}", lambda value: value in MODES),
    **{name: ("a number of at least 0", _not_negative) for name in ("lr", "weight_decay", "eps", "slow_weight")},
    **{name: ("an integer of at least 1", _whole_number) for name in ("slow_period", "ns_steps", "hidden")},
}

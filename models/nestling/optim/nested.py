"""The nested Continuum Memory System over parameters (arXiv:2512.24695, Eq. 72).

A level inside a slower one starts from an initial state that the slower one learns: it makes its moves, its gradients
are summed over the slower level's period, at whose end the initial state moves by that sum under the slower level's
rule (first order), and the level is reset to it. The initial state, the sum and what the rule keeps are optimizer
state of the parameter, under names that begin with `start`; they are sharded and saved like the rest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nestling.optim.components import rule_of
from nestling.optim.matrices import Whole
from nestling.optim.rules import State, buffer


def enclosing(group: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The settings that the initial state of a group's parameters moves by; None for a level that is inside no other.

    They are the slower level's, for the same kind of parameters; `weight_decay` and `matrix` are the group's own.

    Raises:
        ValueError: no group has the slower level's name, or its period is no multiple of this one's.
    """
    name, slower = group["name"], group["slower"]
    if slower is None:
        return None
    named = [other for other in groups if other["name"] == slower]
    if not named or slower == name:
        known = ", ".join(sorted({other["name"] for other in groups} - {name}))
        raise ValueError(f"slower of level {name!r}: got {slower!r}, needs the name of another level ({known})")
    settings = min(named, key=lambda other: other["matrix"] != group["matrix"])
    if settings["unit"] != group["unit"] or settings["period"] % group["period"]:
        raise ValueError(
            f"slower of level {name!r}: got a period of {group['period']} {group['unit']} inside one of "
            f"{settings['period']} {settings['unit']}, needs a whole number of periods in each of the slower level's"
        )
    return {**settings, "matrix": group["matrix"], "weight_decay": group["weight_decay"]}


def remember(parameter: Tensor, gradient: Tensor, state: State) -> None:
    """Before a move by `gradient`: keep the initial state, take in the gradient."""
    if "start" not in state:
        state["start"] = parameter.clone()
    buffer(state, "start_gradient", parameter).add_(gradient)


def reset(parameter: Tensor, state: State, settings: dict[str, Any], whole: Whole) -> Tensor:
    """At the end of the slower level's period: move the initial state, and put the parameter there; the change made."""
    before = parameter.clone()
    parameter.copy_(state["start"])
    own = {key.removeprefix("start_"): value for key, value in state.items() if key.startswith("start_")}
    own["updates"] = own.get("updates", 0) + 1
    gradient = own.pop("gradient")
    parameter.add_(rule_of(settings, parameter, whole)(parameter, gradient, own, settings, whole))
    gradient.zero_()
    state.update({f"start_{key}": value for key, value in own.items()}, start=parameter.clone())
    return parameter - before

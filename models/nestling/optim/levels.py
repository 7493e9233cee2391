"""The Continuum Memory System over parameters: every group moves at its own period (arXiv:2512.24695, Eq. 71).

A level with period p sums the gradients of p steps, moves once by its own update rule, and is byte-equal in between.
Counters and half-filled accumulators are optimizer state, kept per parameter, so that they are sharded, saved and
restored with the rest, whether the optimizer sees parameters or ZeRO's flat shards of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nestling.optim.components import COMPONENTS, SETTINGS, check_settings, rule_of
from nestling.optim.ewc import EWC
from nestling.optim.matrices import Unsharded, Whole, is_matrix
from nestling.optim.nested import enclosing, remember, reset

UNITS = ("steps", "tokens")


class Levels(torch.optim.Optimizer):
    """An optimizer whose parameter groups are levels.

    Args:
        params: parameters, named or not, or dicts of `params` and any of the settings below (as in every torch
            optimizer).
        lr: learning rate.
        name: the level's name; groups of the same name are one level.
        period: steps or tokens between two moves of a level.
        unit: "steps" (optimizer steps) or "tokens" of `period`.
        tokens_per_step: tokens that one optimizer step has read; needed for `unit="tokens"`. A level moves at the end
            of each step in which its count of tokens reaches a multiple of its period, at most once a step.
        optimizer: update rule of the level, one of `COMPONENTS`: "adamw", "sgd", "m3", "muon", "delta_momentum",
            "deep_momentum", "delta_gradient_descent".
        matrix: whether parameters of two and more dimensions are matrices (..., rows, columns) to m3, muon and
            delta_gradient_descent; set it to False for embeddings and heads (`matrix_groups` does, and m3 and muon tell
            them by the names of named parameters). What is no matrix
            moves by AdamW in m3 and muon, by plain gradient descent in delta_gradient_descent.
        weight_decay: decoupled, applied when the level moves.
        slower: name of the level that this one is nested in, see `nestling.optim.nested`; None: it is in none.
        ewc: holds the level to what it has learnt, by a penalty on the loss of every step; None: nothing does.
        settings: of the rules, such as `betas` or `momentum`, each for the groups whose rule has it:
            `betas=(0.9, 0.999)` and `eps=1e-8` of "adamw", `momentum=0` of "sgd", those of M3, Muon, ... of the others.

    Attributes:
        updates: moves made so far, by level name.
        moved: squared norm of what each level moved by since `pop_update_norms`; under ZeRO of this rank's shard.
        paused: while true, `step` changes nothing and counts nothing: the gradients cannot be used.
        frozen: names of levels for which that holds at present, while the others take in their gradients.
        whole: gives the rules whole matrices; another one than the default where parameters are sharded.

    Raises:
        ValueError: a setting out of range or an unknown name.
    """

    whole: Whole = Unsharded()
    frozen: frozenset[str] = frozenset()
    _settings: dict[str, Any]
    #: ids of the parameters that the optimizer was made with.
    _given: set[int]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        name: str = "base",
        period: int = 1,
        unit: str = "steps",
        tokens_per_step: int | None = None,
        optimizer: str = "adamw",
        matrix: bool = True,
        weight_decay: float = 0.0,
        slower: str | None = None,
        ewc: EWC | None = None,
        **settings: Any,
    ) -> None:
        unknown = sorted(settings.keys() - set(SETTINGS))
        if unknown:
            raise ValueError(f"{unknown[0]}: no setting of any update rule, needs one of {', '.join(SETTINGS)}")
        self._settings = settings
        defaults = dict(
            lr=lr,
            name=name,
            period=period,
            unit=unit,
            tokens_per_step=tokens_per_step,
            optimizer=optimizer,
            matrix=matrix,
            weight_decay=weight_decay,
            slower=slower,
            ewc=ewc,
        )
        super().__init__(params, defaults)
        for group in self._groups:
            enclosing(group, self._groups)
        self.updates: dict[str, int] = {group["name"]: 0 for group in self.param_groups}
        self.moved: dict[str, Tensor] = {}
        self.paused = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a level, or parameters to a level of the same name. Raises ValueError as the constructor does."""
        for group in self._by_kind(param_group):
            self._add(group)

    def _by_kind(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Named parameters, (name, tensor), come apart into matrices and the rest where the rule minds."""
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        rule = COMPONENTS.get(group.get("optimizer", self.defaults["optimizer"]))
        named = params and all(isinstance(each, tuple) for each in params)
        if not named or "matrix" in group or rule is None or not rule.matrices_only:
            return [{**group, "params": params}]
        sides = {side: [pair for pair in params if is_matrix(*pair) == side] for side in (True, False)}
        return [{**group, "params": pairs, "matrix": side} for side, pairs in sides.items() if pairs]

    def _add(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._groups = [*self.param_groups]  # all of them, also while ZeRO steps group by group
        group = self.param_groups[-1]
        self.__dict__.setdefault("_given", set()).update(map(id, group["params"]))
        _check(group)
        component = COMPONENTS[group["optimizer"]]
        for setting, default in component.settings.items():
            group.setdefault(setting, self._settings.get(setting, default))
        check_settings(group, f"level {group['name']!r}")
        component.prepare(group)
        for other in self.param_groups:
            if other["name"] == group["name"] and (other["period"], other["unit"]) != (group["period"], group["unit"]):
                raise ValueError(
                    f"level {group['name']!r}: got periods of {other['period']} {other['unit']} and {group['period']} "
                    f"{group['unit']}, needs one period; give the groups different names"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_settings", {})  # torch leaves both out of copies
        self.__dict__.setdefault("_given", {id(p) for group in self.param_groups for p in group["params"]})
        self._groups = [*self.param_groups]
        self.moved, self.paused = {}, False
        self.updates = {group["name"]: 0 for group in self.param_groups}
        for group in self.param_groups:
            COMPONENTS[group["optimizer"]].prepare(group)  # the groups of a loaded state are new
            made = [self.state[p]["updates"] for p in group["params"] if p in self.state]
            self.updates[group["name"]] = max([self.updates[group["name"]], *made])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take in the gradients; move the levels that are due."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in () if self.paused else self.param_groups:
            for parameter in () if group["name"] in self.frozen else group["params"]:
                self.take_in(parameter, group)
        return loss

    def pop_update_norms(self) -> dict[str, Tensor]:
        """`moved`, which then starts again from nothing."""
        norms, self.moved = self.moved, {}
        return norms

    def take_in(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Count a step of one parameter, and move it if its level is due; `step` does so with all of them.

        A parameter without any gradient in a whole period stays, as in every torch optimizer.
        """
        state = self.state[parameter]
        if not state:
            state.update(steps=0, updates=0)
        if "accumulator" not in state and not _every_step(group):  # also when a period has been raised
            state["accumulator"] = torch.zeros_like(parameter)
            state.setdefault("filled", False)
        state["steps"] += 1
        gradient, ewc = parameter.grad, group["ewc"]
        if ewc is not None and gradient is not None:
            gradient = ewc.take_in(gradient, parameter, state)
        if "accumulator" in state:
            if gradient is not None:
                state["accumulator"].add_(gradient)
                state["filled"] = True
            gradient = state["accumulator"] if state["filled"] else None
        if gradient is not None and _due(state["steps"], group):
            self._move(parameter, gradient, state, group)
        if ewc is not None:
            ewc.consolidate(parameter, state)

    def _move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["updates"] += 1
        slower = enclosing(group, self._groups)
        if id(parameter) not in self._given and isinstance(self.whole, Unsharded):
            _refuse_shards(group)
            _refuse_shards(slower or group)
        if slower is not None:
            remember(parameter, gradient, state)
        rule = rule_of(group, parameter, self.whole)
        change = rule(parameter, gradient, state, group, self.whole)
        parameter.add_(change)
        if slower is not None and _due(state["steps"], slower):
            change = change + reset(parameter, state, slower, self.whole)
        if "accumulator" in state:
            state["accumulator"].zero_()
            state["filled"] = False
        name = group["name"]
        self.updates[name] = max(self.updates.get(name, 0), state["updates"])
        self.moved[name] = self.moved.get(name, 0.0) + change.float().square().sum()


def due(steps: int, period: int, unit: str = "steps", tokens_per_step: int | None = None) -> bool:
    """Whether a level moves at the end of optimizer step `steps` (counted from 1)."""
    if unit == "steps":
        return steps % period == 0
    assert tokens_per_step is not None
    return steps * tokens_per_step // period > (steps - 1) * tokens_per_step // period


def _due(steps: int, group: dict[str, Any]) -> bool:
    return due(steps, group["period"], group["unit"], group["tokens_per_step"])


def tokens_per_move(group: dict[str, Any], tokens_per_step: int) -> int:
    """Tokens from one move of a level to the next (on average, if steps do not meet its period exactly)."""
    period: int = group["period"]
    return period * tokens_per_step if group["unit"] == "steps" else max(period, tokens_per_step)


def _every_step(group: dict[str, Any]) -> bool:
    return group["period"] <= (1 if group["unit"] == "steps" else group["tokens_per_step"])


def _check(group: dict[str, Any]) -> None:
    level = f"level {group['name']!r}"
    if type(group["period"]) is not int or group["period"] < 1:
        raise ValueError(f"period of {level}: got {group['period']!r}, needs an integer of at least 1")
    if group["unit"] not in UNITS:
        raise ValueError(f"unit of {level}: got {group['unit']!r}, needs one of {', '.join(UNITS)}")
    if group["unit"] == "tokens" and not (group["tokens_per_step"] or 0) >= 1:
        raise ValueError(f"tokens_per_step of {level}: got {group['tokens_per_step']!r}, needs the tokens of one step")
    if group["optimizer"] not in COMPONENTS:
        raise ValueError(f"optimizer of {level}: got {group['optimizer']!r}, needs one of {', '.join(COMPONENTS)}")


def _refuse_shards(group: dict[str, Any]) -> None:
    if COMPONENTS[group["optimizer"]].sees_whole:
        raise RuntimeError(
            f"{group['optimizer']} of level {group['name']!r}: got a tensor that is none of the parameters it was made "
            "with, such as a flat shard of ZeRO, and needs whole matrices: call "
            "nestling.training.engine.see_whole_matrices(engine, bucket) after deepspeed.initialize"
        )

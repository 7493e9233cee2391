"""A training as the nested system that it is (arXiv:2512.24695, Section 3): every component, from fastest to slowest.

The model and its optimizer are built as a run builds them, but of tensors without memory, and every level is moved
once: what then lies in the optimizer's state is what a run keeps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nestling.config import JobConfig
from nestling.models import build
from nestling.models.component import GRADIENTS, TOKENS, Component
from nestling.models.continuum import Continuum, with_moving_levels
from nestling.models.skeleton import LanguageModel
from nestling.optim import Levels, watch_inputs
from nestling.optim.components import rule_name
from nestling.optim.kept import ACCUMULATOR, START_GRADIENT, Kept, described, kept
from nestling.optim.levels import tokens_per_move
from nestling.optim.nested import enclosing
from nestling.training.groups import parameter_groups


@dataclass(frozen=True)
class Row:
    """A component, its level (1 is the fastest) and how often it is updated in an optimizer step.

    `per` says whose tokens it counts: those of a "sequence" for what lives in one (every sequence of a step has its
    own), those of the whole "batch" for what is trained.
    """

    level: int
    component: Component
    updates_per_step: float
    per: str


def nested_view(config: JobConfig) -> list[Row]:
    """Every component of a job whose `model.vocab_size` is known, from the fastest to the slowest.

    Components of one frequency are one level (Definition 2), except that what remembers gradients comes before the
    weights that move by it: their state at a step needs its state at that step.
    """
    tokens, length = config.training.batch_tokens, config.data.sequence_length
    with torch.device("meta"):
        model = build(config.model)
        watch_inputs(model)
        optimizer = Levels(parameter_groups(model, config), lr=config.training.learning_rate)
        reader, shown = with_moving_levels(model, config.continuum), _shown(config)
        parts = [(part, length, "sequence") for part in _in_context(reader, config, shown)]
        parts += [(part, tokens, "batch") for part in _trained(reader, optimizer, tokens, shown)]
    parts.sort(key=lambda entry: (*_speed(entry[0]), -entry[0].parameters))
    speeds = sorted({_speed(part) for part, _, _ in parts})
    return [Row(speeds.index(_speed(part)) + 1, part, part.updates_per_token * unit, per) for part, unit, per in parts]


def _shown(config: JobConfig) -> dict[str, str]:
    """What the levels of a job are called here, where "level" is a place in the order of frequencies."""
    kinds = {level.name: "group" if level.parameters else "CMS" for level in config.levels}
    return {"base": "rest"} | {str(name): f"{kind} {name}" for name, kind in kinds.items()}


def _in_context(reader: LanguageModel | Continuum, config: JobConfig, shown: dict[str, str]) -> list[Component]:
    """What learns while the model reads a sequence."""
    length = config.data.sequence_length
    if not isinstance(reader, Continuum):
        return reader.components(length)
    names = [str(level.name) for level in config.levels if level.width is not None or level.layers]
    return reader.components(length, [f"{shown[name]} in context" for name in names])


def _speed(part: Component) -> tuple[float, bool]:
    return -part.updates_per_token, part.context == TOKENS


@dataclass
class _Trained:
    """Weights that share level, role and rule, and the operations of reading and of moving them once."""

    group: dict[str, Any]
    count: int = 0
    reading: float = 0.0
    moving: float = 0.0


def _trained(
    model: LanguageModel | Continuum, optimizer: Levels, tokens: int, shown: dict[str, str]
) -> Iterator[Component]:
    """Weights by level, role and rule, and what each level's rules keep of gradients; levels are named as `shown`."""
    weights: dict[tuple[str, str, str], _Trained] = {}
    memories: dict[tuple[str, str, str], tuple[dict[str, Any], list[Tensor]]] = {}
    starts: dict[tuple[str, str, str], float] = defaultdict(float)
    roles = {parameter: model.role(name) for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rule, products, of_start = _move(optimizer, group, parameter, tokens)
            level, role = group["name"], roles[parameter]
            part = weights.setdefault((level, role, rule), _Trained(group))
            part.count += parameter.numel()
            part.reading += _reading(parameter, role, model.config.tie_head)
            part.moving += products + described(rule).operations * parameter.numel()
            slower = enclosing(group, optimizer.param_groups)
            for name, value in optimizer.state[parameter].items():
                if torch.is_tensor(value):
                    owner, by = group, rule
                    if slower is not None and name.startswith("start") and name != "start_gradient":
                        owner, by = slower, rule_name(slower, parameter, optimizer.whole)
                    memories.setdefault((level, by, name), (owner, []))[1].append(value)
                    if name == "start":
                        starts[level, by, name] += of_start + described(by).operations * value.numel()
            optimizer.state.clear()
    for (level, role, rule), part in weights.items():
        every = tokens_per_move(part.group, tokens)
        yield Component(
            name=f"{shown[level]}: {role}" + _by(rule, part.group),
            context=TOKENS,
            objective=f"next-token loss of {every:,} tokens (Eq. 71)",
            rule=described(rule).rule,
            updates_per_token=1 / every,
            parameters=part.count,
            flops_per_token=part.reading + part.moving / every,
        )
    for (level, rule, name), (owner, tensors) in memories.items():
        memory, context, every = _remembered(name, rule, owner, tokens)
        yield Component(
            name=f"{shown[level]}: {name}" + _by(rule, owner),
            context=context,
            objective=memory.objective,
            rule=memory.rule,
            updates_per_token=1 / every,
            state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            flops_per_token=starts.get((level, rule, name), 0.0) / every,
        )


def _by(rule: str, group: dict[str, Any]) -> str:
    return "" if rule == group["optimizer"] else f" ({rule})"


def _remembered(name: str, rule: str, owner: dict[str, Any], tokens: int) -> tuple[Kept, str, int]:
    """What a state tensor is, what it compresses, and the tokens from one of its changes to the next.

    `owner` is the group whose moves it follows: of a nested level's start that of the slower level.
    """
    every = tokens_per_move(owner, tokens)
    if name == "accumulator":
        return ACCUMULATOR, GRADIENTS, tokens
    if name == "start_gradient":
        return START_GRADIENT, GRADIENTS, every
    if name == "start":
        what = f"next-token loss of {every:,} tokens, by what the level is reset to (Eq. 72)"
        return Kept(what, described(rule).rule), TOKENS, every
    memory = kept(rule, name.removeprefix("start_"))
    return memory, GRADIENTS, every * (owner[memory.every] if memory.every else 1)


@torch.no_grad()
def _move(optimizer: Levels, group: dict[str, Any], parameter: Tensor, tokens: int) -> tuple[str, float, float]:
    """The rule that moves a parameter, and the operations of its matrix products a move, and of a nested level's start.

    The parameter's state is made by this.
    """
    state = optimizer.state[parameter]
    parameter.grad = torch.empty_like(parameter)

    def products(moves: int, due: dict[str, Any]) -> int:
        """Of the level's next move, after so many; the level `due` (this one, or the one that resets it) is due too."""
        state.update(steps=-(-tokens_per_move(due, tokens) // tokens) - 1, updates=moves)
        with FlopCounterMode(display=False) as counter:
            optimizer.take_in(parameter, group)
        return int(counter.get_total_flops())

    slower = enclosing(group, optimizer.param_groups)
    both = products(0, slower) if slower is not None else 0
    often, rule = products(0, group), rule_name(group, parameter, optimizer.whole)
    rare = [group[memory.every] for memory in described(rule).keeps.values() if memory.every]
    seldom = (products(rare[0], group) - often) / rare[0] if rare else 0.0
    parameter.grad = None
    return rule, often + seldom, max(both - often, 0)


def _reading(parameter: Tensor, role: str, tied: bool) -> float:
    """Operations a token of reading a weight: a table is looked up, and a memory's first state is read in context."""
    if role.startswith("initial ") or (role == "embedding" and not tied):
        return 0.0
    return (2.0 if parameter.dim() >= 2 else 1.0) * parameter.numel()

"""The fast state of a model as named leaves, and a model that goes on from the state of an earlier text.

A state is what `forward(tokens, state)` gives back: tuples, mappings and dataclasses of tensors (B, ...) and numbers,
of a form that is each mixer's own. Whoever cuts it up into rows, keeps it or saves it needs no more than its leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nestling.models.skeleton import LanguageModel


def mapped(function: Callable[[str, Any], Any], state: Any, name: str = "") -> Any:
    """A state of the same form with `function(name, leaf)` in the place of each leaf (a tensor, a number or None).

    The name of a leaf says where it stands: "0.memory.weights.key.1".
    """

    def part(key: Any, value: Any) -> Any:
        return mapped(function, value, f"{name}.{key}" if name else str(key))

    if isinstance(state, Mapping):
        return {key: part(key, value) for key, value in state.items()}
    if (names := getattr(state, "_fields", None)) is not None:  # a named tuple
        return type(state)(*map(part, names, state))
    if isinstance(state, tuple | list):
        return type(state)(part(place, value) for place, value in enumerate(state))
    if is_dataclass(state) and not isinstance(state, type):
        return replace(state, **{each.name: part(each.name, getattr(state, each.name)) for each in fields(state)})
    return function(name, state)


def leaves(state: Any) -> dict[str, Any]:
    """The leaves of a state by their names."""
    found: dict[str, Any] = {}
    mapped(found.__setitem__, state)
    return found


def detached(state: Any) -> Any:
    """The same numbers cut off from the graph that made them."""
    return mapped(lambda _, leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)


def beyond(state: Any, initial: Any) -> Any:
    """What a state differs by from the initial one of as many rows: what was learnt in it.

    That is what is carried on: training moves the weights that memories begin with, and what they have learnt is put on
    top of the present ones. So the gradient reaches those weights though the difference is cut off from its graph.
    """
    begun = leaves(initial)
    return mapped(lambda name, leaf: leaf - begun[name] if isinstance(begun.get(name), Tensor) else leaf, state)


def on_top(initial: Any, carried: Any) -> Any:
    """The state that differs from `initial` by what is `carried`: of its first rows; the others are as they were."""
    begun = leaves(initial)
    rows = len(next(leaf for leaf in begun.values() if isinstance(leaf, Tensor)))

    def together(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        rest = leaf.new_zeros(rows - len(leaf), *leaf.shape[1:])
        return torch.cat([leaf, rest]) + begun.get(name, 0)

    return mapped(together, carried)


def filled(form: Any, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> Any:
    """A state of the form of another one, with leaves from elsewhere; tensors may be flat."""

    def leaf(name: str, old: Any) -> Any:
        return tensors[name].view(old.shape).to(old.device) if isinstance(old, Tensor) else numbers[name]

    return mapped(leaf, form)


class Continuing(nn.Module):
    """A model whose first rows go on from where other texts have left its state; the rows behind them begin anew."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters by the model's own names."""
        return self.model.named_parameters(*args, **kwargs)

    def forward(self, tokens: Tensor, carried: Any = None) -> tuple[Tensor, Any]:
        """Logits (B, T, V) for tokens (B, T), and what to carry of the state after them.

        Args:
            carried: of n <= B rows; None: of none.
        """
        initial = self.model.initial_state(len(tokens))
        logits, after = self.model(tokens, initial if carried is None else on_top(initial, carried))
        return logits, beyond(after, initial)


class Primed(nn.Module):
    """A model under the same contract, `(logits, state) = primed(tokens, state)`, to which no text is the first: each
    begins where an earlier one has left the state.

    Args:
        carried: what is `beyond` the initial state after that text, of one row.
    """

    def __init__(self, model: LanguageModel, carried: Any) -> None:
        super().__init__()
        self.model, self._carried = model, carried

    def initial_state(self, batch: int) -> Any:
        """The state before the first token, for `batch` rows."""
        rows = mapped(
            lambda _, leaf: leaf.expand(batch, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf, self._carried
        )
        return on_top(self.model.initial_state(batch), rows)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits (B, T, V) for tokens (B, T), and the state after them."""
        return self.model(tokens, self.initial_state(len(tokens)) if state is None else state)

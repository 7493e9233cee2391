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


class Continuing(nn.Module):
    """A model whose first rows go on from where other texts have left its state; the rows behind them begin anew.

    A state is carried as its difference from the initial one, which training moves: what a memory has learnt is put on
    top of the weights that it begins with now. So the gradient reaches those weights though the difference is cut off
    from the graph that made it. Without that they would never be trained.
    """

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
        state = self.model.initial_state(len(tokens))
        initial = {name: leaf for name, leaf in leaves(state).items() if isinstance(leaf, Tensor)}

        def on_top(name: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            rest = leaf.new_zeros(len(tokens) - len(leaf), *leaf.shape[1:])
            return torch.cat([leaf, rest]) + initial.get(name, 0)

        if carried is not None:
            state = mapped(on_top, carried)
        logits, after = self.model(tokens, state)
        return logits, mapped(lambda name, leaf: leaf - initial[name] if name in initial else leaf, after)

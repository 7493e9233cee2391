"""The fast state of a stream's rows from batch to batch: memories go on where the row before ended.

Row r of a window's batches is one contiguous stretch of its text (see `nestling.data.streams.content.batches`). Each
rank keeps the state of its own rows, and a snapshot holds all ranks' rows as one tensor a leaf, so that any number of
workers goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestling.models.fast_state import filled, leaves, mapped


class Lanes:
    """The state of the first rows of this rank's batches; rows behind them are replayed ones, which begin anew.

    Args:
        rows: sequences of a batch on this rank that go on.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        #: After the last batch that was learnt; None: before the first.
        self._state: Any = None
        self._after: list[Any] = []
        self._read = 0

    def begin(self) -> None:
        """A batch comes; what came of the one before is dropped unless it was kept."""
        self._after, self._read = [], 0

    def read(self, engine: Any, inputs: Tensor) -> Tensor:
        """Logits of the batch's next rows, a micro-batch."""
        first, self._read = self._read, self._read + len(inputs)
        mine = slice(min(first, self._rows), min(self._read, self._rows))
        logits, after = engine(inputs, None if self._state is None else _rows(self._state, mine))
        self._after.append(_rows(after, slice(0, mine.stop - mine.start)))
        return logits

    def keep(self) -> None:
        """Take what the batch has left for the state."""
        first, *others = (leaves(part) for part in self._after)
        joined = {name: [leaf, *(other[name] for other in others)] for name, leaf in first.items()}
        self._state = mapped(
            lambda name, leaf: torch.cat(joined[name]) if isinstance(leaf, Tensor) else leaf, self._after[0]
        )

    def mend(self, readable: Tensor) -> int:
        """Let rows begin anew whose state is not finite, or has made their text unreadable; returns how many.

        Args:
            readable: (rows,) whether the losses of the last batch are finite.
        """
        if self._state is None:
            return 0
        good = readable
        for leaf in leaves(self._state).values():
            if isinstance(leaf, Tensor):
                good = good & leaf.reshape(len(leaf), -1).isfinite().all(1)
        bad = (~good).nonzero().flatten()
        if len(bad):  # what is carried is what a state differs by from the initial one
            self._state = mapped(
                lambda _, leaf: leaf.index_fill(0, bad, 0) if isinstance(leaf, Tensor) else leaf, self._state
            )
        return len(bad)

    def tensors(self) -> dict[str, Tensor]:
        """This rank's rows of every tensor, flat; the ranks' stretches follow one another."""
        return {name: leaf.flatten() for name, leaf in leaves(self._state).items() if isinstance(leaf, Tensor)}

    def numbers(self) -> dict[str, int]:
        """What else the state says, equal on all ranks."""
        return {name: leaf for name, leaf in leaves(self._state).items() if isinstance(leaf, int)}

    @torch.no_grad()
    def load(self, model: nn.Module, rank: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Take up what all ranks' `tensors`, joined, and `numbers` gave; nothing: the rows begin anew."""
        self._state = None
        if not tensors:
            return
        device = next(model.parameters()).device
        # The form of a state is what the model makes of a token.
        _, form = model(torch.zeros(self._rows, 1, dtype=torch.int64, device=device))
        sizes = {name: leaf.numel() for name, leaf in leaves(form).items() if isinstance(leaf, Tensor)}
        mine = {name: tensors[name][rank * size : (rank + 1) * size] for name, size in sizes.items()}
        self._state = filled(form, mine, numbers)


def _rows(state: Any, rows: slice) -> Any:
    """Some rows of a state, cut off from the graph that made it."""
    return mapped(lambda _, leaf: leaf[rows].detach() if isinstance(leaf, Tensor) else leaf, state)

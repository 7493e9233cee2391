"""Which parameters are matrices, and how a rule gets to see a matrix whole.

Some rules are functions of a whole matrix (orthogonalisation, the erasing of a delta rule), not of its elements. They
ask a `Whole` for it, so that the same rule runs on parameters as they are and on shards of them (`sharded.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

#: Maps matrices (..., rows, columns), one argument a tensor, to matrices of the same shape, each for itself.
MatrixFunction = Callable[..., Tensor]

#: Parts of a parameter's name that say that its rows or columns are table entries or filters, not a linear map.
TABLES = ("embedding", "head", "conv")


class Whole(Protocol):
    """Gives rules whole matrices."""

    def __call__(self, parameter: Tensor, function: MatrixFunction, *tensors: Tensor) -> Tensor:
        """`function` of whole matrices; all ranks call it for the same parameters in the same order.

        Args:
            parameter: what the optimizer moves: a parameter, or a flat shard of several.
            function: see `MatrixFunction`; a vector comes as a matrix of one row.
            tensors: of the shape of `parameter`, such as its momentum.

        Returns:
            A new tensor of the shape of `parameter`.
        """

    def is_matrix(self, parameter: Tensor) -> bool:
        """Whether `parameter` holds matrices. Raises ValueError if it holds matrices and vectors."""


class Unsharded:
    """A `Whole` for parameters that are whole."""

    def __call__(self, parameter: Tensor, function: MatrixFunction, *tensors: Tensor) -> Tensor:
        return function(*(t if t.dim() >= 2 else t.reshape(1, -1) for t in tensors)).view_as(parameter)

    def is_matrix(self, parameter: Tensor) -> bool:
        return parameter.dim() >= 2


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a model's parameter is a matrix, or a stack (..., rows, columns) of them, that maps vectors to vectors.

    Embeddings, heads and convolution filters are none, by the parts of their name (see `TABLES`).
    """
    return parameter.dim() >= 2 and not any(part.startswith(TABLES) for part in name.split("."))


def matrix_groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Parameter groups of a model for an optimizer of matrices: its matrices, and the rest with `matrix=False`.

    `settings` go into both groups; change one of them afterwards for a learning rate of its own, for example.
    """
    sides: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        sides[is_matrix(name, parameter)].append(parameter)
    return [{"params": params, "matrix": matrix, **settings} for matrix, params in sides.items() if params]

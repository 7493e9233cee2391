"""The state of a self-modifying Titans layer: its small memories, their frozen snapshots and how far they have read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from nestling.memory.checks import check_float, check_same, check_shape, state_dtype

#: The memories that every layer has. The first four make the projections.
MEMORIES = ("key", "value", "eta", "alpha", "memory")
#: Every memory that a layer may have, in the order in which they are stacked.
ALL_MEMORIES = ("key", "value", "eta", "alpha", "query", "memory")
#: Memories that read x.
PROJECTIONS = ALL_MEMORIES[:4]
#: Memories with one output a head and no skip connection.
SCALAR_MEMORIES = ("eta", "alpha")

#: A memory's layers: w1 (B, H, out, N) and w2 (B, H, N, D), or the one layer w (B, H, out, D) of a matrix memory.
Layers = tuple[Tensor, ...]
Weights = Mapping[str, Layers]


@dataclass(frozen=True, eq=False)
class MemoryState:
    """What a stream carries from call to call of `self_modifying_scan`.

    Attributes:
        weights: the current weights, `{name: (w1, w2)}` for the five names of `MEMORIES` and, where a memory makes the
            queries, "query"; w1 (B, H, out, N), w2 (B, H, N, D), `out` is 1 for eta and alpha, D for the others.
            Matrix memories M(z) = w z are `{name: (w,)}`, w (B, H, out, D). All memories are of one kind.
        snapshots: the weights at each memory's last chunk boundary, same form.
        base: the weights before the first token, same form (`decay_to="initial"` decays towards them).
        position: tokens consumed so far.
        momentum: what the gradients of the written layers have gathered, `{name: (S1, S2)}` or `(S1,)`, of the shapes
            of those layers; a missing memory or layer stands for zero.
    """

    weights: Weights
    snapshots: Weights
    base: Weights
    position: int = 0
    momentum: Weights = field(default_factory=dict)

    @classmethod
    def initial(cls, weights: Weights) -> MemoryState:
        """A fresh state that starts from `weights` (form as above), position 0.

        Raises:
            ValueError: a memory is missing or unknown, or a shape, dtype or device does not fit the others.
        """
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights: got {type(weights).__name__}, needs a mapping of {', '.join(MEMORIES)}")
        weights = dict(weights)
        check_weights("weights", weights)
        return cls(weights, weights, weights, 0)

    def detach(self) -> MemoryState:
        """The same numbers cut off from the graph that made them (truncated backpropagation through time)."""
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """The same state with `function` applied to every tensor."""
        weights, snapshots, base, momentum = (
            {name: tuple(function(layer) for layer in layers) for name, layers in part.items()}
            for part in (self.weights, self.snapshots, self.base, self.momentum)
        )
        return MemoryState(weights, snapshots, base, self.position, momentum)

    @property
    def matrices(self) -> bool:
        """Whether the memories are matrices, M(z) = w z, and not two-layer networks."""
        return len(self.weights["key"]) == 1


def apply_memory(name: str, layers: Layers, z: Tensor) -> Tensor:
    """M(z) for all tokens at once: z (B, H, T, D) to (B, H, T, out) (Eq. 89; w z for a matrix memory)."""
    if len(layers) == 1:
        return z @ layers[0].mT
    w1, w2 = layers
    inner = F.silu(z @ w2.mT) @ w1.mT
    return inner if name in SCALAR_MEMORIES else z + inner


def check_weights(where: str, weights: Weights, like: Weights | None = None) -> None:
    """Raise ValueError unless `weights` holds memories of one kind that fit each other, and `like` if given."""
    if set(weights) - {"query"} != set(MEMORIES) or (like is not None and set(weights) != set(like)):
        needed = f"{list(MEMORIES)}, and 'query' if a memory makes the queries" if like is None else f"{list(like)}"
        raise ValueError(f"{where}: got the names {list(weights)}, needs {needed}")
    for name, layers in weights.items():
        if not isinstance(layers, tuple | list) or not all(isinstance(w, Tensor) for w in layers):
            raise ValueError(f"{where}[{name!r}]: got {type(layers).__name__}, needs a tuple of tensors")
        depth = len((weights if like is None else like)["key"])
        if len(layers) != depth or depth not in (1, 2):
            raise ValueError(
                f"{where}[{name!r}]: got {len(layers)} layers beside {depth} of 'key', "
                "needs a pair (w1, w2) everywhere, or (w,) everywhere for matrix memories"
            )
    first = weights["key"][-1]
    where_first = f"{where}['key'][{len(weights['key']) - 1}]"
    wanted = first if like is None else like["key"][-1]
    shape = tuple(wanted.shape) if wanted.dim() == 4 else (-1,) * 4
    check_shape(where_first, first, shape, "(B, H, N, D)")
    check_float(where_first, first)
    for name, layers in weights.items():
        _check_layers(f"{where}[{name!r}]", name, layers, first, where_first)


def _check_layers(where: str, name: str, layers: Layers, first: Tensor, where_first: str) -> None:
    """The layers of one memory beside the input layer `first` of the key memory."""
    batch, heads, hidden, width = first.shape
    out = 1 if name in SCALAR_MEMORIES else width
    if len(layers) == 1:
        check_shape(f"{where}[0]", layers[0], (batch, heads, out, width), "(B, H, out, D)")
    else:
        check_shape(f"{where}[0]", layers[0], (batch, heads, out, hidden), "(B, H, out, N)")
        check_shape(f"{where}[1]", layers[1], (batch, heads, hidden, width), "(B, H, N, D)")
    for layer in layers:
        check_same(where, layer, first, where_first, dtypes=(first.dtype,))


def check_momentum(where: str, momentum: Weights, weights: Weights) -> None:
    """Raise ValueError unless `momentum` holds tensors for layers of `weights`, of their shapes, first layers first."""
    for name, layers in momentum.items():
        if name not in weights or len(layers) > len(weights[name]):
            known = {name: len(layers) for name, layers in weights.items()}
            raise ValueError(f"{where}[{name!r}]: got {len(layers)} layers, needs at most as many as weights: {known}")
        for i, (layer, like) in enumerate(zip(layers, weights[name], strict=False)):
            check_shape(f"{where}[{name!r}][{i}]", layer, tuple(like.shape), "the layer's")
            check_same(
                f"{where}[{name!r}][{i}]", layer, like, "the layer", dtypes=(like.dtype, state_dtype(like.dtype))
            )

"""The state of a self-modifying Titans layer: five small MLPs, their frozen snapshots and how far they have read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nestling.memory.checks import check_float, check_same, check_shape, state_dtype

#: The memories of a layer, in the order in which they are stacked. The first four make the projections.
MEMORIES = ("key", "value", "eta", "alpha", "memory")
#: Memories with one output a head and no skip connection.
SCALAR_MEMORIES = ("eta", "alpha")

#: A memory's two layers: w1 (B, H, out, N) and w2 (B, H, N, D).
Layers = tuple[Tensor, Tensor]
Weights = Mapping[str, Layers]


@dataclass(frozen=True, eq=False)
class MemoryState:
    """What a stream carries from call to call of `self_modifying_scan`.

    Attributes:
        weights: the current weights, `{name: (w1, w2)}` for the five names of `MEMORIES`; w1 (B, H, out, N),
            w2 (B, H, N, D), `out` is D for key, value and memory, 1 for eta and alpha.
        snapshots: the weights at each memory's last chunk boundary, same form.
        base: the weights before the first token, same form (`decay_to="initial"` decays towards them).
        position: tokens consumed so far.
    """

    weights: Weights
    snapshots: Weights
    base: Weights
    position: int = 0

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
        weights, snapshots, base = (
            {name: (w1.detach(), w2.detach()) for name, (w1, w2) in part.items()}
            for part in (self.weights, self.snapshots, self.base)
        )
        return MemoryState(weights, snapshots, base, self.position)


def check_weights(where: str, weights: Weights, shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError unless `weights` holds five memories that fit each other, and `shape` (B, H, N, D) if given."""
    if set(weights) != set(MEMORIES):
        raise ValueError(f"{where}: got the names {list(weights)}, needs {list(MEMORIES)}")
    for name in MEMORIES:
        layers = weights[name]
        if not isinstance(layers, tuple | list) or len(layers) != 2 or not all(isinstance(w, Tensor) for w in layers):
            raise ValueError(f"{where}[{name!r}]: got {type(layers).__name__}, needs a pair of tensors (w1, w2)")
    key_w2 = weights["key"][1]
    like = f"{where}['key'][1]"
    if shape is None:
        shape = tuple(key_w2.shape) if key_w2.dim() == 4 else (-1,) * 4
    check_shape(like, key_w2, shape, "(B, H, N, D)")
    check_float(like, key_w2)
    batch, heads, hidden, width = shape
    for name in MEMORIES:
        w1, w2 = weights[name]
        out = 1 if name in SCALAR_MEMORIES else width
        check_shape(f"{where}[{name!r}][0]", w1, (batch, heads, out, hidden), "(B, H, out, N)")
        check_shape(f"{where}[{name!r}][1]", w2, (batch, heads, hidden, width), "(B, H, N, D)")
        for part in (w1, w2):
            check_same(f"{where}[{name!r}]", part, key_w2, like, dtypes=(key_w2.dtype,))


def to_state_dtype(weights: Weights) -> dict[str, Layers]:
    """`weights` in float32 or wider."""
    dtype = state_dtype(weights["key"][1].dtype)
    return {name: (w1.to(dtype), w2.to(dtype)) for name, (w1, w2) in weights.items()}

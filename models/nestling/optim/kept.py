"""What each update rule is and what it keeps of the gradients, in the words of Nested Learning.

An optimizer's state is a memory like any other: it compresses gradients, by an objective and a rule (arXiv:2512.24695,
Section 4 and Appendix B). The names are those of the tensors that the rules of `COMPONENTS` make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kept:
    """One kind of state: what it minimises, how it moves, and the setting that says how many moves of its level it
    takes to change (None: it changes at each)."""

    objective: str
    rule: str
    every: str | None = None


@dataclass(frozen=True)
class Described:
    """An update rule, the operations of a move per weight (matrix products aside), and what the rule keeps."""

    rule: str
    operations: int
    keeps: Mapping[str, Kept] = field(default_factory=dict)


_SQUARE = Kept("‖m ⊙ g − √Σg²‖² over the gradients", "decaying sum of g² (Eq. 100-105)")

_DESCRIBED: dict[str, Described] = {
    "adamw": Described(
        "AdamW (Eq. 100-105)",
        14,
        {"exp_avg": Kept("−⟨m, g⟩ + decay", "decaying mean of g (Eq. 33)"), "exp_avg_sq": _SQUARE},
    ),
    "sgd": Described(
        "gradient descent (Eq. 8, 31)", 6, {"momentum": Kept("−⟨m, g⟩ + decay", "decaying sum of g (Eq. 33-34)")}
    ),
    "m3": Described(
        "M3: orthogonalised momenta of two speeds (Alg. 1, Eq. 75)",
        16,
        {
            "fast": Kept("−⟨m, g⟩ + decay", "mean of g, decaying (as printed: a sum without decay) (Eq. 75)"),
            "second": Kept(_SQUARE.objective, "sum of g², decaying, or (adamuon) of what is orthogonalised (Alg. 1)"),
            "block": Kept("−⟨m, g⟩ over a block", "sum of the block's g (Eq. 75)"),
            "slow": Kept("−⟨m, g⟩ over all blocks + decay", "takes in a block of g at once (Eq. 75)", "slow_period"),
            "direction": Kept("‖OᵀO − I‖² near m", "Newton-Schulz of the slow momentum (Eq. 43-44)", "slow_period"),
        },
    ),
    "muon": Described(
        "Muon: orthogonalised momentum (Eq. 42, 52)",
        8,
        {"momentum": Kept("−⟨m, g⟩ + decay", "decaying mean of g (Eq. 33)")},
    ),
    "delta_momentum": Described(
        "delta momentum (Eq. 48-49)",
        8,
        {"momentum": Kept("½‖m gᵀ + P‖²", "Delta rule: m (αI − η′ gᵀg) − η g (Eq. 49)")},
    ),
    "deep_momentum": Described(
        "deep momentum: W += m(g), m an MLP (Eq. 50)",
        60,
        {
            "out": Kept("⟨m(u), u⟩, u the scaled gradient", "gradient descent with decay (Eq. 50)"),
            "turn": Kept("⟨m(u), u⟩, u the scaled gradient", "gradient descent with decay (Eq. 50)"),
            "exp_avg_sq": _SQUARE,
        },
    ),
    "delta_gradient_descent": Described("Delta Gradient Descent over each layer's inputs (Eq. 56-57)", 6),
}

#: What a level keeps of the steps between two of its moves, whatever its rule.
ACCUMULATOR = Kept("−⟨a, g⟩ over a period", "sum of the steps' g (Eq. 71)")


def described(rule: str) -> Described:
    """The rule of this name."""
    return _DESCRIBED[rule]


#: What a nested level's start sums up of the level's gradients.
START_GRADIENT = Kept("−⟨a, g⟩ over the slower level's period", "sum of the moves' g (Eq. 72)")


def kept(rule: str, state: str) -> Kept:
    """What the state tensor called `state` is for, in a parameter that moves by `rule`."""
    keeps = _DESCRIBED[rule].keeps
    return keeps[state] if state in keeps else keeps[state.rstrip("0123456789")]

"""What Nested Learning says a model is made of: problems that are solved at frequencies of their own.

A `Component` is one of them (arXiv:2512.24695, Definitions 2-4): what it compresses, by which objective and rule, how
often. Mixers name the memories that learn while they read (`Mixer.components`) and the roles of their weights
(`Mixer.role`); update rules of `nestling.optim` name what they keep of the gradients. The numbers come from built
objects: periods and chunk sizes that are in force, tensors that are there.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What a component compresses.
TOKENS, GRADIENTS = "tokens", "gradients"


@dataclass(frozen=True)
class Component:
    """One problem of the nested system.

    Attributes:
        name: its role, unique where it is used.
        context: what it compresses: "tokens" or "gradients".
        objective: what it minimises.
        rule: how it moves, with the equation's number in arXiv:2512.24695 (or the paper it is from).
        updates_per_token: how often what others see of it changes, per token that it reads: of one sequence for what
            lives in a sequence, of the whole batch for what is trained.
        parameters: trained numbers that it holds; its state in context is none.
        state_bytes: what it carries besides them, for one sequence if it compresses tokens.
        flops_per_token: floating-point operations of reading it and of its own rule, a multiplication and an addition
            counted as two. A trained weight's has those of all that its rule keeps of the gradients; the backward pass,
            about twice the reading of weights, is not in it.
    """

    name: str
    context: str
    objective: str
    rule: str
    updates_per_token: float
    parameters: int = 0
    state_bytes: int = 0
    flops_per_token: float = 0.0


def momentum_of(memory: str, numbers: int, size: int) -> Component:
    """The momentum of a memory that learns in context: of so many numbers of `size` bytes in one sequence."""
    return Component(
        name=f"{memory}: momentum",
        context=GRADIENTS,
        objective="−⟨S, ∇⟩ + decay, ∇ of the memory's own objective",
        rule="decaying sum of the tokens' gradients (Eq. 33-34)",
        updates_per_token=1.0,
        state_bytes=numbers * size,
        flops_per_token=3.0 * numbers,
    )

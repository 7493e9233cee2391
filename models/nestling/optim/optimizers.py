"""The optimizers of Nested Learning by themselves: each is `Levels` of one rule, which has the update itself.

Parameter groups can give any setting a value of their own, `period` included. M3 and Muon are for matrices: give them
`model.named_parameters()` or `matrix_groups(model)`, which tell embeddings and heads from matrices. Bare tensors have
no names: of them, all but vectors are taken for matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nestling.optim.levels import Levels


class M3(Levels):
    """Multi-scale Momentum Muon (arXiv:2512.24695, Algorithm 1 and Eq. 75).

    W -= lr (O1 + slow_weight O2) / (sqrt(V) + eps) with O1 = NS(M1), the orthogonalised fast momentum, O2 = NS(M2), the
    orthogonalised slow momentum, and V, the second moment of the gradient, element by element. M2 takes in a block of
    `slow_period` gradients at the start of the next block; O2 is constant within a block, and zero in the first.
    Vectors, and groups with `matrix=False`, move by AdamW with beta1, beta2 and eps.

    In the modes "ema" and "literal" a step has the size of 1 / |gradient|, because O1 and O2 have no scale: learning
    rates are much smaller than AdamW's, and the groups that move by AdamW want one of their own.

    Args:
        params: `model.named_parameters()` or `matrix_groups(model)`; bare tensors have no names to tell embeddings by.
        lr: learning rate.
        betas: beta1 (fast momentum), beta2 (second moment) and beta3 (slow momentum).
        slow_weight: alpha, the weight of the slow direction.
        slow_period: f, gradients of a block.
        ns_steps: steps of the Newton-Schulz iteration, see `newton_schulz`.
        eps: added to the root of V.
        weight_decay: decoupled.
        mode: "ema": `M1 = b1 M1 + (1-b1) g`, `V = b2 V + (1-b2) g^2` with its bias corrected, and
            `M2 = b3 M2 + (1-b3) mean of the block`. "literal": Algorithm 1 as printed, `M1 += b1 g`, `V += b2 g^2`,
            `M2 += b3 sum of the block`, so that steps shrink as in AdaGrad. "adamuon": as "ema", but V is the second
            moment of O1 (AdaMuon), which makes steps the size of AdamW's.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float, float] = (0.95, 0.99, 0.9),
        slow_weight: float = 0.5,
        slow_period: int = 10,
        ns_steps: int = 5,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        mode: str = "ema",
    ) -> None:
        super().__init__(
            params,
            lr,
            name="M3",
            optimizer="m3",
            betas=betas,
            slow_weight=slow_weight,
            slow_period=slow_period,
            ns_steps=ns_steps,
            eps=eps,
            weight_decay=weight_decay,
            mode=mode,
        )


class Muon(Levels):
    """Muon (Jordan et al. 2024): W -= lr 0.2 sqrt(max(rows, columns)) NS(momentum), the baseline of M3.

    With that scale (Liu et al. 2025, arXiv:2502.16982) one learning rate does for the matrices and for AdamW, by which
    vectors and groups with `matrix=False` move.

    Args:
        params: as for `M3`.
        lr: learning rate.
        momentum: averaging factor of the gradient.
        nesterov: orthogonalise the momentum as it would be after one more such gradient.
        ns_steps: steps of the Newton-Schulz iteration, see `newton_schulz`.
        weight_decay: decoupled.
        betas, eps: of AdamW.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            params,
            lr,
            name="Muon",
            optimizer="muon",
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
        )


class DeltaMomentum(Levels):
    """Momentum that erases along the gradient before it writes it (arXiv:2512.24695, Eq. 48-49).

    W += m,  m = m (momentum I - lr' g^T g) - lr g,  lr' = lr / (1 + lr |g|_F^2). The printed coefficient 1 has no
    scale; this one is the proximal step's and keeps the erasing below 1. Every parameter moves by it, embeddings and
    heads too: a vector is a matrix of one row (its gradient is the key), a stack of matrices goes matrix by matrix.

    Args:
        params: parameters or groups.
        lr: learning rate, of gradient descent's scale.
        momentum: alpha, what is kept of the momentum.
        weight_decay: decoupled.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(
            params,
            lr,
            name="DeltaMomentum",
            optimizer="delta_momentum",
            momentum=momentum,
            weight_decay=weight_decay,
        )


class DeepMomentum(Levels):
    """Deep momentum (arXiv:2512.24695, Eq. 50): W += lr m(u), where m is a two-layer MLP that memorises gradients.

    Key and value of the memory are the gradient over the root of its second moment, u = g / (sqrt(V) + eps). m takes a
    step on the inner loss <m(u), u> (Eq. 50 has <m(u), 1>, which does not descend) and is read after it:
    `m <- beta1 m - (1 - beta1) grad <m(u), u>`. Our choice of m: an MLP for each coordinate, so that it is the same for
    every shape and on any shard, `m(u) = sum_j out_j sigmoid((slope_j + turn_j) u)`. out and turn are learned from
    zero; slope_j is fixed, spread from -1 to 1. Unit j is thus a momentum of the gradients of one sign and size; a lone
    unit (slope 0) with turn at 0 would be the usual momentum.

    Args:
        params: parameters or groups.
        lr: learning rate, of AdamW's scale.
        betas: beta1 (what the memory keeps) and beta2 (second moment).
        hidden: units of an MLP; the state is 2 hidden + 1 times the size of the parameters.
        eps: added to the root of V.
        weight_decay: decoupled.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        hidden: int = 2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            lr,
            name="DeepMomentum",
            optimizer="deep_momentum",
            betas=betas,
            hidden=hidden,
            eps=eps,
            weight_decay=weight_decay,
        )


class DeltaGradientDescent(Levels):
    """Delta Gradient Descent for linear layers (arXiv:2512.24695, Eq. 56-57), over all inputs x_n of a backward pass:
    W -= sum_n lr'_n (W x_n + delta_n) x_n^T,  lr'_n = lr / (1 + lr |x_n|^2), all at the same W.

    `watch_inputs(model)` must come first; it says how the terms are scaled when the loss is a mean. Parameters that are
    no linear layer's weight, and groups with `matrix=False`, move by plain gradient descent.

    Args:
        params: parameters or groups.
        lr: learning rate, of gradient descent's scale. lr'_n takes the one that holds during the backward pass.
        weight_decay: decoupled.

    Raises:
        ValueError: a setting out of range, or a matrix that `watch_inputs` has not seen.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(
            params,
            lr,
            name="DeltaGradientDescent",
            optimizer="delta_gradient_descent",
            weight_decay=weight_decay,
        )

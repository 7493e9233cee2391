"""The equations of the memory operations, token by token, to be read beside the paper (arXiv:2512.24695).

Slow and plain on purpose: every faster backend is tested against these two loops, gradients included.
Tensors of one token have shape (B, H, ...); `.mv` below applies a (B, H, m, n) matrix to (B, H, n) vectors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.rule import Rule, l2norm
from nestling.memory.state import SCALAR_MEMORIES, Layers, MemoryState

if TYPE_CHECKING:
    from nestling.memory.titans import TitansState


def mv(weights: Tensor, vector: Tensor) -> Tensor:
    return (weights @ vector.unsqueeze(-1)).squeeze(-1)


def delta_step(
    weights: Tensor, z: Tensor, delta: Tensor, alpha: Tensor, eta: Tensor, base: Tensor | float, erase: bool
) -> Tensor:
    """Delta Gradient Descent with retention gate (Eq. 57 and 88): alpha, eta (B, H); z (B, H, n); delta (B, H, m)."""
    written = delta + mv(weights, z) if erase else delta
    alpha, eta = alpha[..., None, None], eta[..., None, None]
    return base + alpha * (weights - base) - eta * written.unsqueeze(-1) * z.unsqueeze(-2)


def delta_scan(
    keys: Tensor,
    local_grads: Tensor,
    log_alpha: Tensor,
    eta: Tensor,
    queries: Tensor,
    initial: Tensor,
    base: Tensor | None,
    erase: bool,
    read: str,
) -> tuple[Tensor, Tensor]:
    weights, outputs = initial, [queries.new_empty(*local_grads.shape[:2], 0, local_grads.shape[-1])]
    for t in range(keys.shape[2]):
        before = weights
        weights = delta_step(
            before,
            keys[:, :, t],
            local_grads[:, :, t],
            log_alpha[:, :, t].exp(),
            eta[:, :, t],
            0.0 if base is None else base,
            erase,
        )
        source = {"before": before, "after": weights, "boundary": initial}[read]
        outputs.append(mv(source, queries[:, :, t]).unsqueeze(2))
    return torch.cat(outputs, dim=2), weights


def read_memory(name: str, layers: Layers, z: Tensor) -> Tensor:
    """M(z) = z + w1 silu(w2 z) (Eq. 89); without the skip where the output is one number. A matrix memory is w z."""
    if len(layers) == 1:
        return mv(layers[0], z)
    w1, w2 = layers
    inner = mv(w1, F.silu(mv(w2, z)))
    return inner if name in SCALAR_MEMORIES else z + inner


def layer_gradients(
    name: str, frozen: Layers, k: Tensor, v: Tensor, eta: Tensor, rule: Rule
) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """Key, local gradient at `frozen`, step and erase of each layer that is written, w1 first (Eq. 83-88, 92-93)."""
    target = read_memory(name, frozen, l2norm(v))
    error = read_memory(name, frozen, k) - target if rule.objective == "l2" else -target
    if len(frozen) == 1:
        return [(k, error, rule.step(eta, k), rule.erases_matrix)]
    w1, w2 = frozen
    pre = mv(w2, k)
    h = F.silu(pre)
    sigmoid = torch.sigmoid(pre)
    delta2 = mv(w1.mT, error) * sigmoid * (1 + pre * (1 - sigmoid))

    h_key = h if rule.step_size == "proximal" else l2norm(h)
    layers = [(h_key, error, rule.step(eta, h), rule.erases_w1), (k, delta2, rule.step(eta, k), rule.erases_w2)]
    return layers if rule.writes_w2 else layers[:1]


def self_modifying_scan(
    x: Tensor,
    queries: Tensor,
    state: MemoryState,
    rule: Rule,
    eta_max: Tensor,
    eta_bias: Tensor,
    alpha_bias: Tensor,
    mu: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    # A memory that is never written has no snapshot of its own.
    current, position = dict(state.weights), state.position
    frozen = current | {name: state.snapshots[name] for name in rule.adaptive}
    momentum = {name: layers for name, layers in state.momentum.items() if name in rule.adaptive and mu is not None}
    outputs = [x.new_empty(*x.shape[:2], 0, x.shape[-1])]
    for t in range(x.shape[2]):
        token, q = x[:, :, t], queries[:, :, t]
        k = l2norm(read_memory("key", frozen["key"], token))
        v = read_memory("value", frozen["value"], token)
        eta = eta_max * torch.sigmoid(read_memory("eta", frozen["eta"], token).squeeze(-1) + eta_bias)
        alpha = torch.sigmoid(read_memory("alpha", frozen["alpha"], token).squeeze(-1) + alpha_bias)
        if "query" in frozen:
            q = l2norm(read_memory("query", frozen["query"], q))

        before = current["memory"]
        for name in rule.adaptive:
            layers, gathered = list(current[name]), list(momentum.get(name, ()))
            gathered += [torch.zeros_like(layer) for layer in layers[len(gathered) :]]
            gradients = layer_gradients(name, frozen[name], k, v, eta, rule)
            for i, (z, delta, step, erase) in enumerate(gradients):
                base = state.base[name][i] if rule.decay_to == "initial" else 0.0
                if mu is None:
                    layers[i] = delta_step(layers[i], z, delta, alpha, step, base, erase)
                else:
                    args = (z, delta, alpha, step, mu, base, erase)
                    layers[i], gathered[i] = momentum_step(layers[i], gathered[i], *args)
            current[name] = tuple(layers)
            if mu is not None:
                momentum[name] = tuple(gathered[: len(gradients)])
        source = {"before": before, "after": current["memory"], "boundary": frozen["memory"]}[rule.read]
        outputs.append(read_memory("memory", source, q).unsqueeze(2))

        position += 1
        for name in rule.adaptive:
            if position % rule.chunk_of(name) == 0:
                frozen[name] = current[name]
    return torch.cat(outputs, dim=2), MemoryState(current, frozen, state.base, position, momentum)


def momentum_step(
    weights: Tensor,
    momentum: Tensor,
    z: Tensor,
    delta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    mu: Tensor,
    base: Tensor | float,
    erase: bool,
) -> tuple[Tensor, Tensor]:
    """`delta_step` with the gradient's momentum S in its place (Eq. 33-34): alpha, eta, mu (B, H); W_t and S_t."""
    alpha, eta, mu = (gate[..., None, None] for gate in (alpha, eta, mu))
    momentum = mu * momentum + delta.unsqueeze(-1) * z.unsqueeze(-2)
    erased = mv(weights, z).unsqueeze(-1) * z.unsqueeze(-2) if erase else 0.0
    return base + alpha * (weights - base) - eta * erased - eta * momentum, momentum


def titans_scan(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    log_mu: Tensor,
    state: TitansState,
    chunk_size: int,
    read: str,
    decay_to: str,
) -> tuple[Tensor, TitansState]:
    """Gradient descent with momentum and weight decay on 1/2 |M(k) - v|^2 (arXiv:2501.00663, Eq. 8-15)."""
    current, momentum, frozen, position = state.weights, state.momentum, state.snapshot, state.position
    bases = state.base if decay_to == "initial" else (0.0, 0.0)
    alpha, mu = log_alpha.exp(), log_mu.exp()
    outputs = [values.new_empty(*values.shape[:2], 0, values.shape[-1])]
    for t in range(keys.shape[2]):
        k, w1, w2 = keys[:, :, t], *frozen
        pre = mv(w2, k)
        h, sigmoid = F.silu(pre), torch.sigmoid(pre)
        delta1 = read_memory("memory", frozen, k) - values[:, :, t]
        delta2 = mv(w1.mT, delta1) * sigmoid * (1 + pre * (1 - sigmoid))

        before, rate = current, theta[:, :, t, None]
        gates = alpha[:, :, t], torch.ones_like(alpha[:, :, t]), mu[:, :, t]
        new1, s1 = momentum_step(before[0], momentum[0], h, rate * delta1, *gates, bases[0], erase=False)
        new2, s2 = momentum_step(before[1], momentum[1], k, rate * delta2, *gates, bases[1], erase=False)
        current, momentum = (new1, new2), (s1, s2)
        source = {"before": before, "after": current, "boundary": frozen}[read]
        outputs.append(read_memory("memory", source, queries[:, :, t]).unsqueeze(2))

        position += 1
        if position % chunk_size == 0:
            frozen = current
    after = replace(state, weights=current, momentum=momentum, snapshot=frozen, position=position)
    return torch.cat(outputs, dim=2), after

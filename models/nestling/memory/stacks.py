"""The memories of a layer that are written, packed so that a block of tokens takes a few matrix products.

All memories learn the same keys, so the layers that read the keys are one matrix: of two-layer memories the w2, N rows
each, of matrix memories everything. The w1 of two-layer memories have keys of their own and are a batch. The order is
that of `ALL_MEMORIES`: what reads x comes first, `memory`, which is read, last. Inside a block tokens are columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nestling.memory.layer import Gates, learn
from nestling.memory.momentum import MomentumGates, learn_with_momentum
from nestling.memory.rule import Rule, l2norm
from nestling.memory.state import SCALAR_MEMORIES, Layers, Weights

Pack = tuple[Tensor, ...]


class Packs(NamedTuple):
    """What a block starts from."""

    weights: Pack
    #: Snapshots.
    frozen: Pack
    #: Momenta of the written layers; empty without momentum.
    momenta: Pack
    #: What the gate decays towards; None is zero.
    bases: tuple[Tensor | None, ...]


class Stack:
    """What both kinds of memories share: which names are stacked, and where each part lies on axis 2."""

    #: Length on axis 2 of the last memory in each tensor of a pack.
    last: tuple[int, ...]

    def __init__(self, rule: Rule) -> None:
        self.rule, self.names = rule, rule.adaptive
        self.wide = [name for name in ("key", "value") if name in self.names]
        self.thin = [name for name in SCALAR_MEMORIES if name in self.names]
        self.query, self.reads = "query" in self.names, "memory" in self.names

    def refresh(self, frozen: Pack, weights: Pack, projections: bool, memory: bool) -> Pack:
        """The snapshots after a block: the weights, for those kinds of memories that are at a chunk boundary."""
        if not self.reads:
            memory = projections
        elif len(self.names) == 1:
            projections = memory
        if projections == memory:
            return weights if memory else frozen
        head, tail = (weights, frozen) if projections else (frozen, weights)
        pieces = zip(head, tail, self.last, strict=True)
        return tuple(torch.cat([a[:, :, :-size], b[:, :, -size:]], dim=2) for a, b, size in pieces)

    def _learn(
        self,
        weights: Tensor,
        momentum: Tensor | None,
        base: Tensor | None,
        keys: Tensor,
        deltas: Tensor,
        step: Tensor,
        queries: Tensor | None,
        gates: Gates | MomentumGates,
        erase: bool,
        reader: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer of all memories: its weights, momentum and what was read, by the closed form the gates are for."""
        if isinstance(gates, Gates):
            end, output = learn(weights, base, keys, deltas, step, queries, gates, erase, reader)
            return end, None, output
        assert momentum is not None
        layer = (weights, momentum, base, keys, deltas, step, queries)
        return learn_with_momentum(*layer, gates, erase, self.rule.read == "after", reader)


class MlpStack(Stack):
    """Two-layer memories: w1 (B, H, memories, D, N), zero rows in scalar memories; w2 (B, H, memories * N, D)."""

    def __init__(self, rule: Rule, weights: Weights) -> None:
        super().__init__(rule)
        self.hidden, self.width = weights["key"][1].shape[-2:]
        self.outs = [weights[name][0].shape[-2] for name in self.names]
        self.last = (1, self.hidden)

    def pack(self, weights: Weights) -> Pack:
        firsts, *seconds = zip(*(weights[name] for name in self.names), strict=True)
        w1 = torch.stack([F.pad(first, (0, 0, 0, self.width - first.shape[-2])) for first in firsts], dim=2)
        return w1, *(torch.cat(second, dim=-2) for second in seconds)

    def unpack(self, pack: Pack) -> dict[str, Layers]:
        w1, *others = pack
        seconds = [w2.chunk(len(self.names), dim=-2) for w2 in others]
        parts = zip(self.names, self.outs, w1.unbind(2), *seconds, strict=True)
        return {name: (first[..., :out, :], *second) for name, out, first, *second in parts}

    def project(self, frozen: Pack, x: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """What the frozen memories make of x and queries (B, H, D, C): unit columns, or raw gates (B, H, 1, C)."""
        frozen1, frozen2 = frozen
        sizes = len(self.wide), len(self.thin)
        count, made = sum(sizes), dict[str, Tensor]()
        if count:
            h = F.silu(frozen2[:, :, : count * self.hidden] @ x).unflatten(2, (count, self.hidden))
            h_wide, h_thin = h.split(sizes, dim=2)
            wide, thin, _ = frozen1.split((*sizes, len(self.names) - count), dim=2)
            if self.wide:
                made.update(zip(self.wide, l2norm(x.unsqueeze(2) + wide @ h_wide, dim=-2).unbind(2), strict=True))
            if self.thin:
                made.update(zip(self.thin, (thin[..., :1, :] @ h_thin).unbind(2), strict=True))
        if self.query:
            h = F.silu(frozen2[:, :, count * self.hidden : (count + 1) * self.hidden] @ queries)
            made["query"] = l2norm(queries + frozen1[:, :, count] @ h, dim=-2)
        return made

    def learn(
        self, packs: Packs, made: Mapping[str, Tensor], gates: Gates | MomentumGates
    ) -> tuple[Pack, Pack, Tensor]:
        """Weights and momenta after the block, and what `memory` makes of the queries (the queries, if it is static).

        `made` has the key, value, eta and query of each token as columns.
        """
        rule, (w1, w2), (frozen1, frozen2), (base1, base2) = self.rule, packs.weights, packs.frozen, packs.bases
        k, eta, queries = made["key"], made["eta"], made["query"]
        reader = len(self.names) - 1
        rows = reader * self.hidden
        pre, h, error = self._inner_error(k, made["value"], frozen1, frozen2)

        evolving = queries if self.reads and rule.read != "boundary" else None
        momentum1, momentum2 = (*packs.momenta, None, None)[:2]
        pre_q, new2 = None, w2
        if rule.writes_w2:
            delta2 = _SiluBackward.apply((frozen1.mT @ error).flatten(2, 3), pre)
            layer = (w2, momentum2, base2, k, delta2, rule.step(eta, k, dim=-2), evolving)
            new2, momentum2, pre_q = self._learn(*layer, gates, rule.erases_w2, rows)
        elif evolving is not None:
            pre_q = w2[:, :, rows:] @ queries
        h_q = None if pre_q is None else F.silu(pre_q).unsqueeze(2)
        keys1 = h if rule.step_size == "proximal" else l2norm(h, dim=-2)
        step1 = rule.step(eta.unsqueeze(2), h, dim=-2)
        layer = (w1, momentum1, base1, keys1, error, step1, h_q)
        new1, momentum1, inner = self._learn(*layer, gates.unsqueeze(2), rule.erases_w1, reader)
        momenta = tuple(momentum for momentum in (momentum1, momentum2) if momentum is not None)
        if not self.reads:
            return (new1, new2), momenta, queries
        if inner is None:
            inner = frozen1[:, :, reader:] @ F.silu(frozen2[:, :, rows:] @ queries).unsqueeze(2)
        return (new1, new2), momenta, queries + inner.squeeze(2)

    def _inner_error(self, k: Tensor, v: Tensor, frozen1: Tensor, frozen2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of n frozen memories: w2 k (B, H, n N, C), its silu (B, H, n, N, C) and the error (B, H, n, D, C)."""
        memories = (len(self.names), self.hidden)
        pre = frozen2 @ k
        h = F.silu(pre).unflatten(2, memories)
        target = F.silu(frozen2 @ v).unflatten(2, memories)
        # M(k) - M(v) takes one product with w1; eta and alpha do not skip it, the others do.
        inner, outer = (-target, -v) if self.rule.objective == "dot" else (h - target, k - v)
        skip = k.new_tensor([name not in SCALAR_MEMORIES for name in self.names]).view(-1, 1, 1)
        return pre, h, torch.addcmul(frozen1 @ inner, skip, outer.unsqueeze(2))


class MatrixStack(Stack):
    """Matrix memories: the rows of all of them, w (B, H, rows, D)."""

    def __init__(self, rule: Rule, weights: Weights) -> None:
        super().__init__(rule)
        self.rows = [weights[name][0].shape[-2] for name in self.names]
        self.width = weights["key"][0].shape[-1]
        self.last = (self.width,)

    def pack(self, weights: Weights) -> Pack:
        return (torch.cat([weights[name][0] for name in self.names], dim=-2),)

    def unpack(self, pack: Pack) -> dict[str, Layers]:
        return {name: (part,) for name, part in zip(self.names, pack[0].split(self.rows, dim=-2), strict=True)}

    def project(self, frozen: Pack, x: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """As of `MlpStack`."""
        made = dict[str, Tensor]()
        tall = len(self.wide) * self.width
        rows = tall + len(self.thin)
        read = frozen[0][:, :, :rows] @ x
        if self.wide:
            vectors = l2norm(read[:, :, :tall].unflatten(2, (len(self.wide), self.width)), dim=-2)
            made.update(zip(self.wide, vectors.unbind(2), strict=True))
        made.update(zip(self.thin, read[:, :, tall:].split(1, dim=2), strict=False))
        if self.query:
            made["query"] = l2norm(frozen[0][:, :, rows : rows + self.width] @ queries, dim=-2)
        return made

    def learn(
        self, packs: Packs, made: Mapping[str, Tensor], gates: Gates | MomentumGates
    ) -> tuple[Pack, Pack, Tensor]:
        """As of `MlpStack`."""
        rule, (w,), (frozen,), (base,), momenta = self.rule, packs.weights, packs.frozen, packs.bases, packs.momenta
        k, v, eta, queries = (made[name] for name in ("key", "value", "eta", "query"))
        error = frozen @ (-v if rule.objective == "dot" else k - v)
        evolving = queries if self.reads and rule.read != "boundary" else None
        reader = sum(self.rows[:-1])
        layer = (w, momenta[0] if momenta else None, base, k, error, rule.step(eta, k, dim=-2), evolving)
        new, momentum, output = self._learn(*layer, gates, rule.erases_matrix, reader)
        if not self.reads:
            output = queries
        elif output is None:
            output = frozen[:, :, reader:] @ queries
        return (new,), () if momentum is None else (momentum,), output


class _SiluBackward(torch.autograd.Function):
    """grad * silu'(pre), itself with a derivative: with s = sigmoid(pre), silu'' = s (1 - s) (2 + pre - 2 s pre)."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(grad, pre)
        return torch.ops.aten.silu_backward(grad, pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor]:
        grad, pre = ctx.saved_tensors
        s = torch.sigmoid(pre)
        curve = torch.addcmul(pre, pre, s, value=-2).add_(2)
        grad_pre = curve.mul_(outer).mul_(torch.ops.aten.sigmoid_backward(grad, s))
        return torch.ops.aten.silu_backward(outer, pre), grad_pre

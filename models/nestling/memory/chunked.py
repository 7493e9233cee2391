"""The memory operations as batched matrix products over blocks of tokens: exact, on any device.

Within a block every key and local gradient is known beforehand, so each layer's token recurrence has a closed form
(`nestling.memory.layer`); the memories of a layer are packed into few tensors (`nestling.memory.stacks`). Inside a
block tokens are columns: (..., width, C).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.layer import Gates, learn
from nestling.memory.momentum import MomentumGates
from nestling.memory.recompute import scan
from nestling.memory.rule import Rule, l2norm
from nestling.memory.stacks import MatrixStack, MlpStack, Packs
from nestling.memory.state import PROJECTIONS, SCALAR_MEMORIES, Layers, MemoryState, Weights, apply_memory

#: Tokens of a block at most: the triangular systems are TILE x TILE, whatever the chunk size of the model.
TILE = 64


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
    blocks_per_state: int | None,
) -> tuple[Tensor, Tensor]:
    if keys.shape[2] == 0:
        return queries.new_empty(*local_grads.shape), initial

    def body(block: int, carry: tuple, inputs: tuple, constants: tuple) -> tuple[Tensor, tuple[Tensor]]:
        (weights,), (base, first) = carry, constants
        z, delta, log_gate, step, q = (stream.mT for stream in inputs)
        gates = Gates(log_gate, inclusive=read == "after")
        new, output = learn(weights, base, z, delta, step, None if read == "boundary" else q, gates, erase)
        if output is None:
            output = first @ q
        return output.mT, (new,)

    spans = [(start, min(start + TILE, keys.shape[2])) for start in range(0, keys.shape[2], TILE)]
    inputs = (keys, local_grads, log_alpha.unsqueeze(-1), eta.unsqueeze(-1), queries)
    outputs, (final,) = scan(body, spans, (initial,), inputs, (base, initial), blocks_per_state)
    return outputs, final


def blocks(position: int, tokens: int, sizes: set[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of blocks that cross no boundary of any of these chunk sizes and are at most TILE long."""
    start = 0
    while start < tokens:
        left = min(size - (position + start) % size for size in sizes)
        end = min(start + min(left, TILE), tokens)
        yield start, end
        start = end


def self_modifying_scan(
    x: Tensor,
    queries: Tensor,
    state: MemoryState,
    rule: Rule,
    eta_max: Tensor,
    eta_bias: Tensor,
    alpha_bias: Tensor,
    mu: Tensor | None,
    blocks_per_state: int | None,
) -> tuple[Tensor, MemoryState]:
    if x.shape[2] == 0:
        return x.new_empty(x.shape), state
    static = {name: layers for name, layers in state.weights.items() if name not in rule.adaptive}
    scalars = tuple(scalar.view(1, -1, 1, 1) for scalar in (eta_max, eta_bias, alpha_bias))
    if "query" in static:
        queries = l2norm(apply_memory("query", static["query"], queries))
    # A memory that is never written has no snapshot of its own.
    outputs, weights, snapshots, momentum = queries, dict(state.weights), dict(state.weights), dict[str, Layers]()
    if rule.adaptive:
        log_mu = None if mu is None else mu.clamp(min=torch.finfo(mu.dtype).tiny).log().view(1, -1, 1, 1)
        outputs, written, frozen, momentum = _scan_written(
            x, queries, state, rule, static, scalars, log_mu, blocks_per_state
        )
        weights, snapshots = weights | written, snapshots | frozen
    if "memory" in static:
        outputs = apply_memory("memory", static["memory"], outputs)
    return outputs, MemoryState(weights, snapshots, state.base, state.position + x.shape[2], momentum)


def _scan_written(
    x: Tensor,
    queries: Tensor,
    state: MemoryState,
    rule: Rule,
    static: Weights,
    scalars: tuple[Tensor, ...],
    log_mu: Tensor | None,
    blocks_per_state: int | None,
) -> tuple[Tensor, dict[str, Layers], dict[str, Layers], dict[str, Layers]]:
    """What `memory` reads (the queries, if it is static); weights, snapshots and momentum of what is written."""
    stack = (MatrixStack if state.matrices else MlpStack)(rule, state.weights)
    sizes = {rule.chunk_of(name) for name in rule.adaptive}
    spans = list(blocks(state.position, x.shape[2], sizes))
    ends = [state.position + end for _, end in spans]
    # Projections that never change are made for all tokens at once.
    ready = {name: apply_memory(name, static[name], x) for name in PROJECTIONS if name in static}
    ready = {name: _finish(name, z, *scalars) if name in SCALAR_MEMORIES else l2norm(z) for name, z in ready.items()}
    weights, frozen = stack.pack(state.weights), stack.pack(state.snapshots)
    momenta = () if log_mu is None else stack.pack(_momentum(state, rule))
    bases = stack.pack(state.base) if rule.decay_to == "initial" else (None,) * len(weights)
    layers = len(weights)

    def body(block: int, carry: tuple, inputs: tuple, constants: tuple) -> tuple[Tensor, tuple[Tensor, ...]]:
        packs = Packs(carry[:layers], carry[layers : 2 * layers], carry[2 * layers :], constants[:layers])
        *scalars, log_mu = constants[layers:]
        x, queries, *streams = (stream.mT for stream in inputs)
        made = {"query": queries, **dict(zip(ready, streams, strict=True))}
        for name, z in stack.project(packs.frozen, x, queries).items():
            made[name] = _finish(name, z, *scalars) if name in SCALAR_MEMORIES else z
        weights, momenta, output = stack.learn(packs, made, _gates(made["alpha"], log_mu, rule))
        boundaries = (ends[block] % size == 0 for size in (rule.projection_chunk_size, rule.chunk_size))
        return output.mT, (*weights, *stack.refresh(packs.frozen, weights, *boundaries), *momenta)

    carry, constants = (*weights, *frozen, *momenta), (*bases, *scalars, log_mu)
    outputs, carry = scan(body, spans, carry, (x, queries, *ready.values()), constants, blocks_per_state)
    written, snapshots, momenta = carry[:layers], carry[layers : 2 * layers], carry[2 * layers :]
    return outputs, stack.unpack(written), stack.unpack(snapshots), stack.unpack(momenta) if momenta else {}


def _momentum(state: MemoryState, rule: Rule) -> dict[str, Layers]:
    """The momentum of every written layer, zero where the state has none."""
    momentum = {}
    for name in rule.adaptive:
        layers = state.weights[name] if rule.writes_w2 else state.weights[name][:1]
        known = state.momentum.get(name, ())[: len(layers)]
        momentum[name] = (*known, *(torch.zeros_like(layer) for layer in layers[len(known) :]))
    return momentum


def _gates(log_alpha: Tensor, log_mu: Tensor | None, rule: Rule) -> Gates | MomentumGates:
    if log_mu is None:
        return Gates(log_alpha, inclusive=rule.read == "after")
    return MomentumGates(log_alpha, log_mu.expand_as(log_alpha))


def _finish(name: str, z: Tensor, eta_max: Tensor, eta_bias: Tensor, alpha_bias: Tensor) -> Tensor:
    """eta or log alpha from what its memory says (B, H, ., .)."""
    return eta_max * torch.sigmoid(z + eta_bias) if name == "eta" else F.logsigmoid(z + alpha_bias)

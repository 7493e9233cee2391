"""HOPE: self-modifying Titans followed by a Continuum Memory System (arXiv:2512.24695, Eq. 94-97).

`x += Out(gate * Norm(SelfModifyingTitans(Conv(Norm(x)))))`, then the Continuum Memory System's levels. No
positional encoding. Each head owns five small memories whose initial weights are trained through their own updates.
Parameters of a block of width d with H heads of width D and memories of width N, besides norms and levels:
4 d^2 + conv_width d + H N (8 D + 2); a memory for queries adds 2 H N D. Every row of the ablation (Table 6) is a
setting of `HopeConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.memory import MemoryState, memory_gates, self_modifying_scan
from nestling.memory.rule import l2norm
from nestling.memory.state import ALL_MEMORIES, SCALAR_MEMORIES
from nestling.models.cms import continuum_memory
from nestling.models.component import TOKENS, Component, momentum_of
from nestling.models.config import HopeConfig
from nestling.models.convolution import ShortConvolution
from nestling.models.skeleton import LanguageModel, Mixer, linear


def hope(config: HopeConfig) -> LanguageModel:
    depth = config.layers * (1 + len(config.level_widths))
    return LanguageModel(
        config,
        lambda: (
            SelfModifyingTitans(config, depth),
            continuum_memory(config.width, config.level_widths, depth, config.level_variant),
        ),
    )


class MixerState(NamedTuple):
    """What the mixer carries: the last inputs of the convolution (B, taps - 1, width; B, 0, width without) and the
    memories."""

    tail: Tensor
    memory: MemoryState


class SelfModifyingTitans(Mixer):
    """Five memories a head, or six, that write themselves while they read (Eq. 83-93).

    Args:
        config: see `HopeConfig`.
        depth: residual branches of the whole model; scales the output projection at initialisation.
    """

    #: With False every step size is zero: the control that shows what the writes are worth.
    writes: bool = True
    #: Implementation of the memories' scan; see `self_modifying_scan` and `set_backend`.
    backend: str = "auto"
    #: A list here collects (mean eta, mean alpha, tokens) of every call; see `nestling.evaluation`.
    gate_log: list[tuple[float, float, int]] | None = None
    #: Bias of each head's retention gate (H,).
    alpha_bias: Tensor

    def __init__(self, config: HopeConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        self.chunk_size, self.projection_chunk_size = config.chunk_size, config.projection_chunk_size
        width = config.width
        self.names = tuple(name for name in ALL_MEMORIES if name != "query" or "query" not in config.static)
        still = set(config.static) if config.retention else {*config.static, "alpha"}
        self.adaptive = tuple(name for name in self.names if name not in still)
        self.layers = ("w1", "w2") if config.memory == "mlp" else ("w",)
        self.conv = ShortConvolution(width, config.conv_width) if config.conv_width else None
        self.input = linear(width, width)
        self.query = linear(width, width)
        self.gate = linear(width, width)
        self.norm = nn.RMSNorm(config.head_width, eps=1e-6)
        self.output = linear(width, width, gain=depth**-0.5)
        self.memories = nn.ParameterDict(
            {
                f"{name}_{layer}": nn.Parameter(weight)
                for name in self.names
                for layer, weight in zip(self.layers, initial_memory(name, config), strict=True)
            }
        )
        self.register_buffer("alpha_bias", retention_biases(config), persistent=False)

    def initial_state(self, batch: int) -> MixerState:
        weights = {
            name: tuple(self.memories[f"{name}_{layer}"].expand(batch, -1, -1, -1) for layer in self.layers)
            for name in self.names
        }
        tail = self.query.weight.new_zeros(batch, max(self.config.conv_width - 1, 0), self.config.width)
        return MixerState(tail, MemoryState.initial(weights))

    def forward(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        tail, memory = self.initial_state(x.shape[0]) if state is None else state
        convolved, tail = (x, tail) if self.conv is None else self.conv(x, tail)
        queries = l2norm(self._heads(self.query(convolved)))
        inputs = l2norm(self._heads(self.input(convolved)))
        if self.gate_log is not None:
            self._log_gates(inputs, queries, memory)
        read, memory = self._scan(inputs, queries, memory)
        read = self.norm(read).transpose(1, 2).flatten(2)
        return self.output(read * F.silu(self.gate(x))), MixerState(tail, memory)

    def components(self, tokens: int) -> list[Component]:
        rule, memory = self.config, self.initial_state(1).memory
        objective = "½‖M(k) − M(v)‖², its own value v (Eq. 93)" if rule.objective == "l2" else "−⟨M(k), M(v)⟩ (Eq. 92)"
        descent = "gradient descent" if rule.erase == "none" else "Delta Gradient Descent"
        found = []
        for name in self.adaptive:
            drawn = rule.redraw_chunk_sizes
            chunks = drawn or [self.chunk_size if name == "memory" else self.projection_chunk_size or self.chunk_size]
            evolving = name == "memory" and rule.read != "boundary"
            seen = tokens if evolving else sum(tokens // chunk for chunk in chunks) / len(chunks)
            layers, size = [layer.numel() for layer in memory.weights[name]], memory.weights[name][0].element_size()
            last, first = layers[0], sum(layers[1:]) if rule.write == "all" else 0
            erased = last * (rule.erase in ("all", "last")) + first * (rule.erase in ("all", "first"))
            if len(layers) == 1:  # a matrix is its own first and last layer
                erased = last * (rule.erase != "none")
            found.append(
                Component(
                    name=f"{_called(name)} memory",
                    context=TOKENS,
                    objective=objective,
                    rule=f"{descent} with retention, errors of chunks of {_listed(chunks)} (Eq. 57, 88, 90)",
                    updates_per_token=seen / max(tokens, 1),
                    state_bytes=2 * sum(layers) * size,  # weights and snapshot
                    # Reads of k and v for the gradient and of x or the query, the error's way back, decay and write.
                    flops_per_token=6 * sum(layers) + 2 * last * (first > 0) + 3 * (last + first) + 2 * erased,
                )
            )
            if rule.momentum:
                found.append(momentum_of(f"{_called(name)} memory", last + first, size))
        return found

    def role(self, name: str) -> str:
        if not name.startswith("memories."):
            return "projections"
        memory = name.removeprefix("memories.").rpartition("_")[0]
        return f"initial {_called(memory)} memory" if memory in self.adaptive else f"static {_called(memory)} memory"

    def _scan(self, inputs: Tensor, queries: Tensor, memory: MemoryState) -> tuple[Tensor, MemoryState]:
        c = self.config
        return self_modifying_scan(
            inputs,
            queries,
            memory,
            chunk_size=self.chunk_size,
            projection_chunk_size=self.projection_chunk_size,
            eta_max=c.eta_max if self.writes else 0.0,
            eta_bias=c.eta_bias,
            alpha_bias=self.alpha_bias,
            objective=c.objective,
            erase=c.erase,
            step_size=c.step_size,
            read=c.read,
            decay_to=c.decay_to,
            write=c.write,
            adaptive=self.adaptive,
            momentum=c.momentum,
            backend=self.backend,
        )

    @torch.no_grad()
    def _log_gates(self, inputs: Tensor, queries: Tensor, memory: MemoryState) -> None:
        """Mean eta and alpha of these tokens: chunk by chunk, because the gates are made by the frozen snapshots."""
        assert self.gate_log is not None
        size, eta_max = self.projection_chunk_size or self.chunk_size, self.config.eta_max if self.writes else 0.0
        start, etas, alphas = 0, [], []
        while start < inputs.shape[2]:
            end = start + size - memory.position % size
            piece = inputs[:, :, start:end]
            eta, alpha = memory_gates(piece, memory, eta_max, self.config.eta_bias, self.alpha_bias)
            etas.append(eta)
            alphas.append(alpha)
            memory = self._scan(piece, queries[:, :, start:end], memory)[1]
            start = end
        mean_eta, mean_alpha = (torch.cat(gates, 2).mean().item() for gates in (etas, alphas))
        self.gate_log.append((mean_eta, mean_alpha, inputs.shape[0] * inputs.shape[2]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfModifyingTitans:
        """Gates are float32 whatever the parameters are cast to."""
        super()._apply(fn, recurse)
        self.alpha_bias = retention_biases(self.config).to(self.alpha_bias.device)
        return self

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)


def _listed(chunks: list[int]) -> str:
    """ "64", or "4, 6 or 8" where one is drawn at each step."""
    *others, last = map(str, chunks)
    return f"{', '.join(others)} or {last}" if others else last


def _called(memory: str) -> str:
    return "main" if memory == "memory" else memory


def initial_memory(name: str, config: HopeConfig) -> tuple[Tensor, ...]:
    """Initial weights w1 (H, out, N) and w2 (H, N, D) of one memory, or w (H, out, D) of a matrix memory.

    Everything that a memory reads has unit norm, so w2 has entries of unit variance: a hidden layer at unit scale, bent
    enough to tell keys apart. The last layer then makes outputs of norm `memory_gain` (`projection_gain` for those that
    make projections), comparable to what one write adds.
    """
    heads, width = config.heads, config.head_width
    out = 1 if name in SCALAR_MEMORIES else width
    gain = config.memory_gain if name == "memory" or config.projection_gain is None else config.projection_gain
    if config.memory == "matrix":
        return (torch.randn(heads, out, width) * gain * out**-0.5,)
    hidden = config.memory_width or width
    w1 = torch.randn(heads, out, hidden) * gain * (hidden * out) ** -0.5
    return w1, torch.randn(heads, hidden, width)


def retention_biases(config: HopeConfig) -> Tensor:
    """alpha_bias of each head (H,): fixed, or retention horizons 1 / (1 - alpha) spread evenly in their logarithm.

    Infinity without retention, the bias of a gate that is always 1.
    """
    if not config.retention:
        return torch.full((config.heads,), math.inf)
    if config.alpha_bias is not None:
        return torch.full((config.heads,), float(config.alpha_bias))
    low, high = (math.log(horizon) for horizon in config.horizons)
    return (torch.linspace(low, high, config.heads).exp() - 1).log()


def mixers(model: nn.Module) -> list[SelfModifyingTitans]:
    """The self-modifying layers of a model, first to last."""
    return [module for module in model.modules() if isinstance(module, SelfModifyingTitans)]


def set_chunk_size(model: nn.Module, chunk_size: int | None) -> None:
    """Give every memory of the model this chunk size; None puts the configuration's own back."""
    for mixer in mixers(model):
        own = mixer.config
        mixer.chunk_size = own.chunk_size if chunk_size is None else chunk_size
        mixer.projection_chunk_size = own.projection_chunk_size if chunk_size is None else None


def set_backend(model: nn.Module, backend: str) -> None:
    """Run every memory of the model on this backend: "auto", "chunked" or "reference" (slow; differentiable twice)."""
    for mixer in mixers(model):
        mixer.backend = backend

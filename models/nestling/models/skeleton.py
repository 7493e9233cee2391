"""The skeleton that all models share: embedding, residual blocks of a mixer and a feed-forward part, head.

A model is the mixer and the feed-forward part that it puts in. A mixer maps (B, T, width) and its state to the same
shape and its next state; everything that a stream carries lives in those states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestling.memory.recompute import sparing
from nestling.models.cms import Level
from nestling.models.component import Component
from nestling.models.config import SkeletonConfig
from nestling.models.layers import linear

__all__ = ["Block", "LanguageModel", "Mixer", "linear"]


class Mixer(nn.Module):
    """The part of a block that moves information between tokens."""

    def initial_state(self, batch: int) -> Any:
        """The state before the first token, for `batch` rows."""
        raise TypeError(f"{type(self).__name__} does not define initial_state")

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(B, T, width) and the state (None: fresh) to (B, T, width) and the next state."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def components(self, tokens: int) -> list[Component]:
        """What learns while it reads, with its state after `tokens` tokens of one sequence."""
        raise TypeError(f"{type(self).__name__} does not define components")

    def role(self, name: str) -> str:
        """What the weight called `name` (in this mixer) is for; weights of one role and level are one component."""
        return "projections"


class Block(nn.Module):
    """x += mixer(norm(x)); x += part(x) for each feed-forward part, which brings its own norm."""

    def __init__(self, width: int, mixer: Mixer, feed_forward: Sequence[nn.Module], norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.mixer = mixer
        self.feed_forward = nn.ModuleList(feed_forward)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.norm(x), state)
        x = x + mixed
        for part in self.feed_forward:
            x = x + part(x)
        return x, state


class LanguageModel(nn.Module):
    """Tokens (B, T) int64 to logits (B, T, V), with a state per block.

    Args:
        config: width, layers, vocabulary and head.
        block: makes the mixer and the feed-forward parts of one block.
        norm_eps: of the skeleton's own norms.
        level_layers: the layers whose whole feed-forward parts make up each level; empty: every block has a `Level` of
            each level, or none.
    """

    def __init__(
        self,
        config: SkeletonConfig,
        block: Callable[[], tuple[Mixer, Sequence[nn.Module]]],
        norm_eps: float = 1e-6,
        level_layers: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.level_layers = level_layers
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([Block(config.width, *block(), norm_eps) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(config.width, eps=norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if config.tie_head:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """Logits (B, T, V) for tokens (B, T), and the state after them.

        Raises:
            ValueError: tokens that are not (B, T) int64, or the state of a model with another number of blocks.
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}, needs int64 of shape (B, T)")
        states = [None] * len(self.blocks) if state is None else state
        if len(states) != len(self.blocks):
            raise ValueError(f"state: got {len(states)} blocks, needs {len(self.blocks)}; it is another model's")
        x, after = self.embedding(tokens), []
        for block, before in zip(self._blocks(), states, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, new = checkpoint(block, x, before, use_reentrant=False, context_fn=lambda: (sparing(), sparing()))
            else:
                x, new = block(x, before)
            after.append(new)
        return self.head(self.norm(x)), after

    def initial_state(self, batch: int) -> list[Any]:
        """The state before the first token, for `batch` rows."""
        return [block.mixer.initial_state(batch) for block in self._blocks()]

    def level_parameters(self) -> list[list[nn.Parameter]]:
        """The parameters of each Continuum Memory System level, fastest first; empty for a model without one."""
        if self.level_layers:
            mlps = [block.feed_forward for block in self._blocks()]
            return [[p for layer in level for p in mlps[layer].parameters()] for level in self.level_layers]
        blocks = [
            [part for part in block.feed_forward.modules() if isinstance(part, Level)] for block in self._blocks()
        ]
        return [[p for part in level for p in part.parameters()] for level in zip(*blocks, strict=True)]

    def components(self, tokens: int) -> list[Component]:
        """What learns while it reads one sequence of `tokens` tokens; the same in several blocks is one component."""
        together: dict[tuple[str, float], Component] = {}
        for part in (part for block in self._blocks() for part in block.mixer.components(tokens)):
            key = part.name, part.updates_per_token
            if key in together:
                other = together[key]
                part = replace(
                    part,
                    state_bytes=part.state_bytes + other.state_bytes,
                    flops_per_token=part.flops_per_token + other.flops_per_token,
                )
            together[key] = part
        return list(together.values())

    def role(self, name: str) -> str:
        """What the parameter `name` is for: "embedding", "head", "norms", "feed-forward", or a role of its mixer."""
        first, *rest = name.split(".")
        if first != "blocks":
            return "norms" if first == "norm" else first
        block, part, *inside = rest
        if part == "mixer":
            return self._blocks()[int(block)].mixer.role(".".join(inside))
        return "norms" if part == "norm" else "feed-forward"

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

"""Hope-Attention: causal softmax attention, then a Continuum Memory System (arXiv:2512.24695, Sec. 7.3 and 8).

It has two forms. Built new, every block has attention and a residual MLP for each level: a Continuum Memory System in
each block (Eq. 97 with attention in the place of the memories). With `mlp_width` every block has one SwiGLU, and the
levels divide the layers among themselves (`level_layers`): the residual stream then passes the MLPs of all levels one
after another, so the whole depth is one chain of Eq. 70 with attention between its links. That is the form in which a
pretrained model becomes one without any change of its function (ad-hoc level stacking: MLP_0^(f_i) :=
MLP_pretrained_i); the same MLP copied into every level of a block's chain would change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from nestling.models.attention import Attention
from nestling.models.cms import continuum_memory
from nestling.models.component import Component
from nestling.models.config import HopeAttentionConfig
from nestling.models.convolution import ShortConvolution
from nestling.models.skeleton import LanguageModel, Mixer
from nestling.models.transformer import SwiGLU


def hope_attention(config: HopeAttentionConfig) -> LanguageModel:
    links = len(config.level_widths) if config.mlp_width is None else 1
    depth = config.layers * (1 + links)

    def mixer() -> Mixer:
        attention = Attention(config, depth)
        return Convolved(attention, config.width, config.conv_width) if config.conv_width else attention

    def feed_forward() -> Sequence[nn.Module]:
        if config.mlp_width is not None:
            return [SwiGLU(config.width, config.mlp_width, depth, config.norm_eps)]
        return continuum_memory(config.width, config.level_widths, depth, config.level_variant)

    return LanguageModel(config, lambda: (mixer(), feed_forward()), config.norm_eps, config.level_layers)


class ConvolvedState(NamedTuple):
    """The last inputs of the convolution (B, taps - 1, width), and the mixer's own state."""

    tail: Tensor
    mixer: Any


class Convolved(Mixer):
    """A mixer behind a short causal convolution, which lets it compare each token with the ones before."""

    def __init__(self, mixer: Mixer, width: int, taps: int) -> None:
        super().__init__()
        self.conv = ShortConvolution(width, taps)
        self.mixer = mixer

    def initial_state(self, batch: int) -> ConvolvedState:
        taps, width = self.conv.weight.shape
        return ConvolvedState(self.conv.weight.new_zeros(batch, taps - 1, width), self.mixer.initial_state(batch))

    def components(self, tokens: int) -> list[Component]:
        return self.mixer.components(tokens)

    def forward(self, x: Tensor, state: ConvolvedState | None) -> tuple[Tensor, ConvolvedState]:
        tail, inner = self.initial_state(x.shape[0]) if state is None else state
        convolved, tail = self.conv(x, tail)
        mixed, inner = self.mixer(convolved, inner)
        return mixed, ConvolvedState(tail, inner)

"""LSTM (Hochreiter and Schmidhuber 1997; forget gates: Gers et al. 2000) in pre-norm residual blocks.

`x += Out(LSTM(Norm(x)))`, the recurrence torch's own: it cannot run in parallel over tokens, and it tracks state.
Its cells are kept in the parameters' dtype, so prefer float32 for long streams.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from nestling.models.component import TOKENS, Component
from nestling.models.config import LstmConfig
from nestling.models.skeleton import LanguageModel, Mixer, linear


def lstm(config: LstmConfig) -> LanguageModel:
    return LanguageModel(config, lambda: (Lstm(config, config.layers), []))


class LstmState(NamedTuple):
    """Output and cell after the last token, (B, hidden) each."""

    output: Tensor
    cell: Tensor


class Lstm(Mixer):
    """One layer of LSTM cells and an output projection: 4 h (d + h + 2) + h d parameters for width d and h cells.

    Args:
        config: see `LstmConfig`.
        depth: residual branches of the whole model; scales the output projection at initialisation.
    """

    def __init__(self, config: LstmConfig, depth: int) -> None:
        super().__init__()
        self.cells = nn.LSTM(config.width, config.hidden, batch_first=True)
        self.output = linear(config.hidden, config.width, gain=depth**-0.5)
        parts = dict(self.cells.named_parameters())
        nn.init.normal_(parts["weight_ih_l0"], std=config.width**-0.5)
        for gate in parts["weight_hh_l0"].detach().chunk(4):
            nn.init.orthogonal_(gate)
        nn.init.zeros_(parts["bias_ih_l0"])
        nn.init.zeros_(parts["bias_hh_l0"])
        # Gates are in the order input, forget, cell, output; a forget gate that starts open lets gradients through.
        nn.init.ones_(parts["bias_ih_l0"].detach().chunk(4)[1])

    def initial_state(self, batch: int) -> LstmState:
        zeros = self.output.weight.new_zeros(batch, self.cells.hidden_size)
        return LstmState(zeros, zeros)

    def components(self, tokens: int) -> list[Component]:
        cell = self.initial_state(1).cell
        return [
            Component(
                name="cell",
                context=TOKENS,
                objective="none of its own: what the outer loss has trained it to keep",
                rule="gates (Hochreiter & Schmidhuber 1997)",
                updates_per_token=1.0,
                state_bytes=2 * cell.numel() * cell.element_size(),
                flops_per_token=8.0 * cell.numel(),
            )
        ]

    def role(self, name: str) -> str:
        return "cells" if name.startswith("cells") else "projections"

    def forward(self, x: Tensor, state: LstmState | None) -> tuple[Tensor, LstmState]:
        before = self.initial_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return x, before
        first = tuple(part.to(x.dtype).unsqueeze(0) for part in before)
        read, (output, cell) = self.cells(x, first)
        return self.output(read), LstmState(output[0], cell[0])

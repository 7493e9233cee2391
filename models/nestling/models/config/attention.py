"""Configurations of the models with softmax attention."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.models.config.skeleton import SwiGLUConfig, require


@dataclass
class TransformerConfig(SwiGLUConfig):
    """Transformer baseline: RMSNorm, rotary positions, softmax attention, SwiGLU."""

    name: str = "transformer"
    #: Base of the rotary frequencies.
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rope_base > 1, f"model.rope_base: got {self.rope_base}, needs more than 1")
        require(
            self.head_width % 2 == 0,
            f"model.heads: heads of {self.head_width} are odd; rotary positions need an even width / heads",
        )

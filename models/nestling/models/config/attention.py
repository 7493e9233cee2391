"""Configurations of the models with softmax attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from nestling.models.config.levels import LevelsConfig
from nestling.models.config.skeleton import SwiGLUConfig, require


@dataclass
class AttentionConfig(SwiGLUConfig):
    """Causal softmax attention with rotary positions, with what the Llama, Qwen and Mistral families vary in it."""

    #: Heads of keys and values, each shared by `heads / kv_heads` heads of queries; None: as many as `heads`.
    kv_heads: int | None = None
    #: Width of a head; None: width / heads.
    head_dim: int | None = None
    #: Whether queries, keys and values have a bias (Qwen2).
    qkv_bias: bool = False
    #: Normalise each head's queries and keys before they are rotated (Qwen3).
    qk_norm: bool = False
    #: Newest tokens that a token attends to, itself among them (Mistral); None: all.
    window: int | None = None
    #: Base of the rotary frequencies.
    rope_base: float = 10000.0
    #: Llama 3's stretching of the rotary frequencies: [factor, low_freq_factor, high_freq_factor, original length in
    #: tokens]; empty: none.
    rope_scaling: list[float] = field(default_factory=list)
    #: Added to the mean square in the RMSNorms; those of a chain's levels have 1e-6.
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}: got {value}, needs at least 1 (or null)")
        require(
            self.heads % self.key_heads == 0,
            f"model.kv_heads: {self.key_heads} heads of keys do not divide model.heads={self.heads}; choose a divisor",
        )
        require(self.rope_base > 1, f"model.rope_base: got {self.rope_base}, needs more than 1")
        require(self.norm_eps > 0, f"model.norm_eps: got {self.norm_eps}, needs more than 0")
        scaling = list(self.rope_scaling)
        require(
            not scaling or (len(scaling) == 4 and min(scaling) > 0 and scaling[1] < scaling[2]),
            f"model.rope_scaling: got {scaling}, needs [factor, low_freq_factor, high_freq_factor, original length], "
            "all above 0 and low_freq_factor < high_freq_factor, or nothing",
        )
        require(
            self.head_width % 2 == 0,
            f"model.heads: heads of {self.head_width} are odd; rotary positions need an even width / heads or head_dim",
        )

    def _check_heads(self) -> None:
        if self.head_dim is None:
            super()._check_heads()

    @property
    def head_width(self) -> int:
        return self.head_dim or super().head_width

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads


@dataclass
class TransformerConfig(AttentionConfig):
    """Transformer baseline: RMSNorm, rotary positions, softmax attention, SwiGLU."""

    name: str = "transformer"


@dataclass
class HopeAttentionConfig(AttentionConfig, LevelsConfig):
    """Hope-Attention: softmax attention in the place of HOPE's memories, then a Continuum Memory System.

    Without `mlp_width` every block has the levels of `level_widths`. With it every block has one SwiGLU instead, and
    levels are made of whole layers' MLPs, as `nestling adapt` has it.
    """

    name: str = "hope_attention"
    #: Taps of the causal depthwise convolution before the attention; 0: none.
    conv_width: int = 4
    #: With `mlp_width`, the layers (from 0) whose MLPs make up each level; filled from the job's `levels`.
    level_layers: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.conv_width >= 0, f"model.conv_width: got {self.conv_width}, needs at least 1 (or 0 for none)")
        require(
            self.mlp_width is None or self.level_variant == "sequential",
            f"model.level_variant: got {self.level_variant}; one MLP a layer (model.mlp_width) needs sequential",
        )
        self._check_layers()

    def _check_layers(self) -> None:
        layers = [layer for level in self.level_layers for layer in level]
        require(
            not layers or self.mlp_width is not None,
            f"model.level_layers: got {layers}, needs model.mlp_width: without it every block has all levels",
        )
        require(
            len(set(layers)) == len(layers) and all(0 <= layer < self.layers for layer in layers),
            f"model.level_layers: got {[list(level) for level in self.level_layers]}, needs each layer from 0 to "
            f"{self.layers - 1} at most once",
        )

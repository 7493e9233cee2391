"""Configurations of the recurrent baselines; their defaults are the published models' own."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.models.config.skeleton import SkeletonConfig, SwiGLUConfig, require


def check_counts(config: SkeletonConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= 1, f"model.{name}: got {value}, needs at least 1")


@dataclass
class FastWeightConfig(SwiGLUConfig):
    """What the models with one matrix memory a head share."""

    #: Taps of the causal depthwise convolution over queries, keys and values.
    conv_width: int = 4
    #: Width of a head's values over the width of its keys.
    expand_v: int = 1
    #: Gate what is read with SiLU of a projection of the block's input.
    output_gate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "conv_width", "expand_v")


@dataclass
class LinearAttentionConfig(FastWeightConfig):
    """Linear attention (arXiv:2006.16236), its normaliser replaced by a norm (arXiv:2210.10340), SwiGLU."""

    name: str = "linear_attention"


@dataclass
class DeltaNetConfig(FastWeightConfig):
    """DeltaNet: the delta rule (arXiv:2406.06484), SwiGLU."""

    name: str = "delta_net"
    #: Step sizes in (0, 2) instead of (0, 1): eigenvalues down to -1, which state tracking needs (arXiv:2411.12537).
    allow_neg_eigval: bool = False


@dataclass
class GatedDeltaNetConfig(DeltaNetConfig):
    """Gated DeltaNet: the delta rule with a data-dependent decay (arXiv:2412.06464), SwiGLU."""

    name: str = "gated_delta_net"
    expand_v: int = 2


@dataclass
class Mamba2Config(SkeletonConfig):
    """Mamba-2 (arXiv:2405.21060): blocks of one mixer and no feed-forward part, so twice as many as elsewhere."""

    name: str = "mamba2"
    #: Width of the mixer; None: twice the width of the residual stream. A head is `inner_width / heads` wide.
    inner_width: int | None = None
    #: State size N: width of the keys (B) and queries (C) that all heads share.
    state_width: int = 128
    #: Taps of the causal depthwise convolution.
    conv_width: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "inner_width", "state_width", "conv_width")
        require(
            self.inner % self.heads == 0,
            f"model.inner_width: got {self.inner_width}, needs a multiple of model.heads={self.heads}",
        )

    @property
    def inner(self) -> int:
        return self.inner_width or 2 * self.width


@dataclass
class LstmConfig(SkeletonConfig):
    """LSTM (Hochreiter and Schmidhuber 1997) in residual blocks, no feed-forward part; `heads` has no meaning here."""

    name: str = "lstm"
    #: Width of the cells; None: the width of the residual stream.
    hidden_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "hidden_width")

    @property
    def hidden(self) -> int:
        return self.hidden_width or self.width

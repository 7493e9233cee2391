"""What every model's configuration shares, and how a value is checked."""

from __future__ import annotations

from dataclasses import dataclass


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{name}: got {value!r}, needs one of {', '.join(choices)}")


@dataclass
class SkeletonConfig:
    """What every model shares: embedding, residual blocks, head."""

    name: str = ""
    #: Number of tokens the embedding knows; None takes it from the tokenizer.
    vocab_size: int | None = None
    #: Width of the residual stream.
    width: int = 128
    #: Number of blocks.
    layers: int = 2
    #: Heads of a mixer; each is `width / heads` wide.
    heads: int = 4
    #: Use the embedding matrix as the output head as well.
    tie_head: bool = False
    #: Parameters' dtype when the model is built: float32, bfloat16 or float64.
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}: got {value}, needs at least 1")
        require(
            self.vocab_size is None or self.vocab_size >= 2,
            f"model.vocab_size: got {self.vocab_size}, needs at least 2 (or null to take the tokenizer's)",
        )
        self._check_heads()
        check_choice("model.dtype", self.dtype, ("float32", "bfloat16", "float64"))

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def _check_heads(self) -> None:
        require(
            self.width % self.heads == 0,
            f"model.heads: {self.heads} heads do not divide model.width={self.width}; "
            f"choose a width that is a multiple of {self.heads} or another number of heads",
        )


@dataclass
class SwiGLUConfig(SkeletonConfig):
    """A model whose blocks are a mixer and a SwiGLU."""

    #: Hidden width of the SwiGLU; None: 8/3 of the width, rounded up to a multiple of 8.
    mlp_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.mlp_width is None or self.mlp_width >= 1,
            f"model.mlp_width: got {self.mlp_width}, needs at least 1 (or null)",
        )

    @property
    def mlp_hidden(self) -> int:
        return self.mlp_width or -(-8 * self.width // 24) * 8

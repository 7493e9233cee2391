"""Configuration of Titans."""

from __future__ import annotations

from dataclasses import dataclass, field

from nestling.models.config.skeleton import SwiGLUConfig, check_choice, require


@dataclass
class TitansConfig(SwiGLUConfig):
    """Titans: a deep memory that learns by gradient descent with momentum and decay (arXiv:2501.00663), SwiGLU."""

    name: str = "titans"
    #: Hidden width N of the memory; None takes the width of a head.
    memory_width: int | None = None
    #: Norm of the memory's output for a unit input at initialisation, the skip connection aside.
    memory_gain: float = 1.0
    #: Taps of the causal depthwise convolution over queries, keys and values.
    conv_width: int = 4
    #: Tokens per update of the snapshot at which the inner gradient is taken.
    chunk_size: int = 16
    #: Largest step size, times N / (1 - mu): about three times the share of its error that a token's write removes.
    theta_max: float = 1.0
    #: Added to the step size's projection before its sigmoid.
    theta_bias: float = 0.0
    #: Largest decay mu of the momentum.
    mu_max: float = 0.9
    #: Added to the momentum's projection before its sigmoid.
    mu_bias: float = 0.0
    #: Shortest and longest retention horizon 1 / (1 - alpha) in tokens at initialisation, spread over the heads.
    horizons: list[float] = field(default_factory=lambda: [16.0, 2048.0])
    #: The memory a token reads: "after" its own write, "before" it, or at the last chunk "boundary".
    read: str = "after"
    #: What the decay leads towards: the "initial" weights or "zero".
    decay_to: str = "initial"
    #: Learned inputs that every block reads before the first token (persistent memory).
    persistent_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk_size", "conv_width"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}: got {value}, needs at least 1")
        require(
            self.memory_width is None or self.memory_width >= 1,
            f"model.memory_width: got {self.memory_width}, needs at least 1 (or null)",
        )
        require(self.memory_gain > 0, f"model.memory_gain: got {self.memory_gain}, needs more than 0")
        require(self.theta_max > 0, f"model.theta_max: got {self.theta_max}, needs more than 0")
        require(0 < self.mu_max < 1, f"model.mu_max: got {self.mu_max}, needs a value in (0, 1)")
        require(self.persistent_tokens >= 0, f"model.persistent_tokens: got {self.persistent_tokens}, needs at least 0")
        low_high = list(self.horizons)
        require(
            len(low_high) == 2 and 1 < low_high[0] <= low_high[1],
            f"model.horizons: got {low_high}, needs [shortest, longest] in tokens with 1 < shortest <= longest",
        )
        check_choice("model.read", self.read, ("before", "after", "boundary"))
        check_choice("model.decay_to", self.decay_to, ("initial", "zero"))

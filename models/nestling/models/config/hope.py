"""Configuration of HOPE."""

from __future__ import annotations

from dataclasses import dataclass, field

from nestling.models.config.levels import LevelsConfig
from nestling.models.config.skeleton import check_choice, require

#: What a model may make with memories of their own, beside the memory that is read.
PROJECTIONS = ("key", "value", "query", "eta", "alpha")


@dataclass
class HopeConfig(LevelsConfig):
    """HOPE: short convolution, self-modifying Titans, Continuum Memory System (arXiv:2512.24695, Eq. 94-97)."""

    name: str = "hope"
    #: What a memory is: "mlp", z + w1 silu(w2 z) (Eq. 89), or "matrix", W z.
    memory: str = "mlp"
    #: Hidden width N of each memory; None takes the width of a head.
    memory_width: int | None = None
    #: Norm of a memory's output for a unit input at initialisation, the skip connection aside.
    memory_gain: float = 1.0
    #: The same for the memories that make projections (key, value, query, eta, alpha); None: as `memory_gain`.
    projection_gain: float | None = None
    #: Projections that do not modify themselves ("w/o inner projection", Table 6). The memory of a listed key, value,
    #: eta or alpha stays and is never written: the same function of the same parameters, moved to the slowest level.
    #: Queries of a listed query are W_q x alone, "the only non-adaptive projection"; otherwise a memory reads W_q x.
    static: list[str] = field(default_factory=lambda: ["query"])
    #: Taps of the causal depthwise convolution (with SiLU) before the memories; 0: none.
    conv_width: int = 4
    #: Tokens per update of the main memory's frozen snapshot.
    chunk_size: int = 64
    #: The same for the key, value, eta and alpha memories; None: as `chunk_size`.
    projection_chunk_size: int | None = None
    #: Chunk sizes of which one is drawn at each training step (both memories); empty: always `chunk_size`.
    redraw_chunk_sizes: list[int] = field(default_factory=list)
    #: Largest step size of the inner update; 2 permits negative eigenvalues.
    eta_max: float = 1.0
    #: Added to the eta memory's output before the sigmoid.
    eta_bias: float = -4.0
    #: Added to the alpha memory's output before the sigmoid; None spreads it over the heads by `horizons`.
    alpha_bias: float | None = None
    #: Shortest and longest retention horizon 1 / (1 - alpha) in tokens, spread over the heads; for alpha_bias=None.
    horizons: list[float] = field(default_factory=lambda: [16.0, 2048.0])
    #: Whether memories forget; False fixes the retention gate alpha at 1 ("w/o weight decay", Table 6).
    retention: bool = True
    #: Momentum of the inner gradients, from 0 (none) to below 1; the steps add up to 1 / (1 - momentum) times eta.
    momentum: float = 0.0
    #: Inner objective: "l2" (Eq. 93) or "dot" (Eq. 92).
    objective: str = "l2"
    #: Which layers of a memory erase along their key: all, first (w2), last (w1) or none ("w/o DGD", Table 6).
    #: A matrix memory is one layer, its first and its last.
    erase: str = "last"
    #: "proximal" (exact Delta Gradient Descent) or "direct".
    step_size: str = "proximal"
    #: Memory state a token reads: before its own update, after it, or at the last chunk boundary.
    read: str = "before"
    #: What the retention gate decays towards: the "initial" weights or "zero".
    decay_to: str = "initial"
    #: Which layers are written: all or last (w1 only); a matrix memory is written either way.
    write: str = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.chunk_size >= 1, f"model.chunk_size: got {self.chunk_size}, needs at least 1")
        require(self.conv_width >= 0, f"model.conv_width: got {self.conv_width}, needs at least 0 (no convolution)")
        for name in ("projection_chunk_size", "memory_width"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}: got {value}, needs at least 1 (or null)")
        require(
            all(value >= 1 for value in self.redraw_chunk_sizes),
            f"model.redraw_chunk_sizes: got {list(self.redraw_chunk_sizes)}, every entry needs at least 1",
        )
        for name in ("memory_gain", "projection_gain"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name}: got {value}, needs more than 0")
        require(0 <= self.momentum < 1, f"model.momentum: got {self.momentum}, needs a value in [0, 1)")
        require(
            set(self.static) <= set(PROJECTIONS) and len(set(self.static)) == len(self.static),
            f"model.static: got {list(self.static)}, needs different names of {', '.join(PROJECTIONS)}",
        )
        require(
            self.memory == "mlp" or self.memory_width is None,
            f"model.memory_width: got {self.memory_width}, but matrix memories have no hidden layer; leave it out",
        )
        require(0 < self.eta_max <= 2, f"model.eta_max: got {self.eta_max}, needs a value in (0, 2]")
        low_high = list(self.horizons)
        require(
            len(low_high) == 2 and 1 < low_high[0] <= low_high[1],
            f"model.horizons: got {low_high}, needs [shortest, longest] in tokens with 1 < shortest <= longest",
        )
        check_choice("model.memory", self.memory, ("mlp", "matrix"))
        check_choice("model.objective", self.objective, ("l2", "dot"))
        check_choice("model.erase", self.erase, ("all", "first", "last", "none"))
        check_choice("model.step_size", self.step_size, ("proximal", "direct"))
        check_choice("model.read", self.read, ("before", "after", "boundary"))
        check_choice("model.decay_to", self.decay_to, ("initial", "zero"))
        check_choice("model.write", self.write, ("all", "last"))

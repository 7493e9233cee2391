"""Settings of the update rules that a level, or the rest of a model, can move by; `nestling.optim` explains them.

They hold wherever a rule is chosen (`training.optimizer`, `levels.N.optimizer`). Learning rates and weight decay are in
`training` and in the levels, AdamW's averaging factors in `training.betas`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nestling.models.config.skeleton import require

#: The rules by name, as in `nestling.optim.COMPONENTS`.
Optimizer = Literal["adamw", "sgd", "m3", "muon", "delta_momentum", "deep_momentum", "delta_gradient_descent"]
#: Those that leave all but matrices to AdamW.
MATRIX_OPTIMIZERS = ("m3", "muon")


@dataclass
class SgdConfig:
    """Gradient descent."""

    #: What is kept of the momentum at every update; 0: none.
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _factors("sgd.momentum", self.momentum)


@dataclass
class M3Config:
    """Multi-scale Momentum Muon (arXiv:2512.24695, Algorithm 1). AdamW's part takes the first two of its factors."""

    #: Factors of the fast momentum, of the second moment and of the slow momentum.
    betas: list[float] = field(default_factory=lambda: [0.95, 0.99, 0.9])
    #: Weight of the slow momentum's direction.
    slow_weight: float = 0.5
    #: Updates whose gradients the slow momentum takes in at once.
    slow_period: int = 10
    #: Steps of the Newton-Schulz iteration.
    ns_steps: int = 5
    #: Added to the root of the second moment. A step is as 1 / |gradient|: much smaller gradients than this count less.
    eps: float = 1e-8
    #: ema; literal: the algorithm as printed, without decay; adamuon: the second moment of what is orthogonalised.
    mode: Literal["ema", "literal", "adamuon"] = "ema"

    def __post_init__(self) -> None:
        require(len(self.betas) == 3, f"optimizers.m3.betas: got {list(self.betas)}, needs three values")
        _factors("m3.betas", *self.betas)
        for name in ("slow_weight", "eps"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optimizers.m3.{name}: got {value}, needs a finite value of at least 0")
        _at_least_one("m3", self, "slow_period", "ns_steps")


@dataclass
class MuonConfig:
    """Muon."""

    #: Averaging factor of the gradient.
    momentum: float = 0.95
    #: Orthogonalise the momentum as it would be after one more such gradient.
    nesterov: bool = True
    #: Steps of the Newton-Schulz iteration.
    ns_steps: int = 5

    def __post_init__(self) -> None:
        _factors("muon.momentum", self.momentum)
        _at_least_one("muon", self, "ns_steps")


@dataclass
class DeltaMomentumConfig:
    """Momentum with the delta rule (arXiv:2512.24695, Eq. 49)."""

    #: What is kept of the momentum at every update, before it erases.
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _factors("delta_momentum.momentum", self.momentum)


@dataclass
class DeepMomentumConfig:
    """A momentum that is an MLP (arXiv:2512.24695, Eq. 50); it takes its averaging factors from training.betas."""

    #: Units of each MLP; the optimizer's state is 2 hidden + 1 times the parameters.
    hidden: int = 2

    def __post_init__(self) -> None:
        _at_least_one("deep_momentum", self, "hidden")


@dataclass
class OptimizersConfig:
    """Settings of the optimizers that have any, and of whole matrices under ZeRO."""

    sgd: SgdConfig = field(default_factory=SgdConfig)
    m3: M3Config = field(default_factory=M3Config)
    muon: MuonConfig = field(default_factory=MuonConfig)
    delta_momentum: DeltaMomentumConfig = field(default_factory=DeltaMomentumConfig)
    deep_momentum: DeepMomentumConfig = field(default_factory=DeepMomentumConfig)
    #: Elements of whole matrices that a worker gathers at once under ZeRO; a larger matrix is gathered by itself.
    bucket: int = 2**24

    def __post_init__(self) -> None:
        require(self.bucket >= 1, f"optimizers.bucket: got {self.bucket}, needs at least 1")

    def settings(self, optimizer: str) -> dict[str, Any]:
        """The settings of one of them, by the names that `nestling.optim` gives them."""
        chosen = getattr(self, optimizer, None)
        return asdict(chosen) if chosen is not None else {}


def _factors(name: str, *values: float) -> None:
    for value in values:
        require(0 <= value < 1, f"optimizers.{name}: got {value}, needs a value from 0 to below 1")


def _at_least_one(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"optimizers.{section}.{name}: got {value}, needs at least 1")

"""Configuration of the Continuum Memory System, for the models that have one."""

from __future__ import annotations

from dataclasses import dataclass, field

from nestling.models.config.skeleton import SkeletonConfig, check_choice, require

LEVEL_VARIANTS = ("sequential", "nested", "independent")


@dataclass
class LevelsConfig(SkeletonConfig):
    """A model whose blocks end in a Continuum Memory System (arXiv:2512.24695, Eq. 70-74)."""

    #: Hidden widths of the Continuum Memory System's levels, fastest first; filled from the job's `levels`.
    level_widths: list[int] = field(default_factory=lambda: [192, 192])
    #: How levels are joined: sequential (a chain, Eq. 73), nested (a chain in which the next slower level learns what
    #: a level is reset to, Eq. 72) or independent (a weighted sum, Eq. 74).
    level_variant: str = "sequential"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            all(value >= 1 for value in self.level_widths),
            f"model.level_widths: got {list(self.level_widths)}, every entry needs at least 1",
        )
        check_choice("model.level_variant", self.level_variant, LEVEL_VARIANTS)

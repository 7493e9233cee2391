"""A sweep file: what is asked, of which job, over what, how it is searched, and what each trial may cost.

It is checked like a job: `build_section` names the full key of whatever is wrong, and what only holds between keys is
checked here. What the space makes of the job is the concern of `arms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from nestling.config import ConfigError
from nestling.config.build import build_section
from nestling.config.checks import need, need_name, positive, whole
from nestling.config.load import change, parse_override, read_yaml
from nestling.tuning.sweeps.outcome import METRICS


@dataclass
class BudgetConfig:
    """What a trial may use up, the same for all: one of tokens, seconds and flops."""

    #: Configurations that are drawn, for searcher=random and optuna (with pbt: the population); null: the whole grid.
    trials: int | None = None
    #: Tokens trained on.
    tokens: int | None = None
    #: Seconds of training, evaluation aside; how many steps that is is measured before the first trial of each arm.
    seconds: float | None = None
    #: Operations, by what `nestling levels` counts for a token.
    flops: float | None = None

    def check(self) -> None:
        """Raises ValueError if no trial can be bounded by this."""
        need("budget", self, "at least 1", whole, "trials", "tokens")
        need("budget", self, "a finite value above 0", positive, "seconds", "flops")
        given = [name for name in UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"budget: got {' and '.join(given) or 'none'} of tokens, seconds and flops, needs one of them, for "
                "example budget.tokens=200000"
            )

    @property
    def unit(self) -> str:
        """Which of them is given."""
        return next(name for name in UNITS if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """How much of it."""
        return float(getattr(self, self.unit))


UNITS = ("tokens", "seconds", "flops")


@dataclass
class ObjectiveConfig:
    """What trials are compared by; the first of several also decides who is stopped early or copied."""

    #: One of `METRICS`.
    metric: str = "heldout_bits_per_byte"
    #: Whether less or more of it is better.
    mode: Literal["min", "max"] = "min"


@dataclass
class AshaConfig:
    """Asynchronous Successive Halving (arXiv:1810.05934): at each rung only the best go on."""

    #: Rungs before the end of the budget; the first is at budget / factor^rungs.
    rungs: int = 2
    #: One of so many goes on at a rung, and the budget grows by so much to the next one.
    factor: int = 2


@dataclass
class PbtConfig:
    """Population Based Training (arXiv:1711.09846): the worst take over the best, with changed settings."""

    #: Parts into which the budget is cut; after each but the last the population is compared.
    rounds: int = 4
    #: Share of the population that is replaced after a round.
    share: float = 0.25


@dataclass
class SweepConfig:
    """A whole sweep."""

    #: The job that every arm starts from: a path, or the name of a file in ./jobs.
    job: str
    #: Name of the sweep and of its runs.
    name: str = "sweep"
    #: What it finds out, in a sentence.
    question: str = ""
    #: Keys of the job that are other than in its file, in all arms.
    overrides: dict[str, Any] = field(default_factory=dict)
    #: What varies: a key of the job and its values; see `space`.
    space: dict[str, Any] = field(default_factory=dict)
    #: grid: every combination; random: drawn by themselves; optuna: drawn by what others came to.
    searcher: Literal["grid", "random", "optuna"] = "grid"
    #: none: every trial has its whole budget; asha and pbt: see their sections.
    scheduler: Literal["none", "asha", "pbt"] = "none"
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    objectives: list[ObjectiveConfig] = field(default_factory=lambda: [ObjectiveConfig()])
    #: Trials of each configuration, with the job's `seed` and those after it: the same order of the data in each arm.
    seeds: int = 3
    #: Seed by which configurations are drawn.
    draw_seed: int = 0
    #: Give every arm about as many parameters as the job has, by its width.
    match_parameters: bool = False
    asha: AshaConfig = field(default_factory=AshaConfig)
    pbt: PbtConfig = field(default_factory=PbtConfig)
    #: Keys of the sweep or the job that are other with --quick.
    quick: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        need_name("name", self.name)
        self.budget.check()
        if self.seeds < 1:
            raise ValueError(f"seeds: got {self.seeds}, needs at least 1")
        need("asha", self.asha, "at least 1", whole, "rungs")
        for where, config, name in (("asha", self.asha, "factor"), ("pbt", self.pbt, "rounds")):
            need(where, config, "at least 2", lambda value: value >= 2, name)
        need("pbt", self.pbt, "a share above 0 and up to 0.5", lambda value: 0 < value <= 0.5, "share")
        if not self.space:
            raise ValueError(
                "space: is empty, needs at least one key, for example {training.learning_rate: [1e-3, 3e-3]}"
            )
        self._check_objectives()
        self._check_search()

    def _check_objectives(self) -> None:
        metrics = [objective.metric for objective in self.objectives]
        if not metrics:
            raise ValueError("objectives: is empty, needs at least one, for example [{metric: heldout_bits_per_byte}]")
        for place, metric in enumerate(metrics):
            if metric not in METRICS:
                raise ValueError(f"objectives.{place}.metric: got {metric!r}, needs one of {', '.join(METRICS)}")
            if metric in metrics[:place]:
                raise ValueError(f"objectives.{place}.metric: {metric} is there already; name each once")

    def _check_search(self) -> None:
        if self.searcher != "grid" and self.budget.trials is None:
            raise ValueError(f"budget.trials: is missing, and searcher={self.searcher} needs to know how many to draw")
        if self.searcher == "grid" and self.budget.trials is not None:
            raise ValueError(
                "budget.trials: was given, but searcher=grid runs every combination; leave one of them out"
            )
        if self.scheduler == "pbt":
            if self.searcher == "optuna":
                raise ValueError("scheduler: got pbt, which draws settings itself; choose searcher=random or grid")
            if self.seeds != 1:
                raise ValueError(
                    f"seeds: got {self.seeds}, but the members of a population share one seed and copy each other; "
                    "needs seeds=1 with scheduler=pbt"
                )
        if self.scheduler != "none" and self.budget.unit == "seconds":
            raise ValueError(
                f"budget.seconds: was given, but scheduler={self.scheduler} compares trials at the same share of their "
                "steps; needs budget.tokens or budget.flops"
            )
        if self.scheduler == "asha" and self.searcher == "optuna" and len(self.objectives) > 1:
            raise ValueError(
                "scheduler: got asha, which stops by one objective; several need scheduler=none with optuna"
            )

    @property
    def trials(self) -> int | None:
        """Trials in all; None as long as the grid has not been made."""
        return None if self.budget.trials is None else self.budget.trials * self.seeds


def load_sweep(file: str | Path, overrides: Sequence[str] = (), quick: bool = False) -> SweepConfig:
    """Read a sweep file, with its `quick` settings if wanted, and overrides of its keys or of its job's.

    Raises:
        ConfigError: what cannot be, and how to fix it.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{path}: no such sweep file; give the path of one, such as tuning/levels.yaml")
    given = read_yaml(path, "a sweep file")
    given.setdefault("name", path.stem)
    if quick:
        if not given.get("quick"):
            raise ConfigError(f"{path}: has no section `quick`, so --quick means nothing; leave it out")
        _apply(given, given["quick"])
    _apply(given, dict(map(parse_override, overrides)))
    return build_section(SweepConfig, given)


def _apply(given: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put changes where they belong: keys of the sweep into the sweep, all others into its job's overrides."""
    known = {each.name for each in fields(SweepConfig)}
    for key, value in changes.items():
        if key.partition(".")[0] in known:
            change(given, key, value)
        else:
            given.setdefault("overrides", {})[key] = value

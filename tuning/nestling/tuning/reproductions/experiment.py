"""What a reproduction consists of: arms that are measured with several seeds, and the numbers to set beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Outcome:
    """What one trial measured.

    Attributes:
        metrics: values by the names that the table has a row for; NaN where training diverged.
        chance: what guessing scores in a metric, in the same unit.
        tokens: tokens trained on.
        parameters: of the model.
        validation: what candidates are chosen by, higher is better; apart from what the metrics are measured on.
        details: more to draw or to look up: steps, seconds, curves.
    """

    metrics: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    parameters: int = 0
    validation: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Work(Protocol):
    """One trial's work, a frozen dataclass of plain values: it travels to another process and is written down."""

    def __call__(self, seed: int) -> Outcome:
        """Do it with this seed; the same outcome for the same seed."""


@dataclass(frozen=True)
class Arm:
    """A model on a task: one line of the table for each metric.

    Attributes:
        task: as the table calls it.
        model: as the table calls it.
        candidates: ways to do it by a label such as "rate 0.003". Of several, the first seed decides by `validation`,
            and only the best one goes on to the other seeds and into the table.
        metrics: names of the metrics that the table shows, in order; other ones that were measured are only kept.
        paper: the paper's number for a metric, in the same unit.
        units: of a metric, where they are not all the same; what has another unit has a panel of its own.
    """

    task: str
    model: str
    candidates: Mapping[str, Work]
    metrics: Sequence[str]
    paper: Mapping[str, float] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One outcome and where it came from; what `trials.jsonl` holds a line of.

    `seconds` are those that a core worked on it: on a busy machine they are fewer than those that passed.
    """

    task: str
    model: str
    candidate: str
    seed: int
    seconds: float
    outcome: Outcome


@dataclass(frozen=True)
class Experiment:
    """One reproduction.

    Attributes:
        name: as on the command line.
        title: what it shows, in a line.
        source: paper and table or equation.
        arms: in the order of the table.
        seeds: trials of each arm unless the person says otherwise.
        notes: what a reader of the table must know, a sentence or two each.
        draw: draws the table's trials, in the order of the arms, into a picture file; None: bars of its values.
        tabulate: the same trials as the Markdown that the page shows; None: a line for each arm and metric.
    """

    name: str
    title: str
    source: str
    arms: Sequence[Arm]
    seeds: int = 3
    notes: Sequence[str] = ()
    draw: Callable[[Sequence[Trial], str], None] | None = None
    tabulate: Callable[[Sequence[Trial]], str] | None = None

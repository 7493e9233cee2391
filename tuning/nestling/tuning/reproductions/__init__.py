"""Experiments of the papers at a size that runs in minutes: data and recipes, the engine that runs them, the table.

An experiment is a module with a function `experiment(full)`: the arms at the default size, or as the paper has them.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from nestling.tuning.reproductions.experiment import Arm, Experiment, Outcome, Trial, Work

__all__ = ["NAMES", "Arm", "Experiment", "Outcome", "Trial", "Work", "experiment"]

#: What `nestling reproduce` can do.
NAMES = (
    *("two-timescales", "formal-languages", "mqar", "mad", "optimizers", "ablation", "long-context"),
    *("five-domains", "split-digits"),
)


def experiment(name: str, full: bool = False) -> Experiment:
    """The experiment of this name: at its default size, or NAME-full with the paper's protocol. KeyError if unknown."""
    if name not in NAMES:
        raise KeyError(name)
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    made: Experiment = module.experiment(full)
    return replace(made, name=f"{name}-full") if full else made

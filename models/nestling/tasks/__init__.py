"""Synthetic tasks: what a sequence model can be shown to do or not to do, with exact rules and chance levels."""

from nestling.tasks.formal_languages import FormalLanguage
from nestling.tasks.mad import (
    MAD,
    Compression,
    FuzzyRecall,
    InContextRecall,
    MadTask,
    Memorisation,
    NoisyRecall,
    SelectiveCopying,
)
from nestling.tasks.mixture import Mixture
from nestling.tasks.mqar import Mqar
from nestling.tasks.pass_key import PassKey
from nestling.tasks.regression import OrthogonalTasks, stable_rule
from nestling.tasks.scores import scores
from nestling.tasks.task import IGNORE, Examples, Metric, Task, drawn, generator, padded

__all__ = [
    "IGNORE",
    "MAD",
    "Compression",
    "Examples",
    "FormalLanguage",
    "FuzzyRecall",
    "InContextRecall",
    "MadTask",
    "Memorisation",
    "Metric",
    "Mixture",
    "Mqar",
    "NoisyRecall",
    "OrthogonalTasks",
    "PassKey",
    "SelectiveCopying",
    "Task",
    "drawn",
    "generator",
    "padded",
    "scores",
    "stable_rule",
]

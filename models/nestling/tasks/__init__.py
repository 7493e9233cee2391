"""Synthetic tasks: what a sequence model can be shown to do or not to do, with exact rules and chance levels."""

from nestling.tasks.scores import scores
from nestling.tasks.task import IGNORE, Examples, Metric, Task, drawn, generator, padded

__all__ = ["IGNORE", "Examples", "Metric", "Task", "drawn", "generator", "padded", "scores"]

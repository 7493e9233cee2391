"""Optimizers of Nested Learning; so far `Levels`, which moves each group of parameters at its own frequency."""

from nestling.optim.components import COMPONENTS
from nestling.optim.levels import Levels

__all__ = ["COMPONENTS", "Levels"]

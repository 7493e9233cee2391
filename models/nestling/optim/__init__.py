"""Optimizers of Nested Learning, and `Levels`, where every group of parameters moves at its own frequency by one.

Each is a rule of `COMPONENTS`, which a level takes by its name and which a class of its own makes an ordinary torch
optimizer.
"""

from nestling.optim.components import COMPONENTS
from nestling.optim.delta import watch_inputs
from nestling.optim.ewc import EWC
from nestling.optim.levels import Levels
from nestling.optim.matrices import is_matrix, matrix_groups
from nestling.optim.optimizers import M3, DeepMomentum, DeltaGradientDescent, DeltaMomentum, Muon
from nestling.optim.orthogonal import newton_schulz

__all__ = [
    "COMPONENTS",
    "EWC",
    "M3",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "Levels",
    "Muon",
    "is_matrix",
    "matrix_groups",
    "newton_schulz",
    "watch_inputs",
]

"""The switches of the self-modifying update rule, and the two small functions that every backend shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.checks import check_choice, check_positive


def l2norm(z: Tensor, dim: int = -1) -> Tensor:
    """z / |z| over the axis `dim`; vectors shorter than 1e-6 are divided by 1e-6, which bounds the gradient at zero."""
    return F.normalize(z, dim=dim, eps=1e-6)


@dataclass(frozen=True)
class Rule:
    """How the memories of a self-modifying Titans layer are written and read; see `self_modifying_scan`."""

    chunk_size: int
    projection_chunk_size: int
    objective: str
    erase: str
    step_size: str
    read: str
    decay_to: str
    write: str
    #: Names of the memories that are written.
    adaptive: tuple[str, ...]

    def __post_init__(self) -> None:
        check_positive("chunk_size", self.chunk_size)
        check_positive("projection_chunk_size", self.projection_chunk_size)
        check_choice("objective", self.objective, ("l2", "dot"))
        check_choice("erase", self.erase, ("all", "first", "last", "none"))
        check_choice("step_size", self.step_size, ("proximal", "direct"))
        check_choice("read", self.read, ("before", "after", "boundary"))
        check_choice("decay_to", self.decay_to, ("zero", "initial"))
        check_choice("write", self.write, ("all", "last"))

    @property
    def erases_w1(self) -> bool:
        return self.erase in ("all", "last")

    @property
    def erases_w2(self) -> bool:
        return self.erase in ("all", "first")

    @property
    def erases_matrix(self) -> bool:
        """The one layer of a matrix memory is its first and its last."""
        return self.erase != "none"

    @property
    def writes_w2(self) -> bool:
        return self.write == "all"

    def chunk_of(self, name: str) -> int:
        """Tokens between two snapshots of the memory `name`."""
        return self.chunk_size if name == "memory" else self.projection_chunk_size

    def step(self, eta: Tensor, z: Tensor, dim: int = -1) -> Tensor:
        """A layer's step for its input z: eta / (1 + eta |z|^2) is the proximal step of Eq. 56-57 for any norm.

        z has its features along `dim`; eta has size 1 there, or not that axis at all.
        """
        if self.step_size == "direct":
            return eta
        return eta / (1 + eta * torch.sum(z * z, dim=dim, keepdim=eta.dim() == z.dim()))

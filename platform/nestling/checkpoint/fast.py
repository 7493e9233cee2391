"""What a run has read in context only: a fast state that is kept beside its weights, and belongs to exactly these.

It is one file, `fast.safetensors`, replaced as a whole; its header says what was read and with which weights. Weights
that have moved on make it worthless: who reads it compares their hash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nestling.checkpoint.alone import WeightsHash
from nestling.checkpoint.errors import CheckpointError
from nestling.checkpoint.pieces import write_tensors
from nestling.tracking import RunFolder

_ABOUT = "fast_state"


@dataclass(frozen=True)
class FastState:
    """A fast state and where it comes from.

    Attributes:
        tensors, numbers: the leaves of what is to be carried, of one row; see `nestling.models.fast_state`.
        documents: what was read, in its order: `document` (its name), `bytes` and `sha256` of its text.
        step, weights_sha256: the weights that it was read with.
    """

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, int]
    documents: list[dict[str, Any]]
    step: int
    weights_sha256: str

    @property
    def names(self) -> list[str]:
        """The names of the documents."""
        return [document["document"] for document in self.documents]

    def save(self, folder: RunFolder) -> Path:
        """Keep it with its run, in the place of an earlier one; returns the file."""
        about = {key: getattr(self, key) for key in ("numbers", "documents", "step", "weights_sha256")}
        path = _path(folder)
        draft = path.with_suffix(".tmp")
        entries = {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}
        write_tensors(draft, entries, self.tensors.values(), notes={_ABOUT: json.dumps(about)})
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        return draft.replace(path)

    @classmethod
    def load(cls, folder: RunFolder) -> FastState | None:
        """The run's fast state; None if it has none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = _path(folder)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return cls(tensors, **json.loads(file.metadata()[_ABOUT]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; nestling forget {folder.run_id} --fast removes it"
            ) from error


def forget_fast_state(folder: RunFolder) -> bool:
    """Remove the run's fast state; whether there was one."""
    path = _path(folder)
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def weights_sha256(model: nn.Module) -> str:
    """The hash of a model's weights, in float32 and by name."""
    weights = {name: weight.detach().to("cpu", torch.float32) for name, weight in sorted(model.named_parameters())}
    digest = WeightsHash()
    for _ in digest.through({name: weight.shape for name, weight in weights.items()}, weights.values()):
        pass
    return digest.hexdigest()


def _path(folder: RunFolder) -> Path:
    return folder.path / "fast.safetensors"

"""How right predictions are: by position, by class, and by whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.tasks.task import IGNORE


def scores(predictions: Tensor, targets: Tensor) -> dict[str, float]:
    """The three scores of predicted classes (N, T) against targets (N, T), each from 0 to 1; NaN if none is scored.

    - `accuracy`: share of the scored positions that are right.
    - `macro_accuracy`: the same for each class that is a target or a prediction somewhere, averaged over those classes
      (`MulticlassAccuracy` of torchmetrics, which MAD is scored by).
    - `sequence_accuracy`: share of the sequences in which every scored position is right.
    """
    scored = targets != IGNORE
    right = (predictions == targets) & scored
    return {
        "accuracy": (right.sum() / scored.sum()).item(),
        "macro_accuracy": _by_class(predictions[scored], targets[scored]),
        "sequence_accuracy": (right | ~scored)[scored.any(1)].all(1).double().mean().item(),
    }


def _by_class(predictions: Tensor, targets: Tensor) -> float:
    classes = torch.cat([predictions, targets]).unique()
    shares = [(predictions[targets == each] == each).double().mean() for each in classes]
    return torch.stack(shares).nan_to_num(0.0).mean().item() if shares else float("nan")

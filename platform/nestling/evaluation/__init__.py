"""What a model is worth: held-out loss beside the chance line, loss by position, and whether its memory is used."""

from nestling.evaluation.heldout import Report, heldout_report
from nestling.evaluation.run import evaluate

__all__ = ["Report", "evaluate", "heldout_report"]

"""AdamW, Muon and M3 at tuned rates on the same small model (arXiv:2512.24695, Section 9.7).

The paper trains vision transformers on ImageNet-21K and shows curves (Fig. 11), of which no number is known: M3 below
AdamW and Muon in training and test loss. Here it is a Transformer on embedded English, with the same batches for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nestling.tuning.reproductions.experiment import Arm, Experiment, Trial
from nestling.tuning.reproductions.figure import curves
from nestling.tuning.reproductions.recipe import Recipe
from nestling.tuning.reproductions.text import Text
from nestling.tuning.reproductions.training import Training

TASK = "embedded English"
#: What AdamW does for the embeddings, head and vectors beside an optimizer of matrices.
OTHER_RATE = 2e-3
ADAMW: Mapping[str, Any] = {"betas": (0.9, 0.98), "weight_decay": 0.1}
#: Name in the table, component, its settings, and the learning rates of which the first seed's validation chooses.
OPTIMIZERS: tuple[tuple[str, str, Mapping[str, Any], tuple[float, ...]], ...] = (
    ("AdamW", "adamw", ADAMW, (1e-3, 2e-3, 4e-3)),
    ("Muon", "muon", {"weight_decay": 0.1}, (4e-3, 8e-3, 1.6e-2)),
    # The second moment of the gradients makes the step 1 / |gradient|, so its rates are others.
    ("M3", "m3", {"weight_decay": 0.1}, (1e-6, 3e-6, 1e-5, 3e-5)),
    ("M3, second moment of the direction", "m3", {"weight_decay": 0.1, "mode": "adamuon"}, (5e-4, 1e-3, 2e-3)),
)


def experiment(full: bool) -> Experiment:
    """A Transformer of 0.5 million parameters on 0.6 million bytes; `full`: of 4 million on 16 million bytes."""
    width, layers, steps, batch = (256, 4, 4000, 16) if full else (128, 2, 600, 4)
    model = {"name": "transformer", "width": width, "layers": layers, "heads": width // 32}
    arms = []
    for name, component, settings, rates in OPTIMIZERS:
        other = None if component == "adamw" else OTHER_RATE
        recipe: dict[str, Any] = {
            "steps": steps,
            "batch": batch,
            "optimizer": component,
            "settings": settings,
            "other_rate": other,
        }
        candidates = {f"rate {rate:g}": Training(Text(), model, Recipe(learning_rate=rate, **recipe)) for rate in rates}
        arms.append(Arm(TASK, name, candidates, ("held-out",)))
    return Experiment(
        name="optimizers",
        title="AdamW, Muon and M3 on the same small Transformer",
        source="arXiv:2512.24695, Section 9.7 and Fig. 11 (curves without numbers: M3 below AdamW and Muon)",
        arms=arms,
        notes=(
            "Bits per byte of held-out text. The learning rate of each optimizer is chosen on validation text by the "
            "first seed; momenta and second moments are not tuned.",
            "The weight decay of 0.1 is times the learning rate: at M3's rates of 1e-6 to 3e-5 it is next to none.",
            f"Not tuned either: under Muon and M3 embeddings, head and vectors move by AdamW at {OTHER_RATE:g}, "
            "with betas of 0.9 and 0.95 under Muon and of 0.95 and 0.99 under M3; in the arm of AdamW everything has "
            "the chosen rate, and betas of 0.9 and 0.98.",
            "Matrices move by the optimizer named, embeddings, head and vectors by AdamW beside it. M3 of the paper "
            "divides by the root of the gradients' second moment; its variant takes that of the direction, which makes "
            "the step independent of the gradient's size.",
        ),
        draw=draw,
    )


def draw(trials: Sequence[Trial], path: str) -> None:
    """Training loss over the steps, the first seed of each optimizer's best rate."""
    best: dict[str, Trial] = {}
    for trial in trials:
        known = best.get(trial.model)
        better = known is None or (trial.outcome.validation or -1e9) > (known.outcome.validation or -1e9)
        if trial.seed == 0 and better:
            best[trial.model] = trial
    series = {name: _smoothed(trial.outcome.details["losses"]) for name, trial in best.items()}
    curves(series, path, ("step", "training loss (nats a byte)"), log=False)


def _smoothed(points: Sequence[tuple[int, float]], window: int = 8) -> list[tuple[float, float]]:
    """Means over the last points, so that single batches do not hide the trend."""
    losses = [loss for _, loss in points]
    return [
        (step, sum(losses[max(0, place + 1 - window) : place + 1]) / min(place + 1, window))
        for place, (step, _) in enumerate(points)
    ]

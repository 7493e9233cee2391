"""Multi-query associative recall: does the memory remember (arXiv:2312.04927; arXiv:2512.24695 has no table of it).

Key-value pairs, then queries at random places; in the re-assigned variant keys get a second value, and the latest one
counts. HOPE is also read with its writes switched off: then it must fall to what guessing scores.
"""

from __future__ import annotations

from typing import Any

from nestling.tasks.mqar import Mqar
from nestling.tuning.reproductions.experiment import Arm, Experiment
from nestling.tuning.reproductions.recipe import Recipe
from nestling.tuning.reproductions.sizes import Model, beside
from nestling.tuning.reproductions.training import Training

MODELS = ("hope", "hope_attention", "transformer", "delta_net", "mamba2", "titans")
#: Models that are asked the harder task too, if it is not the --full size.
FEWER = MODELS[:2]
#: Task and models of the --full size only.
REASSIGNED, MORE = "8 pairs, 4 assigned again, 64 tokens", ("linear_attention", "gated_delta_net")
#: Name in the table: the task, and easier tasks before it, each with its share of the steps. The plateau on which the
#: values are known and nothing is bound is short with two pairs and long with eight; and without blanks between the
#: queries a sequence is half as long and teaches as much. The longest trials come first, to leave no core idle at last.
TASKS: dict[str, tuple[Mqar, tuple[tuple[float, Mqar], ...]]] = {
    "16 pairs, 128 tokens": (
        Mqar(pairs=16, length=128, keys=64, values=64),
        (
            (0.25, Mqar(pairs=2, length=16, keys=64, values=64)),
            (0.1, Mqar(pairs=4, length=16, keys=64, values=64)),
            (0.1, Mqar(pairs=8, length=32, keys=64, values=64)),
            (0.35, Mqar(pairs=16, length=64, keys=64, values=64)),
        ),
    ),
    "8 pairs, 64 tokens": (
        Mqar(),
        ((0.15, Mqar(pairs=2, length=16)), (0.15, Mqar(pairs=4, length=16)), (0.4, Mqar(length=32))),
    ),
    REASSIGNED: (
        Mqar(updates=4),
        ((0.15, Mqar(pairs=2, length=16)), (0.15, Mqar(pairs=4, length=16)), (0.3, Mqar(length=32))),
    ),
}
#: All five memories modify themselves every 32 tokens, two to four times in a sequence. Hidden layers twice as wide as
#: a head tell twice as many keys apart.
HOPE: Model = {
    "name": "hope",
    "width": 64,
    "layers": 2,
    "heads": 2,
    "level_widths": [128],
    "chunk_size": 32,
    "memory_width": 64,
    "step_size": "direct",
    "eta_bias": 0.0,
    "alpha_bias": 10.0,
}
#: By pairs: the size of HOPE, steps at most, and sequences in a batch of the task itself.
SIZES: dict[int, tuple[Model, dict[str, Any]]] = {
    8: (HOPE, {"steps": 700, "batch": 32}),
    16: ({**HOPE, "width": 96, "heads": 3, "level_widths": [192]}, {"steps": 1000, "batch": 16}),
}
#: A stage with few tokens in its batch stays on the plateau, so short sequences come in larger batches.
RECIPE: dict[str, Any] = {
    **{"batch_tokens": 1536, "learning_rate": 5e-3},
    **{"check_every": 25, "stage_enough": 0.98, "enough": 0.996},
}
#: Learning rates of which the first seed's validation chooses, where that is not the recipe's own.
RATES = {"transformer": (1e-3, 2e-3)}


def experiment(full: bool) -> Experiment:
    """`full`: ten times the steps, also keys that are assigned again, and all models on all tasks."""
    arms = []
    for title, (task, _) in TASKS.items():
        if title == REASSIGNED and not full:
            continue
        for name in (*MODELS, *MORE) if full else MODELS if task.pairs == 8 else FEWER:
            metrics = ("test", "test, writes off") if name == "hope" else ("test",)
            arms.append(Arm(title, name, _candidates(title, name, full), metrics))
    return Experiment(
        name="mqar",
        title="Multi-query associative recall",
        source="arXiv:2312.04927; arXiv:2512.24695 has no table of it",
        arms=arms,
        seeds=2,
        notes=(
            "Queries answered right, in percent. Writes off: the trained model with the step sizes of its memories at "
            "zero. All models have as many parameters as HOPE, and the same easier tasks before.",
            "An easier stage ends early at 98 % of its validation queries, training at 99.6 %, so tokens "
            "differ. The learning rate is 5e-3, or (in brackets) the best of several by the first seed's validation. "
            "Hidden layers of HOPE's memories are twice as wide as a head, those of Titans' memory as wide.",
            "Two seeds are what fits into the time of the default; --seeds 3 takes half as long again.",
        ),
    )


def _candidates(title: str, name: str, full: bool) -> dict[str, Training]:
    task, easier = TASKS[title]
    hope, size = SIZES[task.pairs]
    model, steps = beside(name, hope, task.vocab_size), size["steps"] * (10 if full else 1)
    stages = tuple((round(share * steps), stage) for share, stage in easier)
    recipe = RECIPE | size | {"steps": steps}
    ways = {f"rate {rate:g}": recipe | {"learning_rate": rate} for rate in RATES.get(name, ())} or {"": recipe}
    return {
        label: Training(task, model, Recipe(**way), stages, writes_off=name == "hope") for label, way in ways.items()
    }

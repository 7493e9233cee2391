"""Formal languages: can a model track a state at lengths it was not trained on (arXiv:2512.24695, Table 5).

Trained on strings of 2 to 50 symbols, tested on the same lengths ("bin0") and on 51 to 100 ("bin1"); a string counts
only if every position is right. One recipe a language for HOPE, one for all languages for each baseline.
"""

from __future__ import annotations

from typing import Any

from nestling.tasks.formal_languages import FormalLanguage
from nestling.tuning.reproductions.experiment import Arm, Experiment
from nestling.tuning.reproductions.recipe import Recipe
from nestling.tuning.reproductions.sizes import Model, beside, registered
from nestling.tuning.reproductions.training import Training

LANGUAGES = ("parity", "(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n", "Shuffle-2")
BINS = ("bin0", "bin1")
_SOLVED = {language: (100.0, 100.0) for language in LANGUAGES}
#: arXiv:2512.24695, Table 5; Bin0 / Bin1 in percent. SRWM, which the table has as well, is not built here.
PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "hope": _SOLVED,
    "transformer": _SOLVED | {"parity": (46.4, 0.0), "(aa)*": (0.0, 0.0), "(abab)*": (0.0, 0.0)},
    "linear_attention": _SOLVED | {"parity": (78.1, 0.0), "(aa)*": (0.0, 0.0), "(abab)*": (0.0, 0.0)},
    "delta_net": _SOLVED | {"parity": (98.2, 10.1), "(aa)*": (0.0, 0.0), "(abab)*": (0.0, 0.0)},
    "lstm": _SOLVED,
}
#: State tracking needs eigenvalues below zero: direct steps of up to 2, and almost no forgetting.
HOPE: Model = {
    "name": "hope",
    "width": 32,
    "layers": 1,
    "heads": 2,
    "level_widths": [64],
    "step_size": "direct",
    "eta_max": 2.0,
    "alpha_bias": 14.0,
    "chunk_size": 16,
    "redraw_chunk_sizes": [3, 4, 6, 8, 11, 16, 23],
}
#: What HOPE does otherwise for a language: in its model, and in the recipe.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
#: The paper's data: 10,000 strings, gone through until all validation strings are right.
RECIPE: dict[str, Any] = {"steps": 1500, "batch": 32, "examples": 10_000, "learning_rate": 5e-3, "enough": 1.0}
RATES = {"transformer": 2e-3, "lstm": 1e-2}
EPOCHS = 300


def experiment(full: bool) -> Experiment:
    """`full`: up to 300 epochs, as in the paper's source; by default a few."""
    arms = []
    for language in LANGUAGES:
        for name in registered(PAPER):
            task = FormalLanguage(language)
            model, recipe = _recipe(name, language, task.vocab_size)
            if full:
                recipe |= {"steps": EPOCHS * -(-recipe["examples"] // recipe["batch"])}
            paper = dict(zip(BINS, PAPER[name][language], strict=True))
            arms.append(Arm(language, name, {"": Training(task, model, Recipe(**recipe))}, BINS, paper))
    return Experiment(
        name="formal-languages",
        title="Formal languages: states tracked beyond the trained length",
        source="arXiv:2512.24695, Table 5",
        arms=arms,
        notes=(
            "Strings of which every position is right, in percent: bin0 is as long as in training, bin1 up to twice as "
            "long. Baselines have as many parameters as HOPE.",
        ),
    )


def _recipe(name: str, language: str, vocab_size: int) -> tuple[Model, dict[str, Any]]:
    changes, recipe = CHANGES.get(language, ({}, {}))
    hope: Model = {**HOPE, **changes}
    if name == "hope":
        return hope, RECIPE | recipe
    return beside(name, hope, vocab_size), RECIPE | {"learning_rate": RATES.get(name, RECIPE["learning_rate"])}

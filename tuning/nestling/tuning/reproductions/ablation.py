"""What each part of HOPE is worth, at toy scale: the paper's ablation with bits per byte (arXiv:2512.24695, Table 6).

The paper's numbers are perplexities of models of 1.3 billion parameters, ours are bits per byte of 157,000:
they are beside each other for their order alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.tasks import Mixture
from nestling.tuning.reproductions.experiment import Arm, Experiment
from nestling.tuning.reproductions.recipe import Recipe
from nestling.tuning.reproductions.text import Text
from nestling.tuning.reproductions.training import Training

#: Every part in place, at the settings with which a HOPE of this size uses its memory: only the last layer of a memory
#: is written and erased, and it forgets towards its first state. Momentum wants smaller steps.
HOPE: Mapping[str, Any] = {
    "name": "hope",
    "width": 64,
    "layers": 2,
    "heads": 2,
    "level_widths": [96, 96],
    "static": [],
    "momentum": 0.9,
    "eta_bias": -6.0,
}
#: Steps between two moves of each level.
PERIODS = (1, 4)
#: Row of Table 6 or our own, what differs from `HOPE`, the levels' periods, and the paper's perplexity if it has one.
ROWS: tuple[tuple[str, Mapping[str, Any], tuple[int, ...], float | None], ...] = (
    ("HOPE", {}, PERIODS, 12.24),
    ("w/o DGD", {"erase": "none"}, PERIODS, 13.41),
    ("w/o momentum", {"momentum": 0.0, "eta_bias": -4.0}, PERIODS, 13.58),
    ("w/o weight decay", {"retention": False}, PERIODS, 13.71),
    ("w/o CMS (one MLP, every step)", {"level_widths": [192]}, (1,), 13.04),
    ("w/o inner projection k", {"static": ["key"]}, PERIODS, 13.77),
    ("w/o inner projection v", {"static": ["value"]}, PERIODS, 13.90),
    ("w/o inner projection q", {"static": ["query"]}, PERIODS, 12.19),
    ("w/o inner projection eta", {"static": ["eta"]}, PERIODS, None),
    ("w/o inner projection alpha", {"static": ["alpha"]}, PERIODS, None),
    ("matrix memories", {"memory": "matrix"}, PERIODS, None),
    ("forgetting towards zero", {"decay_to": "zero"}, PERIODS, None),
    ("both layers written and erased", {"write": "all", "erase": "all"}, PERIODS, None),
    ("the paper's formula", {"write": "all", "erase": "all", "decay_to": "zero", "alpha_bias": 4.0}, PERIODS, None),
)
PERPLEXITY = "perplexity (the paper's 1.3B)"


def experiment(full: bool) -> Experiment:
    """Half English, half Python: 0.18 million bytes; `full`: 8 million."""
    mixture = Mixture((("english", 0.5, _text("english")), ("python", 0.5, _text("python"))))
    recipe: dict[str, Any] = {"steps": 16_000 if full else 350, "batch": 2, "learning_rate": 5e-3}
    arms = []
    for name, changes, periods, perplexity in ROWS:
        work = Training(mixture, {**HOPE, **changes}, Recipe(periods=periods, **recipe))
        metrics: tuple[str, ...] = ("english/held-out", "python/held-out")
        paper = {} if perplexity is None else {PERPLEXITY: perplexity}
        units = dict.fromkeys(metrics, "bits per byte, lower is better") | {PERPLEXITY: "perplexity, lower is better"}
        arms.append(Arm("language modelling", name, {"": work}, (*metrics, *paper), paper, units))
    return Experiment(
        name="ablation",
        title="What each part of HOPE is worth",
        source="arXiv:2512.24695, Table 6",
        arms=arms,
        notes=(
            "Ours: bits per byte of held-out text, lower is better. The paper's column is the mean perplexity of its "
            "1.3B models: compare the order, not the values.",
            "HOPE is not the paper's formula, which has a row of its own: only the last layer of a memory is written "
            "and erased (so w/o DGD changes one layer), and memories forget towards their first state. Momentum goes "
            "with a bias of the step size of -6, its absence with -4.",
            "All rows have the same learning rate, 5e-3, which is tuned for none of them.",
            "Without CMS, one MLP as wide as the levels together moves at every step, so that the parameters stay.",
        ),
    )


def _text(domain: str) -> Text:
    return Text(domain, test_bytes=32768)

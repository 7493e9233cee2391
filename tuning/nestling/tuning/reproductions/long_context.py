"""Beyond the trained length: loss by position in long text, and pass-keys to be found in 512 to 8192 bytes.

The paper's needle tests (arXiv:2512.24695, Table 1) are read by models of 760 million parameters and more, in tokens of
a vocabulary of 32,000; its S-NIAH-1 is the pass-key. Here small byte models are trained on 512 bytes at most and read
up to 8192. Half of the batches are text, half are pass-keys, first short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nestling.tasks import Mixture, PassKey
from nestling.tuning.reproductions.experiment import Arm, Experiment, Outcome, Trial
from nestling.tuning.reproductions.recipe import Recipe
from nestling.tuning.reproductions.sizes import Model, beside
from nestling.tuning.reproductions.text import SEPARATOR, Text, text_bytes
from nestling.tuning.reproductions.training import STRETCHES, Training

MODELS = ("hope", "transformer", "hope_attention", "gated_delta_net", "titans")
LENGTHS = (512, 1024, 2048, 4096, 8192)
#: arXiv:2512.24695, Table 1, S-NIAH-1 at 4K and 8K tokens.
PAPER = {
    "hope": {4096: 100.0, 8192: 100.0},
    "transformer": {4096: 88.6, 8192: 76.4},
    "hope_attention": {4096: 100.0, 8192: 100.0},
    "titans": {4096: 100.0, 8192: 100.0},
}
HOPE: Model = {"name": "hope", "width": 64, "layers": 2, "heads": 2, "chunk_size": 64, "level_widths": [128]}
#: Learning rates of which the first seed's validation, the loss on text, chooses. Titans diverges at 5e-3.
RATES: dict[str, tuple[float, ...]] = {
    "hope": (5e-3,),
    "transformer": (1e-3, 3e-3),
    "hope_attention": (2e-3, 5e-3),
    "gated_delta_net": (2e-3, 5e-3),
    "titans": (1e-3, 2e-3),
}


@dataclass(frozen=True)
class LongContext:
    """A model trained on short sequences of `domain` and read on long ones: a `Work`.

    Attributes:
        domain: the text, and what pass-keys are hidden in.
        model: as `Training` takes it.
        recipe: its batches hold `recipe.batch` sequences of 128 bytes in the first half of the steps, then of 512.
        lengths: bytes of the pass-key tests; the loss by position is of the longest.
        trials: pass-keys for each length and depth.
        depths: where the key stands.
    """

    domain: str
    model: Model
    recipe: Recipe
    lengths: tuple[int, ...] = LENGTHS
    trials: int = 10
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)

    def __call__(self, seed: int) -> Outcome:
        longest, half = max(self.lengths), self.recipe.steps // 2
        training = Training(self._mixture(512), self.model, self.recipe, stages=((half, self._mixture(128)),))
        outcome = training(seed)
        metrics = {f"bits per byte, {longest} bytes": outcome.metrics["text/held-out"]}
        for length in self.lengths:
            tests = [f"pass-key/{PassKey.test_name(length, depth)}" for depth in self.depths]
            metrics[f"pass-key, {length} bytes"] = _mean([outcome.metrics[test] for test in tests])
            digits = [outcome.details["scores"].get(test, {}).get("accuracy", float("nan")) for test in tests]
            metrics[f"digits, {length} bytes"] = 100 * _mean(digits)
        chance = {name: 10.0 if name.startswith("digits") else 1e-3 for name in metrics}
        chance[next(iter(metrics))] = outcome.chance["text/held-out"]
        return Outcome(metrics, chance, outcome.tokens, outcome.parameters, outcome.validation, outcome.details)

    def _mixture(self, length: int) -> Mixture:
        longest = max(self.lengths)
        filler = text_bytes(self.domain, "train")
        keys = PassKey(filler, self.lengths, self.depths, self.trials, train_length=length)
        text = Text(self.domain, length, test_length=longest, test_bytes=4 * longest)
        return Mixture((("text", 0.5, text), ("pass-key", 0.5, keys)))


def experiment(full: bool) -> Experiment:
    """Width 64 and 1.8 million bytes; `full`: width 128, 20 million bytes, more trials."""
    hope = {**HOPE, "width": 128, "heads": 4, "level_widths": [256]} if full else HOPE
    arms = []
    for name in MODELS:
        model, rates = beside(name, hope, SEPARATOR + 1), RATES[name]
        works = {}
        for rate in rates:
            recipe = Recipe(steps=4000 if full else 700, batch=16 if full else 8, learning_rate=rate)
            label = f"rate {rate:g}" if len(rates) > 1 else ""
            works[label] = LongContext("english", model, recipe, trials=20 if full else 10)
        arms.append(Arm("English, and pass-keys in it", name, works, _metrics(), _paper(name)))
    return Experiment(
        name="long-context",
        title="Beyond the trained length: loss by position and pass-keys",
        source="arXiv:2512.24695, Section 9.2 and Table 1 (S-NIAH-1 at 4K and 8K tokens, models of 760M parameters)",
        arms=arms,
        seeds=2,
        notes=(
            "Trained on at most 512 bytes at a time. Pass-key: all five digits right, in percent, over three depths; "
            "digits: each by itself, with the right ones before it.",
            "The learning rate of a baseline (in brackets) is the better of two by the first seed's loss on text; that "
            "of HOPE, 5e-3, is not tuned.",
            "The paper's models are a thousand times as large and trained on sequences of 4K tokens and more.",
            "Two seeds are what fits into the time of the default; --seeds 3 takes half as long again.",
        ),
        draw=draw,
    )


def _metrics() -> list[str]:
    keys = [f"{kind}, {length} bytes" for kind in ("pass-key", "digits") for length in LENGTHS]
    return [f"bits per byte, {max(LENGTHS)} bytes", *keys]


def _paper(name: str) -> dict[str, float]:
    return {f"pass-key, {length} bytes": value for length, value in PAPER.get(name, {}).items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def draw(trials: Sequence[Trial], path: str) -> None:
    """Left the loss by position of the longest text, right the digits that are found; the first seed of each model."""
    from nestling.tuning.reproductions.figure import COLOURS, canvas, style

    first = [trial for trial in trials if trial.seed == 0]
    with canvas(path, (10, 4)) as figure:
        left, right = figure.subplots(1, 2)
        for place, trial in enumerate(first):
            colour, metrics = COLOURS[place % len(COLOURS)], trial.outcome.metrics
            bits = trial.outcome.details["scores"].get("text/held-out", {}).get("by_position", [])
            keys = [key for key in metrics if key.startswith("digits")]
            lengths = [int(key.split()[1]) for key in keys]
            stretch = max(lengths) / STRETCHES
            left.plot([(n + 0.5) * stretch for n in range(len(bits))], bits, color=colour, marker="o", markersize=3)
            right.plot(lengths, [metrics[key] for key in keys], color=colour, marker="o", label=trial.model)
        right.axhline(10, color="#7a8190", linestyle="--", label="chance")
        right.set_xscale("log", base=2)
        left.set(xlabel="position (bytes)", ylabel="held-out bits per byte")
        right.set(xlabel="bytes of the text", ylabel="digits of the pass-key (%)", ylim=(0, 105))
        right.legend(frameon=False, fontsize=8)
        for axes in (left, right):
            style(axes)

"""What is learnt and what is kept of five kinds of text, one after another: HOPE's levels, replay, consolidation.

No paper has these numbers. Every arm reads the same bytes in the same order with as many parameters, so that arms are
compared seed by seed. The learning rate is an axis here: whoever moves slowly forgets little, and learns little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nestling.data.streams.five_domains import ORDER, SHUFFLED
from nestling.evaluation import retention
from nestling.tuning.reproductions import frontier
from nestling.tuning.reproductions.experiment import Arm, Experiment, Trial
from nestling.tuning.reproductions.sizes import Model, beside
from nestling.tuning.reproductions.stream import FINAL, FORGETTING, LEARN, METRICS, PREQUENTIAL, Stream

TASK = "five domains"
#: Metrics whose differences from the Transformer are shown.
COMPARED = (LEARN, FORGETTING, FINAL, PREQUENTIAL)
TRANSFORMER, ONE, SEVERAL = "Transformer", "HOPE, one frequency", "HOPE, several frequencies"
HOPE: Model = {"name": "hope", "width": 64, "layers": 2, "heads": 2, "level_widths": [64, 64, 64]}
#: Steps between two moves of each level.
PERIODS: Mapping[str, tuple[int, ...]] = {ONE: (1, 1, 1), SEVERAL: (1, 4, 16)}


def _levels(periods: Sequence[int], *more: str) -> str:
    """The levels of `HOPE` with these periods, and more of them, as an override."""
    levels = zip(HOPE["level_widths"], periods, strict=True)
    written = [*(f"{{width: {width}, period: {period}}}" for width, period in levels), *more]
    return f"levels=[{', '.join(written)}]"


#: Base learning rates, and the shares of them at which a family is measured: its frontier.
RATES = {TRANSFORMER: 8e-3, ONE: 8e-3, SEVERAL: 8e-3}
FACTORS, MORE_FACTORS = (0.25, 0.5, 1.0, 2.0), (0.0625, 0.125, 4.0)
#: What else an arm may do, by what the table calls it. The levels that move while reading do so in the probes alone.
REPLAY, MUCH_REPLAY, EWC = "5 % replay", "100 % replay", "EWC"
SLOWED, PRETRAINED = "all but the levels every 4 steps", "pretrained on all"
MOVING, FROZEN, JOINT = "levels moving while reading", "frozen after english", "joint (shuffled)"
CHANGES: Mapping[str, tuple[str, ...]] = {
    SLOWED: (_levels(PERIODS[SEVERAL], "{name: rest, parameters: ['*'], period: 4}"),),
    PRETRAINED: (),
    REPLAY: ("stream.replay_share=0.05",),
    MUCH_REPLAY: ("stream.replay_share=1.0", f"stream.replay_bytes={1 << 22}"),
    EWC: ("stream.ewc_strength=1e4", "stream.ewc_every=50", "stream.ewc_decay=0.9"),
    MOVING: (
        "continuum.drive=stream",
        "continuum.periods=[16, 64, 256]",
        "continuum.rates=[1.0, 1.0, 1.0]",
    ),
    FROZEN: (),
    JOINT: (f"data.source={SHUFFLED}",),
}
NOTES = (
    "Every arm has the same number of parameters within 1 % and reads the same bytes once, in the same order, in "
    "batches of 1,024. The seed decides which records of a domain are read and in which order, the first weights, and "
    "what is replayed. Probes: 8 kB of each domain, never trained on, read before the first domain and after each.",
    "Losses in bits per byte. With L[i, j] the loss on domain j after i domains: just learnt, the mean of L[j, j]; "
    "forgetting, of L[5, j] minus the lowest L[l, j] for l >= j, over the first four; BWT, of L[j, j] - L[5, j] over "
    "them; lost share, of (L[5, j] - lowest) / (L[0, j] - lowest); final mean and worst domain, of L[5, j]; "
    "prequential, of every byte before it is learnt from. Intransigence: L[5, 5] minus that of the family's joint run, "
    "in which no domain leaves; of earlier domains it would need joint runs of their own.",
    "The base rate is 8e-3 for all: of 2e-3, 4e-3 and 8e-3 the one with the lowest prequential loss of seed 0, for the "
    "Transformer and for HOPE. Twice that rate lowers this loss once more, by about 0.05, and on average raises just "
    "learnt, forgetting and final mean. One frequency has the best of three rates by the same loss, so compare it with "
    "several frequencies at the same rate. Nothing else was tuned; the strength of EWC (1e4, every 50 steps) is the "
    "first that was tried.",
    "5 % replay: one sequence of the past to twenty new ones. 100 % replay: one to one, so it computes twice as much. "
    "They draw from a uniform sample of the past: of 131 kB of text in 1 MiB, and of 524 kB in 4 MiB.",
    "All but the levels every 4 steps: embedding, memories and head move as seldom as the second of three levels, so "
    "that only the first level stays fast. Pretrained on all: as many bytes of every domain again, other records, are "
    "learnt in mixed order before the stream begins; everything was known before, and twice as much is read.",
    "Levels moving while reading: the probes are read with levels that take a step on what they have just read, every "
    "16, 64 and 256 tokens, from the trained weights in each sequence of 256; training is the naive one. Reading costs "
    "three times as much. The Transformer has no levels; whether gradient steps while reading would help it as much "
    "was not measured, so this arm belongs beside HOPE alone.",
    "Frozen after english: the weights stay as they are after the first domain, so nothing is forgotten by "
    "construction, and a new domain is met only by what memories (and levels, where they move) make of the sequence so "
    "far. Just learnt is then the loss on domains of which four were never learnt.",
)


def experiment(full: bool) -> Experiment:
    """40 kB of each domain, three seeds; `full`: 300 kB, five seeds and more rates."""
    size, factors = (300_000, sorted((*FACTORS, *MORE_FACTORS))) if full else (40_000, FACTORS)
    frontiers = [_arm(family, size, (factor,)) for family in (TRANSFORMER, SEVERAL) for factor in factors]
    arms = [_arm(ONE, size, (0.5, 1.0, 2.0)), _arm(ONE, size, (1.0,), REPLAY), _arm(TRANSFORMER, size, (0.25,), REPLAY)]
    arms += [
        _arm(family, size, (1.0,), change)
        for family in (TRANSFORMER, SEVERAL)
        for change in (REPLAY, MUCH_REPLAY, EWC, JOINT)
    ]
    together = ((MUCH_REPLAY, EWC), (SLOWED,), (PRETRAINED,), (MOVING,), (FROZEN,), (FROZEN, MOVING))
    arms += [_arm(SEVERAL, size, (1.0,), *changes) for changes in together]
    arms += [_arm(TRANSFORMER, size, (1.0,), PRETRAINED)]
    return Experiment(
        name="five-domains",
        title="Five domains, one after another: what is learnt and what is kept",
        source="No paper's experiment: embedded:five-domains (english, unicode, cxx, js, python)",
        arms=[*frontiers, *arms],
        seeds=5 if full else 3,
        notes=NOTES,
        draw=draw,
        tabulate=tabulate,
    )


def _arm(family: str, size: int, factors: Sequence[float], *changes: str) -> Arm:
    """A family's job at shares of its base rate, of several of which the first seed chooses, with changes."""
    overrides = (*_family(family), *(override for change in changes for override in CHANGES[change]))
    learnt = 1 if FROZEN in changes else len(ORDER)
    works = {
        f"rate {factor * RATES[family]:g}": Stream(
            (*overrides, f"training.learning_rate={factor * RATES[family]:g}"),
            size,
            learnt,
            size if PRETRAINED in changes else 0,
        )
        for factor in factors
    }
    unknown = {LEARN, FORGETTING} if JOINT in changes else set()
    if FROZEN in changes or PRETRAINED in changes:
        unknown = {PREQUENTIAL}
    metrics = [metric for metric in COMPARED if metric not in unknown]
    name = _name(family, factors[0] if len(factors) == 1 else 1.0, *changes)
    return Arm(TASK, name, works, metrics, units=dict.fromkeys(metrics, "bits per byte, lower is better"))


def _name(family: str, factor: float, *changes: str) -> str:
    return ", ".join((family, *([] if factor == 1 else [f"rate x {factor:g}"]), *changes))


def _family(family: str) -> tuple[str, ...]:
    """The model and its levels as overrides; all have the parameters of `HOPE`, by construction."""
    if family == TRANSFORMER:
        matched = beside("transformer", HOPE, vocab_size=257)
        return tuple(f"model.{key}={matched[key]}" for key in ("name", "width", "mlp_width"))
    return (_levels(PERIODS[family]),)


def tabulate(trials: Sequence[Trial]) -> str:
    """Every metric of every arm, by what arms differ from the Transformer at the same seed, and two whole matrices."""
    values = {metric: frontier.by_arm(trials, metric) for metric in METRICS}
    compared = {metric: frontier.differences(values[metric], TRANSFORMER) for metric in COMPARED}
    whole = [text for arm in (TRANSFORMER, SEVERAL) if (text := frontier.matrix(trials, arm, ORDER))]
    return "\n\n".join(
        (
            frontier.table(values | {"intransigence": _intransigence(trials)}),
            "Mean over the seeds ± half of its 95 % interval (Student's t). " + _best_rates(values[PREQUENTIAL]),
            f"Minus the {TRANSFORMER}, seed by seed:",
            frontier.table(compared),
            *whole,
        )
    )


def _intransigence(trials: Sequence[Trial]) -> dict[str, dict[int, float]]:
    """Just-learnt loss on the last domain minus that of the family's joint run, by arm and seed."""
    last = {(trial.model, trial.seed): trial.outcome.details["losses"][-1][-1] for trial in trials}
    found: dict[str, dict[int, float]] = {}
    for (arm, seed), loss in last.items():
        family = next(family for family in RATES if arm.startswith(family))
        joint = last.get((_name(family, 1, JOINT), seed))
        if joint is not None and JOINT not in arm and PRETRAINED not in arm:
            found.setdefault(arm, {})[seed] = retention.intransigence([[-loss]], [-joint])
    return found


def _best_rates(prequential: Mapping[str, Mapping[int, float]]) -> str:
    """Of each frontier, the rate that the first seed would choose."""
    best = []
    for lines in _lines().values():
        firsts = {arm: prequential[arm][0] for arm in lines if 0 in prequential.get(arm, {})}
        best += [min(firsts, key=firsts.__getitem__)] if firsts else []
    return f"Lowest prequential loss of seed 0 among the rates of a family: {'; '.join(best)}."


def _lines() -> dict[str, list[str]]:
    """The arms of each frontier, slowest first."""
    factors = sorted((*FACTORS, *MORE_FACTORS))
    return {f"{family}, by rate": [_name(family, factor) for factor in factors] for family in (TRANSFORMER, SEVERAL)}


def draw(trials: Sequence[Trial], path: str) -> None:
    """The frontier of each family over its rates, and every other arm as a point."""
    frontier.draw(trials, path, (FORGETTING, LEARN), _lines())

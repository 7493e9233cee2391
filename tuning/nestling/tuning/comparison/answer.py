"""What a comparison says in words: who is best, by how much, and whether the seeds allow to say so."""

from __future__ import annotations

from collections.abc import Sequence

from nestling.tuning.comparison.arms import Arm, Metric
from nestling.tuning.comparison.statistics import Difference, Verdict, pareto_front, verdict
from nestling.tuning.comparison.table import mean_text


def answer(arms: Sequence[Arm], metrics: Sequence[Metric], default: str | None = None) -> tuple[str | None, str]:
    """The arm with the best mean of the first metric, and sentences about it.

    Arms of which a run did not finish, or has not got the metric, are not compared: over the seeds that are left they
    would look better, or worse, than they are.

    Args:
        arms: what was tried.
        metrics: what it is judged by; with several of them the Pareto front is told as well.
        default: label of the arm that a person would have taken without trying.
    """
    whole = [arm for arm in arms if _whole(arm, metrics)]
    if not whole:
        return None, f"No arm finished with every seed and its {metrics[0].label}, so there is nothing to choose from."
    metric = metrics[0]
    found = verdict({arm.label: arm.values(metric.name) for arm in whole}, metric.mode)
    best = next(arm for arm in whole if arm.label == found.best)
    left_out = len(arms) - len(whole)
    sentences = [
        _judged(found, best, metric),
        *([_against(found, default, metric)] if default in list(found.against)[1:] else []),
        *([_front(whole, metrics)] if len(metrics) > 1 else []),
        *([f"{left_out} of {len(arms)} arms did not finish with every seed and are not judged."] if left_out else []),
    ]
    return found.best, " ".join(sentences)


def _whole(arm: Arm, metrics: Sequence[Metric]) -> bool:
    return arm.finished and all(len(arm.values(metric.name)) == len(arm.runs) for metric in metrics)


def _judged(found: Verdict, best: Arm, metric: Metric) -> str:
    measured = best.interval(metric.name)
    assert measured is not None
    at = f"{mean_text(*measured)} ({metric.label}{', one seed' if measured[1] is None else ''})"
    if not found.against:
        return f"{found.best}: {at}. There is no other arm to compare it with."
    runner_up, difference = next(iter(found.against.items()))
    if found.wins:
        return f"{found.best} is best: {at}, {_difference(difference)} against the next best, {runner_up}."
    if difference is None or difference.half is None:
        return (
            f"{found.best} has the best mean, {at}, {_difference(difference)} against the next best, {runner_up}; "
            "without an interval over several seeds nothing tells it apart."
        )
    return (
        f"{found.best} has the best mean, {at}, but the seeds do not tell it apart from {_listed(found.unclear)}: "
        f"{_difference(difference)} against the next best, {runner_up}."
    )


def _against(found: Verdict, default: str | None, metric: Metric) -> str:
    assert default is not None
    difference = found.against[default]
    apart = difference is not None and difference.excludes_zero
    return f"Against the default, {default}, it is {_difference(difference)}" + (
        "." if apart else ", which the seeds do not tell apart."
    )


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "with no seed in common"
    text = f"{'+' * (difference.mean > 0)}{mean_text(difference.mean, difference.half)}"
    if difference.half is None:
        return f"{text} in the one seed that both have"
    return f"{text} (paired over {difference.seeds} seeds)"


def _front(arms: Sequence[Arm], metrics: Sequence[Metric]) -> str:
    points = {arm.label: [found[0] for metric in metrics if (found := arm.interval(metric.name))] for arm in arms}
    front = pareto_front(points, [metric.mode for metric in metrics])
    named = _listed([metric.label for metric in metrics])
    return f"No arm is better than these in all of {named} (Pareto front): {_listed(front, 8)}."


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = list(names[:most]) + [f"{len(names) - most} more"] * (len(names) > most)
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"

"""What is kept and what is lost: the metrics of continual learning, each under the name of its definition.

`scores[i][j]` is the score on domain j after learning domain i, higher is better; `losses[i][j]` the loss, lower is
better, with `losses[0]` before anything was learnt. Rows and columns are in the order in which domains were learnt.
Two papers call different things "backward transfer", so every function says whose it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]


def average_score(scores: Matrix) -> float:
    """ACC: the mean over all domains after the last (Lopez-Paz and Ranzato 2017, arXiv:1706.08840)."""
    return fmean(scores[-1])


def worst_score(scores: Matrix) -> float:
    """The score of the domain that fares worst after the last."""
    return min(scores[-1])


def backward_transfer(scores: Matrix) -> float:
    """BWT of GEM: change of each earlier domain since it was just learnt; below 0 is forgetting (arXiv:1706.08840)."""
    last = _several(scores) - 1
    return fmean(scores[last][j] - scores[j][j] for j in range(last))


def forward_transfer(scores: Matrix, untrained: Sequence[float]) -> float:
    """FWT of GEM: score on a domain before it is learnt, over that of the untrained model (arXiv:1706.08840)."""
    return fmean(scores[j - 1][j] - untrained[j] for j in range(1, _several(scores)))


def forgetting(scores: Matrix) -> float:
    """F: each earlier domain's best score before the last row, minus its last (Chaudhry et al. 2018, arXiv:1801.10112).

    As there, the maximum is over earlier rows only, so it is at least minus the backward transfer.
    """
    last = _several(scores) - 1
    return fmean(max(scores[row][j] for row in range(last)) - scores[last][j] for j in range(last))


def intransigence(scores: Matrix, joint: Sequence[float]) -> float:
    """I: what a model trained jointly on the domains so far scores over the just-learnt score, mean over domains.

    Args:
        joint: for each domain, the score of a model trained on it and all before it at once (arXiv:1801.10112).
    """
    return fmean(best - scores[j][j] for j, best in enumerate(joint))


def learning_curve_area(curves: Matrix) -> float:
    """LCA: mean score over the first batches of each domain (A-GEM, Chaudhry et al. 2019, arXiv:1812.00420).

    Args:
        curves: for each domain the scores on it before its first batch, after one, after two, ...
    """
    return fmean(fmean(column) for column in zip(*curves, strict=True))


def accuracy_diaz(scores: Matrix) -> float:
    """A of Diaz-Rodriguez et al. 2018: mean of the lower triangle with the diagonal (arXiv:1810.13166)."""
    return fmean(scores[i][j] for i in range(len(scores)) for j in range(i + 1))


def backward_transfer_diaz(scores: Matrix) -> float:
    """BWT of Diaz-Rodriguez et al. 2018: mean change over all later rows, not only the last (arXiv:1810.13166)."""
    return fmean(scores[i][j] - scores[j][j] for i in range(1, _several(scores)) for j in range(i))


def remembering_diaz(scores: Matrix) -> float:
    """REM: 1 - |min(BWT, 0)| with the backward transfer of the same paper (arXiv:1810.13166)."""
    return 1 - abs(min(backward_transfer_diaz(scores), 0.0))


def minimum_score(curves: Mapping[int, Sequence[float]]) -> float:
    """min-ACC: mean of the lowest score of each earlier domain after it was learnt (De Lange et al. 2023,
    arXiv:2205.13452).

    Args:
        curves: for each earlier domain its scores at every evaluation after it was learnt.
    """
    return fmean(min(curve) for curve in curves.values())


def worst_case_score(present: float, curves: Mapping[int, Sequence[float]]) -> float:
    """WC-ACC: (1/k) of the present domain's score and (1 - 1/k) of min-ACC (arXiv:2205.13452)."""
    k = len(curves) + 1
    return present / k + (1 - 1 / k) * minimum_score(curves)


def windowed_drop(scores: Sequence[float], window: int) -> float:
    """WF: the largest fall of a score within any `window` evaluations in a row (arXiv:2205.13452)."""
    return _largest(scores, window)


def windowed_rise(scores: Sequence[float], window: int) -> float:
    """WP: the largest rise within any `window` evaluations in a row (arXiv:2205.13452)."""
    return _largest([-score for score in scores], window)


def plasticity(losses: Matrix) -> float:
    """Mean loss of each domain just after it was learnt: the other half of every claim about forgetting."""
    return fmean(losses[j + 1][j] for j in range(len(losses) - 1))


def backward_transfer_loss(losses: Matrix) -> float:
    """BWT in losses: just-learnt loss minus last one, mean over all but the last domain; below 0 is forgetting."""
    count = _several(losses[1:])
    return fmean(losses[j + 1][j] - losses[-1][j] for j in range(count - 1))


def forgetting_loss(losses: Matrix) -> float:
    """F in losses: last loss minus the lowest since the domain was learnt, mean over all but the last domain."""
    count = _several(losses[1:])
    return fmean(losses[-1][j] - min(row[j] for row in losses[j + 1 :]) for j in range(count - 1))


def normalised_forgetting(losses: Matrix) -> float:
    """NF: the share of what was learnt that is lost again, (last - lowest) / (untrained - lowest), mean over all but
    the last domain; says little where little was learnt."""
    shares = []
    for j in range(_several(losses[1:]) - 1):
        lowest = min(row[j] for row in losses)
        if lowest == losses[0][j]:
            raise ValueError(f"nothing was learnt of domain {j}: its lowest loss is the untrained one")
        shares.append((losses[-1][j] - lowest) / (losses[0][j] - lowest))
    return fmean(shares)


def stability_gap(losses: Mapping[str, Sequence[float]]) -> float:
    """The largest rise of a domain's loss over its lowest so far, at any evaluation, mean over domains.

    Free of boundaries: what evaluation at the ends of domains does not show (arXiv:2205.13452).
    """
    return fmean(max(loss - low for loss, low in zip(curve, _lowest(curve), strict=True)) for curve in losses.values())


def lost_since_best(losses: Mapping[str, Sequence[float]]) -> float:
    """Forgetting without boundaries: last loss minus the lowest so far, mean over domains."""
    return fmean(curve[-1] - min(curve) for curve in losses.values())


def _several(matrix: Matrix) -> int:
    if len(matrix) < 2:
        raise ValueError(f"got {len(matrix)} domain(s) learnt, needs at least 2: the first has nothing before it")
    return len(matrix)


def _largest(values: Sequence[float], window: int) -> float:
    """The largest fall from one value to a later one in the same window."""
    if window < 2:
        raise ValueError(f"window: got {window}, needs at least 2 evaluations")
    pairs = ((i, j) for i in range(len(values)) for j in range(i + 1, min(i + window, len(values))))
    return max((values[i] - values[j] for i, j in pairs), default=0.0)


def _lowest(values: Sequence[float]) -> list[float]:
    low, lows = float("inf"), []
    for value in values:
        low = min(low, value)
        lows.append(low)
    return lows

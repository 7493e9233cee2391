"""Where a stream stands in its source, as metrics: position and lag of each partition, or of all if they are many.

MLflow keeps a curve for every name it was ever given, so a source of thousands of files has sums and the worst only.
"""

from __future__ import annotations

from collections.abc import Mapping

from nestling.evaluation.prequential import metric_name

#: Partitions up to which each has metrics of its own.
PARTITIONS = 16
#: Characters of a partition's name, its last ones, in that of a metric.
_LONGEST = 200


def whereabouts(offsets: Mapping[str, int], lag: Mapping[str, int]) -> dict[str, float]:
    """Metrics by name.

    Args:
        offsets: where each partition goes on, in the source's units.
        lag: how far each reaches beyond that.
    """
    figures = {
        "stream/position_total": float(sum(offsets.values())),
        "stream/lag_total": float(sum(lag.values())),
        "stream/lag_worst": float(max(lag.values(), default=0)),
    }
    for kind, values in (("position", offsets), ("lag", lag)):
        if len(values) <= PARTITIONS:
            figures |= {f"stream/{kind}/{metric_name(name)[-_LONGEST:]}": float(n) for name, n in values.items()}
    return figures

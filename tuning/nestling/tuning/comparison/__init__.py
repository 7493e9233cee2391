"""Runs beside each other: what differs in their configurations, what they measured, and what it took.

`gather` reads runs, `arms` puts those together that differ in the seed alone, `statistics` says what can be told,
`answer` says it in words; `table`, `charts` and `page` show it. `comparison` is the way from runs to all of it, `sweep`
that from a sweep's folder.
"""

from nestling.tuning.comparison.comparison import Comparison, compare
from nestling.tuning.comparison.gather import ComparisonError
from nestling.tuning.comparison.sweep import SweepReport, sweep_report

__all__ = ["Comparison", "ComparisonError", "SweepReport", "compare", "sweep_report"]

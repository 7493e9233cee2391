"""Where a run is written down: its folder on disk and its page in MLflow.

`runs` makes, lists and finds run folders; `tracker` starts, feeds and finishes the MLflow run; `figures` draws the
curves. MLflow and matplotlib take seconds to import, so they are imported where they are used: a verb that only lists
runs starts at once.
"""

from nestling.tracking.client import TrackingError, resolve_uri
from nestling.tracking.runs import RunFolder, find_run, list_runs
from nestling.tracking.tracker import TrackedRun, Tracker, finish, start

__all__ = [
    "RunFolder",
    "TrackedRun",
    "Tracker",
    "TrackingError",
    "find_run",
    "finish",
    "list_runs",
    "resolve_uri",
    "start",
]

"""Where a run is written down: its folder on disk and its page in MLflow.

`runs` makes, lists and finds run folders; `lifecycle` starts and finishes the MLflow run, `tracker` feeds it through an
`outbox` on disk, from which a `courier` takes everything to MLflow; `follow` watches a run; `figures` draws the curves.
MLflow and matplotlib take seconds to import, so they are imported where they are used: a verb that only lists
runs starts at once.
"""

from nestling.tracking.client import TrackingError, resolve_uri
from nestling.tracking.follow import followed
from nestling.tracking.lifecycle import TrackedRun, deliver, finish, start
from nestling.tracking.runs import RunBusyError, RunFolder, find_run, list_runs
from nestling.tracking.tracker import Tracker

__all__ = [
    "RunBusyError",
    "RunFolder",
    "TrackedRun",
    "Tracker",
    "TrackingError",
    "deliver",
    "find_run",
    "finish",
    "followed",
    "list_runs",
    "resolve_uri",
    "start",
]

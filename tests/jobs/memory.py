"""What the processes of a run hold in memory, and how fast that grows.

Measured is PSS: pages that processes share count once. The pages of Ray's object store are told apart from the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import psutil

MB = 1024.0  # of the kilobytes in which Linux counts
#: The project's own processes by what their command lines hold; all others are Ray's.
OURS = {"worker": "RayTrainWorker", "reader": "ReadWindows"}
_FIGURE = re.compile(r"^Pss_(Anon|File|Shmem): +(\d+) kB$", re.MULTILINE)


@dataclass
class Memory:
    """Samples of one run's memory.

    Attributes:
        seconds: when each sample was taken.
        held: MB at each time, of `driver`, `worker`, `reader`, `ray` (everything that Ray runs beside them) and
            `store` (the resident pages of the object store).
    """

    seconds: list[float] = field(default_factory=list)
    held: dict[str, list[float]] = field(default_factory=dict)

    def sample(self, now: float, driver: psutil.Process) -> None:
        """Take the memory of a driver and of all that descends from it."""
        groups = dict.fromkeys(("driver", *OURS, "ray", "store"), 0.0)
        for process in (driver, *driver.children(recursive=True)):
            try:
                line = " ".join(process.cmdline())
                with open(f"/proc/{process.pid}/smaps_rollup") as file:
                    pages = {kind: int(size) / MB for kind, size in _FIGURE.findall(file.read())}
            except (psutil.Error, OSError):
                continue  # it has just ended
            named = next((name for name, part in OURS.items() if part in line), "ray")
            groups["driver" if process == driver else named] += pages.get("Anon", 0.0) + pages.get("File", 0.0)
            groups["store"] += pages.get("Shmem", 0.0)
        self.seconds.append(now)
        for name, size in groups.items():
            self.held.setdefault(name, []).append(size)

    def slopes(self, after: float) -> dict[str, float]:
        """MB a minute of each group, and of `all`, over the samples from `after` on: the line of least squares."""
        first = next(place for place, seconds in enumerate(self.seconds) if seconds >= after)
        minutes = np.array(self.seconds[first:]) / 60
        groups = self.held | {"all": np.sum(list(self.held.values()), axis=0)}
        return {name: float(np.polyfit(minutes, sizes[first:], 1)[0]) for name, sizes in groups.items()}

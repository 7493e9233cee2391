"""A source that is far faster than the training: what is read ahead and what is held in memory stay bounded.

Ray's processes take four minutes to warm up, and longer where the machine is slow; how they grow is measured by
`make soak`. Half a minute tells whether the run's own processes leak what they read and learn.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from tests.jobs.memory import OURS, Memory
from tests.jobs.streams import begin, readers, verified

WARM_UP, SECONDS = 20.0, 50.0
#: MB a minute of the driver, the worker and the reader, and of the object store.
GROWTH, STORE = 80.0, 1.0
#: Records of a window, and windows ahead.
RECORDS, AHEAD = 80, 2
JOB = [
    *(f"stream.window_bytes={100 * RECORDS}", f"stream.windows_ahead={AHEAD}", "training.checkpoint_every=50"),
    *("training.log_every=10", "stream.probe_every=100"),
]
SOURCE = """
import os
import random
from pathlib import Path

seen = os.open(Path(__file__).parent / f"read-{os.getpid()}", os.O_CREAT | os.O_WRONLY)


def at(offset):
    os.pwrite(seen, b"%020d" % (offset + 1), 0)  # how many records this process has read
    return {"text": f"{random.Random(offset).getrandbits(320):0100}"}
"""

pytestmark = pytest.mark.slow


def test_memory_and_what_is_read_ahead_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_endless.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    runs = tmp_path / "runs"
    runs.mkdir()
    run = begin(runs, "python:my_endless:at", *JOB, steps=None)
    folder = run.reaches(2)
    memory, driver, ahead = Memory(), psutil.Process(run.process.pid), []
    began, due = time.monotonic(), 0.0
    while (now := time.monotonic() - began) < SECONDS:
        if now >= due:
            memory.sample(now, driver)
            due = now + 1
        ahead += read_ahead(folder, tmp_path / f"read-{readers(run)[0].pid}")
        time.sleep(0.05)
    run.process.send_signal(signal.SIGTERM)
    code, summary, said = run.ended()
    assert (code, summary["status"]) == (130, "interrupted"), said
    assert len(ahead) > 100 and max(ahead) == (AHEAD + 1) * RECORDS  # those of the present window count
    slopes = memory.slopes(WARM_UP)
    assert sum(slopes[name] for name in ("driver", *OURS)) < GROWTH and slopes["store"] < STORE, slopes
    verified(runs, folder)


def read_ahead(folder: Path, read: Path) -> list[int]:
    """How many records were read beyond the windows that were learnt; nothing if one has ended meanwhile."""
    before, count, after = learnt(folder), int(read.read_text()), learnt(folder)
    return [count - before * RECORDS] if before == after else []


def learnt(folder: Path) -> int:
    windows: int = json.loads((folder / "position.json").read_text())["window"]
    return windows

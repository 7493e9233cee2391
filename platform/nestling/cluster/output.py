"""Ray and DeepSpeed print a lot, from Python, from C++ and from child processes; here it goes to a file.

The standard output and error of the whole process are turned at the level of file descriptors, which is the only place
that catches all of them; what a person should see is written to the handle that is given back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def redirected(log: Path) -> Iterator[TextIO]:
    """Append standard output and error to `log`; yields the real standard error. Both are put back at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in enumerate(saved, start=1):
            os.dup2(original, descriptor)
            os.close(original)
        terminal.close()

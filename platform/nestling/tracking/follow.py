"""Passing on what a run writes while it is written: records of its log and events, as they appear.

The log is replaced by a shorter one when a run is resumed from a checkpoint. The old file stays open here, so the place
to go on from is where the two begin to differ.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nestling.tracking.runs import RunFolder

OnRecord = Callable[[dict[str, float]], None]
OnEvent = Callable[[dict[str, Any]], None]

_INTERVAL = 0.2  # seconds between two looks


@contextmanager
def followed(folder: RunFolder, on_record: OnRecord | None = None, on_event: OnEvent | None = None) -> Iterator[None]:
    """While the block runs, call back in another thread with each record of `log.jsonl` and each event that is new.

    What is there at the beginning is not passed on; what is there at the end is, before the block is left.
    """
    with ExitStack() as open_files:
        tails: list[tuple[_Tail, Callable[[dict[str, Any]], None]]] = []
        for path, callback in ((folder.events, on_event), (folder.log, on_record)):
            if callback is not None:
                tails.append((_Tail(path), callback))
                open_files.callback(tails[-1][0].close)
        done = threading.Event()

        def follow() -> None:
            ended = False
            while not ended:
                ended = done.wait(_INTERVAL)
                for tail, callback in tails:
                    for line in tail.new_lines():
                        callback(json.loads(line))

        thread = threading.Thread(target=follow, name="nestling-followed", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class _Tail:
    """The whole lines that are new in a file of lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        self._file: BinaryIO = path.open("rb")
        for _ in self.new_lines():
            pass

    def new_lines(self) -> Iterator[bytes]:
        if os.fstat(self._file.fileno()).st_ino != self._path.stat().st_ino:
            yield from self._lines()  # of the old file, which nobody appends to any more
            self._go_over()
        yield from self._lines()

    def close(self) -> None:
        self._file.close()

    def _lines(self) -> Iterator[bytes]:
        while (line := self._file.readline()).endswith(b"\n"):
            yield line
        self._file.seek(-len(line), os.SEEK_CUR)  # half a line: again when it is whole

    def _go_over(self) -> None:
        """Take the new file, from behind what it has in common with what was passed on of the old one."""
        passed = self._file.tell()
        new = self._path.open("rb")
        self._file.seek(0)
        common = 0
        for old_line, new_line in zip(self._file, new, strict=False):
            if old_line != new_line or common + len(old_line) > passed:
                break
            common += len(old_line)
        new.seek(common)
        self._file.close()
        self._file = new

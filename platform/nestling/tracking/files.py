"""Files that survive being killed at any moment, and locks that a killed process lets go.

What a reader must never see half is replaced as a whole; what grows line by line is cut back to its last whole line
when it is taken up again. Locks are `flock`s: the kernel releases them with the process that held them.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_RETRY = 0.1  # seconds between two attempts at a lock


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as the whole of `path`; a reader finds the old content or the new one."""
    draft_json(path, content).replace(path)


def draft_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write `content` safely onto the disk beside `path`, to replace it at the right moment."""
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    return draft


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file that `replace_json` wrote; empty where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def append_whole(file: BinaryIO, data: bytes) -> None:
    """Append to an unbuffered file wholly or not at all: a disk that fills up takes a part and refuses the rest.

    Raises:
        OSError: the file is as it was.
    """
    size, rest = os.fstat(file.fileno()).st_size, data
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def cut_half_line(path: Path) -> None:
    """Cut off the half line that a killed process left at the end of a file of lines."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            begin = max(0, end - 65536)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


class Locked(RuntimeError):
    """Another living process holds the lock; the message names it."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        super().__init__(f"process {about.get('pid', '?')} on {about.get('host', '?')}")


@contextmanager
def locked(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock of a file, waiting for it at most `patience` seconds.

    Raises:
        Locked: somebody else still has it.
    """
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + patience
        while not _take(descriptor):
            if time.monotonic() >= end:
                raise Locked(read_json(path))
            time.sleep(_RETRY)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of the file.

    Looking takes the lock for a moment, so `locked` should never be used without patience.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

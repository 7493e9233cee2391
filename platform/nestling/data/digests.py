"""SHA-256 of local files, remembered in the cache folder, so that a large source is not read twice just to find it.

An entry holds as long as the file's size and modification time do. The file of entries is replaced as a whole: of two
processes that write at once one may lose entries, which costs a second reading and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from nestling.data.errors import DataError

#: A file changed this short a time ago may change again and keep its time stamp; it is not remembered.
SETTLED_SECONDS = 2.0


def digest(path: str) -> str:
    """SHA-256 of a local file, in hexadecimal; raises DataError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


class Digests:
    """`digest` with a memory in `folder`; call `save` when done."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "digests.json"
        self._known = self._read()
        self._new: dict[str, list] = {}

    def __call__(self, path: str) -> str:
        """SHA-256 of a local file, read only if its size or time changed; raises DataError if it cannot be read."""
        try:
            state = os.stat(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        *stamp, known = self._known.get(path, [None])
        if stamp == [state.st_size, state.st_mtime_ns]:
            return known
        found = digest(path)
        if time.time() - state.st_mtime > SETTLED_SECONDS:
            self._new[path] = [state.st_size, state.st_mtime_ns, found]
        return found

    def save(self) -> None:
        """Add what is new to the file; a folder that cannot be written to is left as it is."""
        if not self._new:
            return
        entries = json.dumps(self._read() | self._new)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, prefix=".digests-", delete=False) as draft:
                draft.write(entries)
            os.chmod(draft.name, 0o644)  # a runs folder may be shared
            os.replace(draft.name, self._path)
        self._known |= self._new

    def _read(self) -> dict[str, list]:
        try:
            return dict(json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError):
            return {}

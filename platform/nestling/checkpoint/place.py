"""The folder or bucket that holds the checkpoints of a run, behind the few operations that they need.

Local folders and pyarrow's file systems (S3, GCS, HDFS, Azure) are read through the same calls. They differ where a
checkpoint is committed: a folder can be renamed and synced, an object store only takes whole objects.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from nestling.checkpoint.errors import CheckpointError
from nestling.tracking.client import shown

CHUNK = 8 * 2**20
"""Bytes that one request reads from or writes to a remote place."""


class Place:
    """Where checkpoints lie; paths are relative to it.

    Args:
        place: a local folder, or a URI of a pyarrow file system; a URI may carry credentials.
        scratch: a local folder for what is on its way to or from a remote place.

    Attributes:
        folder: the folder of a local place; None for a remote one.
        address: path or URI without credentials and options, for messages and records.

    Raises:
        CheckpointError: the URI cannot be used.
    """

    def __init__(self, place: str | Path, scratch: Path | None) -> None:
        text = str(place)
        self._scratch = scratch
        if "://" in text:
            self._files, self._root = _connect(text)
        else:
            self._files, self._root = LocalFileSystem(), str(Path(text).expanduser().resolve())
        self.folder = Path(self._root) if isinstance(self._files, LocalFileSystem) else None
        parts = urlsplit(text)
        remote = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self.address = self._root if self.folder else remote

    @property
    def workspace(self) -> Path:
        """The local folder in which files are written first: a local place itself, else the scratch folder."""
        folder = self.folder or self._scratch
        if folder is None:
            raise CheckpointError(f"{self.address} is remote: name a local scratch folder to save or open there")
        return folder

    def folders(self, path: str = "") -> list[str]:
        """Names of the folders in one; none if it does not exist."""
        return [info.base_name for info in self._list(path) if info.type == FileType.Directory]

    def files(self, path: str) -> list[str]:
        """Names of the files in a folder; none if it does not exist."""
        return [info.base_name for info in self._list(path) if info.type == FileType.File]

    def _list(self, path: str) -> list[FileInfo]:
        return self._files.get_file_info(FileSelector(self._at(path), allow_not_found=True))

    def read(self, path: str) -> bytes:
        """The content of a small file."""
        with self._files.open_input_stream(self._at(path), compression=None) as stream:
            return stream.read()

    def digest(self, path: str, copy: BinaryIO | None = None) -> tuple[int, str]:
        """Bytes and SHA-256 of a file, read once; `copy` gets its content."""
        digest, size = hashlib.sha256(), 0
        with self._files.open_input_stream(self._at(path), compression=None, buffer_size=CHUNK) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if copy:
                    copy.write(chunk)
        return size, digest.hexdigest()

    def write(self, path: str, data: bytes) -> None:
        """Put a small file that survives a loss of power; its folder must exist in a local place."""
        if self.folder:
            with (self.folder / path).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        else:
            with self._files.open_output_stream(self._at(path), compression=None) as stream:
                stream.write(data)

    def upload(self, source: Path, path: str) -> None:
        """Copy a local file to a remote place."""
        with source.open("rb") as file, self._files.open_output_stream(self._at(path), compression=None) as stream:
            shutil.copyfileobj(file, stream, CHUNK)

    def remove_file(self, path: str) -> None:
        """Delete one file."""
        self._files.delete_file(self._at(path))

    def remove(self, path: str) -> None:
        """Delete a folder such that a kill in between leaves nothing that looks like a checkpoint."""
        if self.folder:
            doomed = self.folder / f".removed-{secrets.token_hex(4)}"
            (self.folder / path).rename(doomed)
            sync(self.folder)
            shutil.rmtree(doomed)
            return
        with suppress(FileNotFoundError):  # another process is removing it too
            if MANIFEST in self.files(path):
                self.remove_file(f"{path}/{MANIFEST}")
            self._files.delete_dir(self._at(path))

    def move(self, path: str, target: str) -> None:
        """Move a folder; a kill in between leaves all of it where it was."""
        if self.folder:
            there = self.folder / target
            there.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).rename(there)
            sync(there.parent)
            sync(self.folder)
            return
        for info in self._files.get_file_info(FileSelector(self._at(path), recursive=True)):
            if info.type == FileType.File:
                self._files.copy_file(info.path, self._at(target) + info.path.removeprefix(self._at(path)))
        self.remove(path)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


MANIFEST = "manifest.json"
"""The file that makes a folder a checkpoint."""


def sync(path: Path) -> None:
    """Wait until a local file or folder is on its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _connect(uri: str) -> tuple[FileSystem, str]:
    try:
        files, root = FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        scheme, _, rest = uri.partition("://")
        # pyarrow repeats the URI, and its own parse fails just where a password hides from `shown` (a bare slash in it)
        reason = shown(str(error).splitlines()[0].replace(uri, f"{scheme}://***@{rest.rpartition('@')[2]}"))
        raise CheckpointError(
            f"checkpoints cannot be kept there: {reason}; name a local folder or a URI of pyarrow.fs.FileSystem "
            "(special characters of a key written as %2F and so on)"
        ) from None
    return files, root.rstrip("/")


def below(place: str, name: str) -> str:
    """A folder in a folder or URI, whose options stay behind it."""
    path, mark, options = place.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{options}"

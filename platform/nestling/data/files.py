"""Which files a path, a folder, a glob or a URI means, on any filesystem that pyarrow knows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from nestling.data.errors import DataError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Place:
    """Where a source lies."""

    filesystem: fs.FileSystem
    #: Path on the filesystem: a file, or the folder in which to look.
    root: str
    #: For a glob: what a path must match.
    pattern: re.Pattern[str] | None = None
    #: The glob as the person wrote it.
    glob: str = ""

    def __str__(self) -> str:
        return self.root if self.pattern is None else f"{self.root} (what matches {self.glob})"

    @property
    def local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def check(self) -> None:
        """Raises DataError if there is no file and no folder; asks for nothing else."""
        if self._info(self.root).type == fs.FileType.NotFound:
            raise DataError(f"{self.root} does not exist")

    def files(self) -> list[fs.FileInfo]:
        """The files in the order of their paths, those with a leading dot in a name below the root left out.

        Raises:
            DataError: nothing there, or it cannot be listed.
        """
        info = self._info(self.root)
        if info.is_file and self.pattern is None:
            return [info]
        try:
            found = [info for info in self._below() if self.pattern is None or self.pattern.fullmatch(info.path)]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.root} cannot be listed: {error}") from error
        below = {tuple(info.path.removeprefix(self.root).strip("/").split("/")): info for info in found}
        return [below[names] for names in sorted(below) if not any(name.startswith(".") for name in names)]

    def _below(self) -> list[fs.FileInfo]:
        if self.local:  # rglob does not follow links to folders, which may go round in circles
            return self.filesystem.get_file_info([str(p) for p in Path(self.root).rglob("*") if p.is_file()])
        infos = self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=True))
        return [info for info in infos if info.is_file]

    def _info(self, path: str) -> fs.FileInfo:
        try:
            return self.filesystem.get_file_info(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be reached: {error}") from error


def is_uri(spec: str) -> bool:
    """Whether a source is a URI such as `s3://bucket/texts`, and not a path."""
    return _URI.match(spec) is not None


def find(spec: str) -> Place:
    """What a path, glob or URI means; a path with the characters of a glob that exists is that path.

    Raises:
        DataError: a URI that pyarrow cannot open.
    """
    local = not is_uri(spec)
    body, mark, query = (str(Path(spec).expanduser().absolute()), "", "") if local else spec.partition("?")
    glob = (_GLOB if local else re.compile(r"[*\[]")).search(body)
    if glob is None or (local and Path(body).exists()):
        return Place(*_open(body + mark + query, local))
    base = body[: glob.start()].rpartition("/")[0]
    filesystem, root = _open((base or "/") + mark + query, local)
    return Place(filesystem, root, _pattern(root.rstrip("/") + body[len(base) :]), spec)


def _open(spec: str, local: bool) -> tuple[fs.FileSystem, str]:
    if local:
        return fs.LocalFileSystem(), spec
    try:
        return fs.FileSystem.from_uri(spec)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{spec} cannot be opened: {error}; give a path or a URI such as file:///texts or "
            "s3://bucket/texts?endpoint_override=HOST:PORT&scheme=http"
        ) from error


def _pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression: `**` crosses folders; a folder that matches stands for all files below it."""
    return re.compile(re.sub(r"\*\*/|\*\*|\*|\?|\[[!^]?[^\]]+\]|.", _translated, glob) + "(?:/.*)?")


def _translated(match: re.Match[str]) -> str:
    word = match.group()
    if len(word) > 1 and word[0] == "[":
        return re.sub(r"^\[!", "[^", re.sub(r"([\\&~|]|(?<=.)\[)", r"\\\1", word))
    return {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(word) or re.escape(word)

"""A source string becomes a Ray Dataset of documents, in a fixed order.

`embedded:<domain>` reads a corpus of `nestling.data.embedded`; anything else is a file, a folder (read recursively), a
glob or a URI. What a file is goes by its name: `.jsonl`, `.ndjson` and `.parquet` hold a document a row, in a column;
any other file is text; `.gz`, `.bz2`, `.zst` and the like are unpacked. What cannot be read becomes a row with an error
and not an exception in a Ray task: whoever reads the rows decides, and the person sees one line, not Ray's traceback.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.data import readers
from nestling.data.digests import digest
from nestling.data.embedded import DOMAINS, Domain
from nestling.data.errors import DataError
from nestling.data.files import Place, find, is_uri
from nestling.data.readers import Document, Shard

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo
    from ray.data import Dataset

#: A Parquet file is read in slices of about so many bytes (whole row groups), each a task of its own.
SLICE = 64 << 20
_EMBEDDED = "embedded:"
_SOURCES = "a text, JSONL or Parquet file, a folder, a glob, a URI or embedded:<domain>"


@dataclass(frozen=True)
class Source:
    """Where documents come from."""

    #: As the person wrote it, and how they call it: the key of messages.
    spec: str
    key: str
    #: What can be read independently, in order.
    shards: list[Shard]
    #: The documents of a shard.
    read: Callable[[Shard], Iterator[Document]]
    #: What the content is known by: labels, each with a local file that is part of it, or none.
    contents: Sequence[tuple[str, str | None]] = field(repr=False)

    def fingerprint(self, digest: Callable[[str], str] = digest) -> str:
        """SHA-256 over how and what is read: the bytes of local files wherever they lie; path, size and time of others.

        Args:
            digest: SHA-256 of a local file.
        """
        marks = [[label, path and digest(path)] for label, path in self.contents]
        return hashlib.sha256(repr(marks).encode()).hexdigest()

    def dataset(self) -> Dataset:
        """Documents as rows of `text`, `replaced`, `place` (see `Document`) and `error`: empty, or why a shard ended.

        Needs a running Ray.
        """
        import ray.data

        # A few blocks a CPU: enough to keep all busy, and starting a task costs more than reading a small file.
        blocks = min(len(self.shards), 4 * max(1, int(ray.cluster_resources().get("CPU", 1))))
        rows = ray.data.from_items([shard._asdict() for shard in self.shards], override_num_blocks=blocks)
        rows.context.execution_options.preserve_order = True
        rows.context.enable_progress_bars = False
        rows.context.target_max_block_size = 16 << 20
        return rows.flat_map(partial(_rows, read=self.read))


def open_source(spec: str, column: str = "text", key: str = "data.source") -> Source:
    """Find what a source string means.

    Args:
        spec: what the person wrote.
        column: column of JSONL and Parquet files that holds the text.
        key: what messages call the source.

    Raises:
        DataError: unknown domain, missing path, or nothing but empty files.
    """
    domain = _domain(spec, key)
    if domain is not None:
        files = [(part, part if Path(part).is_file() else None) for part in domain.parts()]
        contents = [("" if file else part, file) for part, file in files]
        shards = [Shard(part) for part, _ in files]
        return Source(spec, key, shards, partial(_embedded, domain=domain), [(spec, None), *contents])
    place = _place(spec, key)
    try:
        infos = place.files()
    except DataError as error:
        raise DataError(f"{key}: {error}; give {_SOURCES}") from error
    if not any(file.size for file in infos):
        what = f"its {len(infos)} files are all empty" if infos else "it holds no files"
        raise DataError(f"{key}: no text in {place}: {what}; give a source with text in it")
    read = partial(readers.read, filesystem=place.filesystem, column=column)
    contents = [_content(place, file, column) for file in infos]
    return Source(spec, key, [shard for file in infos for shard in _shards(file)], read, contents)


def check_source(spec: str, key: str = "data.source") -> None:
    """The checks of `open_source`, but of what a URI means only that it is there: no remote folder is listed."""
    if is_uri(spec):
        _place(spec, key)
    else:
        open_source(spec, key=key)


def absolute(spec: str) -> str:
    """The source string that means the same in any folder."""
    return spec if spec.startswith((_EMBEDDED, "python:")) or is_uri(spec) else str(Path(spec).expanduser().absolute())


def _domain(spec: str, key: str) -> Domain | None:
    if not spec.startswith(_EMBEDDED):
        return None
    name = spec.removeprefix(_EMBEDDED)
    if name.startswith("five-domains"):
        raise DataError(f"{key}: {spec} is a stream: nestling stream JOB, and not nestling train")
    if name not in DOMAINS:
        near = "".join(f", did you mean {word!r}?" for word in difflib.get_close_matches(name, DOMAINS, n=1))
        raise DataError(f"{key}: there is no embedded domain {name!r}{near}; there are {', '.join(DOMAINS)}")
    return DOMAINS[name]


def _place(spec: str, key: str) -> Place:
    if not spec.strip():
        raise DataError(f"{key}: got an empty text, needs {_SOURCES}")
    try:
        place = find(spec)
        place.check()
    except DataError as error:
        fix = f"did you mean {_EMBEDDED}{spec}?" if spec in DOMAINS else f"give {_SOURCES}"
        raise DataError(f"{key}: {error}; {fix}") from error
    return place


def _shards(file: FileInfo) -> list[Shard]:
    slices = -(-file.size // SLICE) if readers.form(file.path) == "parquet" else 1
    return [Shard(file.path, number, slices) for number in range(slices)]


def _content(place: Place, file: FileInfo, column: str) -> tuple[str, str | None]:
    form = readers.form(file.path)
    how = form if form.startswith("text") else f"{form} {column}"
    if place.local:
        return how, file.path
    return f"{how} {place.filesystem.type_name} {file.path} {file.size} {file.mtime_ns}", None


def _embedded(shard: Shard, domain: Domain) -> Iterator[Document]:
    for _, text in domain.read(shard.path):
        yield Document(text)


def _rows(row: dict[str, Any], read: Callable[[Shard], Iterator[Document]]) -> Iterator[dict[str, Any]]:
    shard = Shard(**row)
    try:
        for document in read(shard):
            yield {"text": document.text, "replaced": document.replaced, "place": document.place, "error": ""}
    except DataError as error:
        yield {"text": "", "replaced": 0, "place": "", "error": str(error)}
    except OSError as error:
        yield {"text": "", "replaced": 0, "place": "", "error": f"{shard.path}: cannot be read: {error}"}

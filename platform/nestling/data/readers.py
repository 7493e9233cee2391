"""One file to documents: text, JSONL or Parquet, on any filesystem, packed or not.

Whatever the format, a document is text: bytes that are not UTF-8 become U+FFFD, each of them, and are counted, and
documents without text are passed on as empty ones, so that they can be counted too. What is not text at all (a NUL
byte, broken JSON, a column that is not there) is a DataError that names the file and the place in it.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from nestling.data.errors import DataError

#: A text file is cut at the first blank line after so many characters, ...
SHORTEST_DOCUMENT = 4096
#: ... at the last line's end before so many if there is none, and right there if it has no lines.
LONGEST_DOCUMENT = 16384
_WINDOW = 1 << 20
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
#: What stands for an undecodable byte (`surrogateescape`), or half a character in JSON: never part of real text.
_UNDECODABLE = re.compile("[\ud800-\udfff]")
_PACKED = {".gz", ".bz2", ".zst", ".lz4", ".br"}


class Shard(NamedTuple):
    """What is read in one go: a file, one of several slices of its row groups, or a label of an embedded domain."""

    path: str
    slice: int = 0
    slices: int = 1


@dataclass(frozen=True)
class Document:
    """A text and what had to be done to it."""

    text: str
    #: Bytes that are not UTF-8 and became U+FFFD.
    replaced: int = 0
    #: File and place of the first of them.
    place: str = ""

    @classmethod
    def decoded(cls, escaped: str, place: Callable[[int], str]) -> Document:
        """From a text decoded with `surrogateescape`; `place` says where its n-th character comes from."""
        first = _UNDECODABLE.search(escaped)
        if first is None:
            return cls(escaped)
        text, replaced = _UNDECODABLE.subn("\ufffd", escaped)
        return cls(text, replaced, place(first.start()))


def form(path: str) -> str:
    """How a file is read, by its name: `text`, `jsonl` or `parquet`, with `.gz` and the like if it is packed."""
    *_, before, last = "", "", *(suffix.lower() for suffix in PurePosixPath(path).suffixes)
    packed, suffix = (last, before) if last in _PACKED else ("", last)
    if suffix == ".parquet" and not packed:
        return "parquet"
    return ("jsonl" if suffix in (".jsonl", ".ndjson") else "text") + packed


def read(shard: Shard, filesystem: fs.FileSystem, column: str) -> Iterator[Document]:
    """The documents of a file; raises DataError where it cannot be read on, naming file and place."""
    try:
        if form(shard.path) == "parquet":
            with filesystem.open_input_file(shard.path) as file:
                yield from _parquet(file, shard, column)
            return
        with filesystem.open_input_stream(shard.path, compression="detect") as file:
            yield from _jsonl(file, shard.path, column) if "jsonl" in form(shard.path) else _text(file, shard.path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shard.path}: cannot be read: {' '.join(str(error).split())}") from error


def _text(file: IO[bytes], path: str) -> Iterator[Document]:
    """Cut a text file into documents of about 4 to 16 KB; an empty file is one empty document."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, offset, empty = "", 0, True
    for raw in chain(iter(partial(file.read, _WINDOW), b""), [b""]):
        window = decoder.decode(raw, final=not raw)
        if "\0" in window:
            raise DataError(f"{path}: holds a NUL byte; the file looks binary, take it out of the source")
        text += window
        if offset == 0 and text.startswith("\ufeff"):
            text, offset = text[1:], len(codecs.BOM_UTF8)
        start = 0
        while len(text) - start > (LONGEST_DOCUMENT if raw else 0):
            end = _cut(text, start)
            yield Document.decoded(text[start:end], partial(_byte, path, offset, text[start:end]))
            start, offset, empty = end, offset + _size(text[start:end]), False
        text = text[start:]
    if empty:
        yield Document("")


def _byte(path: str, offset: int, text: str, place: int) -> str:
    return f"{path}: byte {offset + _size(text[:place])}"


def _size(escaped: str) -> int:
    return len(escaped.encode("utf-8", "surrogateescape"))


def _cut(text: str, start: int) -> int:
    near, far = start + SHORTEST_DOCUMENT, start + LONGEST_DOCUMENT
    if blank := _BLANK_LINE.search(text, near, far):
        return blank.end()
    if len(text) <= far:
        return len(text)
    return text.rfind("\n", near, far) + 1 or far


def _jsonl(file: IO[bytes], path: str, column: str) -> Iterator[Document]:
    """A document a line; blank lines are none, and null is an empty text."""
    offset = 0
    for number, raw in enumerate(io.BufferedReader(file, _WINDOW), 1):  # type: ignore[type-var]
        line = raw.decode("utf-8", "surrogateescape")
        if line.strip():
            value = _value(line.removeprefix("\ufeff"), f"{path}: line {number}", column)
            yield Document.decoded(value, partial(_byte_of_line, path, offset, number, line))
        offset += len(raw)


def _byte_of_line(path: str, offset: int, number: int, line: str, _: int) -> str:
    first = _UNDECODABLE.search(line)
    return f"{path}: byte {offset + _size(line[: first.start()] if first else '')} (line {number})"


def _value(line: str, where: str, column: str) -> str:
    """The text of a row of JSONL."""
    try:
        row = json.loads(line.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}; a row is one JSON object on one line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is {_in_json(row)}, needs an object such as {{{column!r}: ...}}")
    if column not in row:
        raise _no_column(where, column, list(row))
    value = row[column]
    if not isinstance(value, str | None):
        raise DataError(f"{where}: column {column!r} holds {_in_json(value)}, needs text; choose another")
    return value or ""


def _in_json(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _no_column(where: str, column: str, columns: list[str]) -> DataError:
    have = ", ".join(map(repr, columns)) or "no columns"
    return DataError(f"{where} has no column {column!r}, it has {have}; set `column` to the one with the text")


def _parquet(file: Any, shard: Shard, column: str) -> Iterator[Document]:
    """A document a row; null is an empty text."""
    table = pq.ParquetFile(file)
    if column not in table.schema_arrow.names:
        raise _no_column(shard.path, column, table.schema_arrow.names)
    kind = table.schema_arrow.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_text(kind) or pa.types.is_null(kind)):
        raise DataError(f"{shard.path}: column {column!r} holds {kind}, needs text; choose another")
    first, last = (table.num_row_groups * number // shard.slices for number in (shard.slice, shard.slice + 1))
    row = sum(table.metadata.row_group(group).num_rows for group in range(first))
    for batch in table.iter_batches(1024, row_groups=list(range(first, last)), columns=[column]):
        # As bytes: pyarrow does not check that a text is UTF-8.
        for raw in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
            escaped = (raw or b"").decode("utf-8", "surrogateescape")
            yield Document.decoded(escaped, partial(_byte, f"{shard.path}: row {row}", 0, escaped))
            row += 1


def _is_text(kind: pa.DataType) -> bool:
    views = pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)
    plain = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return views or plain or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

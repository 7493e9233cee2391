"""A folder that grows: new files, and lines appended to text and JSONL files; on any file system that pyarrow knows.

A file is a partition. Text and JSONL count bytes, a record is a line (lines of one text file go on where the line
before ended); Parquet counts rows. A half line waits for its newline until the file has not changed for a while.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from nestling.data import readers
from nestling.data.errors import DataError
from nestling.data.files import Place, find
from nestling.data.streams.fields import Fields
from nestling.data.streams.source import Broken, Interval, Record, StreamSource

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Folder(StreamSource):
    """Files by path, folder, glob or URI.

    Attributes:
        name: as the person wrote it.
        fields: what the fields of JSONL and Parquet rows mean.
        settle_after: seconds without a change after which a last line without newline is whole.
    """

    name: str
    fields: Fields
    settle_after: float = 10.0

    def ends(self, offsets: Mapping[str, int]) -> dict[str, int]:
        place = find(self.name)
        place.check()
        found = {}
        for file in place.files():
            path = str(file.path)
            form = readers.form(path)
            if form not in ("text", "jsonl", "parquet"):
                raise DataError(f"{path}: packed files cannot grow and cannot be read by offset; unpack it")
            if form == "parquet":  # rows; a file that is there is complete
                found[path] = offsets.get(path) or self._rows(place, path)
            else:
                found[path] = self._whole_lines(place, file, offsets.get(path, 0))
        return found

    def read(self, interval: Interval) -> Iterator[Record | Broken]:
        filesystem = find(self.name).filesystem
        try:
            with filesystem.open_input_file(interval.partition) as file:
                if readers.form(interval.partition) == "parquet":
                    yield from self._read_rows(file, interval)
                else:
                    yield from self._read_lines(file, interval)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{interval.partition}: cannot be read: {' '.join(str(error).split())}") from error

    def _whole_lines(self, place: Place, file: fs.FileInfo, offset: int) -> int:
        """Where the last whole line ends."""
        if file.size < offset:
            raise DataError(
                f"{file.path} has {file.size} bytes, but {offset} of it were read already; files of a stream may only "
                "grow: put the old content back, or give new content a new file"
            )
        if file.size == offset or time.time() - file.mtime.timestamp() >= self.settle_after:
            return int(file.size)
        end = file.size
        with place.filesystem.open_input_file(file.path) as handle:
            while end > offset:
                begin = max(offset, end - _BLOCK)
                handle.seek(begin)
                newline = handle.read(end - begin).rfind(b"\n")
                if newline >= 0:
                    return int(begin + newline + 1)
                end = begin
        return offset

    def _rows(self, place: Place, path: str) -> int:
        try:
            with place.filesystem.open_input_file(path) as handle:
                return int(pq.read_metadata(handle).num_rows)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}; write files under another name "
                "and rename them when they are complete"
            ) from error

    def _read_lines(self, file: pa.NativeFile, interval: Interval) -> Iterator[Record | Broken]:
        parse = self.fields.of_line if readers.form(interval.partition) == "text" else self._of_json_line
        offset = interval.start
        for raw, size, digest in self._lines(file, interval):
            if digest:
                reason = f"oversized: {size} bytes, stream.record_bytes is {self.fields.limit}"
                yield Broken(interval.partition, offset, offset + size, reason, digest)
            else:
                yield parse(interval.partition, offset, raw)
            offset += size

    def _lines(self, file: pa.NativeFile, interval: Interval) -> Iterator[tuple[bytes, int, str]]:
        """Each line with its newline, and its size; of one that is too large only the start, and its SHA-256."""
        file.seek(interval.start)
        left, begun, size, hashed = interval.end - interval.start, bytearray(), 0, hashlib.sha256()
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                raise DataError(f"{interval.partition} ends before byte {interval.end}, which was there before")
            left -= len(block)
            for part in io.BytesIO(block):  # splits at newlines only
                size += len(part)
                hashed.update(part)
                if size <= self.fields.limit + 1:  # one more shows that it is too large
                    begun += part
                if part.endswith(b"\n"):
                    yield bytes(begun), size, hashed.hexdigest() if size > self.fields.limit else ""
                    begun, size, hashed = bytearray(), 0, hashlib.sha256()
        if size:
            yield bytes(begun), size, hashed.hexdigest() if size > self.fields.limit else ""

    def _of_json_line(self, partition: str, offset: int, raw: bytes) -> Record | Broken:
        return self.fields.of_json(partition, offset, offset + len(raw), raw)

    def _read_rows(self, file: pa.NativeFile, interval: Interval) -> Iterator[Record | Broken]:
        table, row = pq.ParquetFile(file), 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if row + size > interval.start and row < interval.end:
                for batch in table.iter_batches(1024, row_groups=[group]):
                    for content in batch.to_pylist():
                        if interval.start <= row < interval.end:
                            raw = repr(content).encode("utf-8", "surrogatepass")
                            yield self.fields.of_row(interval.partition, row, row + 1, content, raw)
                        row += 1
            else:
                row += size

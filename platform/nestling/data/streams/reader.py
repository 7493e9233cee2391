"""Windows through Ray Data: one read task that never ends, one block a batch.

Every rank has an iterator of its own over the same windows and gets whole batches, of which it trains on its rows, so
the number of workers changes no batch and no order. Ray Data's backpressure is loose; what bounds the memory is that no
window is planned, and so none read, more than `stream.windows_ahead` beyond training.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from nestling.data.errors import DataError
from nestling.data.streams.content import Batch, Rules, batches, read_window
from nestling.data.streams.source import StreamSource
from nestling.data.streams.windows import StreamEnded, WindowFolder
from nestling.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ray.data import Dataset

#: A batch's arrays, as bytes in a column each.
_ARRAYS: dict[str, Any] = {"inputs": np.int32, "targets": np.int32, "domains": np.int16}


class ReadingFailed(RuntimeError):
    """A planned window could not be read: perhaps on this machine only, and perhaps not the next time."""


@dataclass(frozen=True)
class Opening:
    """What comes before the batches of a window.

    Attributes:
        summary: see `Content.summary`.
        batches: how many batches follow.
    """

    summary: dict[str, Any]
    batches: int


@dataclass(frozen=True)
class Reading:
    """All that a reader needs to know.

    Attributes:
        source, folder: what is read, and the folder with the planned windows.
        rules: what decides about records.
        tokenizer, length, rows: how text becomes batches of `rows` sequences over all workers.
    """

    source: StreamSource
    folder: Path
    rules: Rules
    tokenizer: Tokenizer
    length: int
    rows: int

    def tables(self, window: int, latest: float | None) -> Iterator[pa.Table]:
        """The windows from number `window` on: a table of one row for each opening, then one for each batch.

        What goes wrong becomes a last row and no exception: Ray would try again and print its own traceback.
        """
        try:
            yield from self._tables(window, latest)
        except StreamEnded as error:
            yield _table(json.dumps({"ended": str(error)}), [])
        except DataError as error:
            yield _table(json.dumps({"error": str(error)}), [])
        except Exception as error:
            yield _table(json.dumps({"error": "".join(traceback.format_exception(error))}), [])

    def _tables(self, window: int, latest: float | None) -> Iterator[pa.Table]:
        folder = WindowFolder(self.folder)
        while (plan := folder.wait(window)) is not None:
            content = read_window(self.source, plan, self.rules, latest)
            made = batches(content.trained, self.tokenizer, self.length, self.rows)
            yield _table(json.dumps({"summary": content.summary(), "batches": len(made)}), [])
            for batch in made:
                about = json.dumps({"names": batch.names, "bytes": batch.bytes})
                yield _table(about, [batch.inputs, batch.targets, batch.domains])
            window, latest = window + 1, content.latest

    def dataset(self, window: int, latest: float | None) -> Dataset:
        """The same as a Ray Dataset; needs a running Ray with a CPU to spare."""
        import ray.data
        from ray.data import Datasource, ReadTask
        from ray.data.block import BlockMetadata

        reading = self

        class Windows(Datasource):
            """The never-ending read task."""

            def estimate_inmemory_data_size(self) -> int | None:
                return None

            def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
                metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
                return [ReadTask(lambda: reading.tables(window, latest), metadata)]

        # A reader that died is not begun anew by Ray, which would begin it at the first window again: the workers are.
        dataset = ray.data.read_datasource(Windows(), override_num_blocks=1, ray_remote_args={"max_retries": 0})
        dataset.context.enable_progress_bars = False
        dataset.context.target_max_block_size = 1  # every table is a block, and none waits to be joined by the next
        return dataset

    def follow(self, window: int, latest: float | None) -> Iterator[Opening | Batch]:
        """Openings and batches as they come; ends with the stream.

        Raises:
            StreamEnded: the source cannot go on; all readers of the stream find that out in the same place.
            ReadingFailed: a window cannot be read, here at least.
        """
        dataset = self.dataset(window, latest)
        for table in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            yield self._parsed(table)

    def _parsed(self, table: pa.Table) -> Opening | Batch:
        row = table.to_pylist()[0]
        about = json.loads(row["about"])
        if "ended" in about:
            raise StreamEnded(about["ended"])
        if "error" in about:
            raise ReadingFailed(about["error"])
        if "summary" in about:
            return Opening(about["summary"], about["batches"])
        arrays = {name: np.frombuffer(row[name], kind).reshape(-1, self.length) for name, kind in _ARRAYS.items()}
        return Batch(**arrays, names=about["names"], bytes=about["bytes"])


def _table(about: str, arrays: list[np.ndarray]) -> pa.Table:
    raw = [array.tobytes() for array in arrays] or [b""] * len(_ARRAYS)
    columns = {name: pa.array([data], pa.binary()) for name, data in zip(_ARRAYS, raw, strict=True)}
    return pa.table({"about": pa.array([about]), **columns})

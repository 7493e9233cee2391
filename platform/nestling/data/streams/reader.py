"""Windows through Ray Data: a read task that goes on and on, one block a window.

Every rank has an iterator of its own over the same windows and gets whole batches, of which it trains on its rows, so
the number of workers changes no batch and no order. Ray Data's backpressure is loose; what bounds the memory is that no
window is planned, and so none read, more than `stream.windows_ahead` beyond training. And Ray Data keeps some two kB
about every block for as long as a dataset is read (2.60), so after some windows another one goes on.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping
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

#: The arrays of a window's batches, one behind the other, as bytes in a column each.
_ARRAYS: dict[str, Any] = {"inputs": np.int32, "targets": np.int32, "domains": np.int16}
#: Windows after which a dataset ends; the next one takes about a second to come.
WINDOWS = 500


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
class Next:
    """Where another dataset goes on.

    Attributes:
        window, latest: its first window, and of each source the latest event time before it.
    """

    window: int
    latest: Mapping[str, float]


@dataclass(frozen=True)
class Reading:
    """All that a reader needs to know.

    Attributes:
        source, folder: what is read, and the folder with the planned windows.
        rules: what decides about records.
        tokenizer, length, rows, lanes: how text becomes batches of `rows` sequences over all workers; see `batches`.
    """

    source: StreamSource
    folder: Path
    rules: Rules
    tokenizer: Tokenizer
    length: int
    rows: int
    lanes: bool = False

    def tables(self, window: int, latest: Mapping[str, float]) -> Iterator[pa.Table]:
        """The windows from number `window` on, each a table of one row: what is said of it, and all its batches.

        Ends with the stream, or after `WINDOWS` of them with a row that says how to go on. What goes wrong becomes a
        last row and no exception: Ray would try again and print its own traceback.
        """
        try:
            yield from self._tables(window, latest)
        except StreamEnded as error:
            yield _table({"ended": str(error)})
        except DataError as error:
            yield _table({"error": str(error)})
        except Exception as error:
            yield _table({"error": "".join(traceback.format_exception(error))})

    def _tables(self, window: int, latest: Mapping[str, float]) -> Iterator[pa.Table]:
        folder, last = WindowFolder(self.folder), window + WINDOWS
        while (plan := folder.wait(window)) is not None:
            content = read_window(self.source, plan, self.rules, latest)
            made = batches(content.trained, self.tokenizer, self.length, self.rows, self.lanes)
            about = {
                "summary": content.summary(),
                "batches": [{"names": batch.names, "bytes": batch.bytes} for batch in made],
            }
            yield _table(about, {name: [getattr(batch, name) for batch in made] for name in _ARRAYS})
            window, latest = window + 1, content.latest
            if window == last:
                yield _table({"next": {"window": window, "latest": latest}})
                return

    def dataset(self, window: int, latest: Mapping[str, float]) -> Dataset:
        """The same as a Ray Dataset; needs a running Ray with a CPU to spare."""
        import ray.data
        from ray.data import Datasource, ReadTask
        from ray.data.block import BlockMetadata

        reading = self

        class Windows(Datasource):
            """The read task."""

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

    def follow(self, window: int, latest: Mapping[str, float]) -> Iterator[Opening | Batch]:
        """Openings and batches as they come; ends with the stream.

        Raises:
            StreamEnded: the source cannot go on; all readers of the stream find that out in the same place.
            ReadingFailed: a window cannot be read, here at least.
        """
        place: Next | None = Next(window, latest)
        while place is not None:
            dataset = self.dataset(place.window, place.latest)
            place = None
            for table in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                for item in self._parsed(table):
                    if isinstance(item, Next):
                        place = item
                    else:
                        yield item

    def _parsed(self, table: pa.Table) -> Iterator[Opening | Batch | Next]:
        row = table.to_pylist()[0]
        about = json.loads(row["about"])
        if "ended" in about:
            raise StreamEnded(about["ended"])
        if "error" in about:
            raise ReadingFailed(about["error"])
        if "next" in about:
            yield Next(**about["next"])
            return
        yield Opening(about["summary"], len(about["batches"]))
        shape = (-1, self.rows, self.length)
        arrays = {name: np.frombuffer(row[name], kind).reshape(shape) for name, kind in _ARRAYS.items()}
        for place, said in enumerate(about["batches"]):
            yield Batch(**{name: array[place] for name, array in arrays.items()}, **said)


def _table(about: dict[str, Any], arrays: Mapping[str, list[np.ndarray]] | None = None) -> pa.Table:
    cells = {name: b"".join(part.tobytes() for part in (arrays or {}).get(name, ())) for name in _ARRAYS}
    columns = {name: pa.array([data], pa.large_binary()) for name, data in cells.items()}
    return pa.table({"about": pa.array([json.dumps(about)]), **columns})

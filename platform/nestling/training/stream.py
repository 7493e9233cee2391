"""The driver's side of a stream: the way of `fit`, with a source that is read as it comes instead of a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from nestling.checkpoint import run_store
from nestling.checkpoint.ledger import Verified, verify
from nestling.config import JobConfig, from_yaml
from nestling.data.preparing import open_tokenizer
from nestling.tracking import RunFolder
from nestling.training.books import DEAD_LETTERS, LEDGER
from nestling.training.run import KNOWN_AT_ONCE, WHOLE, Part, Progress, Work, drive


@dataclass(frozen=True)
class StreamSummary:
    """How a stream ended; the keys of `nestling stream --json`."""

    run_id: str
    status: str
    steps: int
    tokens: int
    prequential_bits_per_byte: float | None
    ledger: str
    dead_letter: str
    dead_letters: int
    records: int
    windows: int
    tokens_per_second: float | None
    train_loss: float | None
    checkpoint: str | None
    run_dir: str
    tracking_uri: str


def learn_stream(
    config: JobConfig,
    folder: RunFolder,
    on_progress: Progress | None = None,
    on_event: Progress | None = None,
    part: Part = WHOLE,
) -> StreamSummary:
    """Learn from a job's stream until it ends, is stopped, or has had `training.steps`; arguments and errors as `fit`.

    A stream that goes on does so from its newest good snapshot, with the windows that were planned already.
    """
    results = {field.name for field in fields(StreamSummary)} - KNOWN_AT_ONCE
    readers = config.training.workers  # a read task for each worker
    return StreamSummary(**drive(config, folder, _on_source, results, on_progress, on_event, part, readers))


def _on_source(config: JobConfig, folder: RunFolder, begun: bool) -> Work:
    from nestling.training.stream_worker import stream_worker

    open_tokenizer(config.data).save(folder.tokenizer)
    ledger, letters = folder.path / LEDGER, folder.path / DEAD_LETTERS
    return Work(stream_worker, {}, {"ledger": str(ledger), "dead_letter": str(letters)})


def verify_stream(folder: RunFolder) -> Verified:
    """What the ledger of a stream proves; see `nestling.checkpoint.ledger.verify`.

    Raises:
        CheckpointError, OSError: the snapshots cannot be read.
    """
    import json

    config = from_yaml(folder.config.read_text(encoding="utf-8"))
    store = run_store(config, folder)
    newest = next(iter(store.checkpoints()), None)
    state: Mapping[str, Any] | None = None
    if newest is not None:
        state = json.loads(store.open(newest).documents["state.json"])["stream"]
    if state is None:
        return verify(folder.path / LEDGER, None)
    found = verify(folder.path / LEDGER, state["files"]["ledger"], partial(_begin, config), state["position"])
    with (folder.path / DEAD_LETTERS).open("rb") as file:
        lines = file.read(state["files"][DEAD_LETTERS]).splitlines()
    letters = sum(json.loads(line)["window_id"] < state["position"]["window"] for line in lines)
    if letters != found.dead:
        found.problems = [
            *(found.problems or ()),
            f"{DEAD_LETTERS} holds {letters} records of these windows, the ledger counts {found.dead} broken ones",
        ]
    return found


def _begin(config: JobConfig, partition: str) -> int | None:
    """Where a partition begins; None: anywhere, because a topic's oldest messages may be gone."""
    sources = {part.name: part.source for part in config.stream.sources or ()}
    source = sources.get(partition.partition("/")[0], config.data.source)
    return None if source.startswith("kafka://") else 0

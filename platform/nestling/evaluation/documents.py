"""Single documents, what a model makes of each, and what it still makes of what it knew before.

A document is a file: a text as a whole, or the rows of a JSONL or Parquet file, one after another.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from pyarrow import fs

from nestling.checkpoint import newest_good, run_store
from nestling.config import JobConfig
from nestling.data import IGNORED, DataError, Tokenizer, prepare
from nestling.data.readers import Shard, form, read
from nestling.data.streams import Record
from nestling.data.streams.content import batches
from nestling.evaluation.heldout import BATCH, Reader, heldout_report
from nestling.evaluation.probes import Probes, probe_losses
from nestling.tracking import RunFolder

#: What the held-out text of a training is called beside the probes of a stream.
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Document:
    """A file that was read.

    Attributes:
        name: as the person wrote it.
        texts: its texts: one, or one a row.
    """

    name: str
    texts: Sequence[str]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of its texts."""
        return sum(len(text.encode("utf-8")) for text in self.texts)

    @property
    def sha256(self) -> str:
        """Hash over its texts."""
        return hashlib.sha256("\0".join(self.texts).encode("utf-8")).hexdigest()

    @property
    def records(self) -> list[Record]:
        """Its texts as what a stream would make of them."""
        return [Record(self.name, n, n + 1, text, self.name) for n, text in enumerate(self.texts)]

    def about(self) -> dict[str, str | int]:
        """What is kept of it where it was learnt."""
        return {"document": self.name, "bytes": self.bytes, "sha256": self.sha256}


def read_document(path: str, column: str) -> Document:
    """A text, JSONL or Parquet file; `column` is the field with the text, as `data.column`.

    Raises:
        DataError: it cannot be read, or there is no text in it.
    """
    texts = [part.text for part in read(Shard(path), fs.LocalFileSystem(), column)]
    if form(path).startswith("text"):
        texts = ["".join(texts)]
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"{path}: is empty; needs text to learn from")
    return Document(path, texts)


@torch.no_grad()
def document_loss(model: Reader, document: Document, tokenizer: Tokenizer, length: int) -> float:
    """Bits per byte of a document, in sequences of `length` tokens."""
    was_training, device, nats = model.training, next(model.parameters()).device, 0.0
    model.eval()
    for batch in batches(document.records, tokenizer, length, BATCH):
        inputs, targets = (torch.from_numpy(half).long().to(device) for half in (batch.inputs, batch.targets))
        logits, _ = model(inputs)
        each = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        nats += each.item()
    model.train(was_training)
    return nats / math.log(2) / document.bytes


def known_before(folder: RunFolder, config: JobConfig, tokenizer: Tokenizer) -> Callable[[Reader], dict[str, float]]:
    """What measures a model on what its run has held out: bits per byte of each domain of a stream's probes in its
    newest snapshot, or of the held-out text of a training.

    Raises:
        CheckpointError, DataError: what is missing, and how to fix it.
    """
    length = config.data.sequence_length
    if folder.is_stream:
        state = json.loads(newest_good(run_store(config, folder)).documents["state.json"])
        probes = Probes(config.stream.probe_bytes)
        probes.load(state["stream"]["probes"])
        return lambda model: probe_losses(model, probes, probes.domains, tokenizer, length)
    corpus = prepare(replace(config.data, tokenizer=str(folder.tokenizer)), folder.path.parent / "cache")
    tokens = config.evaluation.tokens
    return lambda model: {HELD_OUT: heldout_report(model, corpus, config, tokens).heldout_bits_per_byte}

"""A source, read once: two memory-mapped arrays of tokens, one to train on and one held out.

Ray Data reads, cuts and tokenises in parallel; one writer appends the results in order, so the arrays do not depend on
the number of CPUs or blocks. A document is held out by the hash of its text: equal documents lie on the same side and
the choice needs no seed. The folder appears by one rename and its name is a hash of content and settings: what has been
prepared before is found at once, without Ray. A side is one file however large it is; a memory map does not care.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np

from nestling.cluster import connected
from nestling.data.errors import DataError
from nestling.data.sources import Source, open_source
from nestling.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

#: Part of every key: raise it when documents are cut, split or stored in another way.
FORMAT = 2
#: Documents fall into so many buckets by their hash; the lowest ones are held out.
BUCKETS = 10_000

Side = Literal["train", "heldout"]


class DataSettings(Protocol):
    """The part of `nestling.config.DataConfig` that decides what a corpus holds."""

    source: str
    tokenizer: str
    separator: str | None
    heldout_percent: float


@dataclass(frozen=True)
class Tokens:
    """One side of a corpus: its documents one after another, each followed by the separator."""

    #: 1-D, memory-mapped and read-only; uint16, or int32 for a vocabulary of more than 65536.
    tokens: np.ndarray
    #: UTF-8 bytes of the text, without separators.
    bytes: int
    documents: int
    #: What a model scores that knows nothing but how often each token of this text occurs; separators left out. With
    #: the byte tokenizer it is the entropy of the byte histogram.
    unigram_bits_per_byte: float


@dataclass(frozen=True)
class Corpus:
    """A prepared source. Send its `folder` to workers, not the corpus: a pickled memory map is a copy."""

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    heldout: Tokens

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Map a folder that `prepare` wrote; raises DataError if it is not one."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            tokenizer = Tokenizer.load(folder / "tokenizer.json", manifest["separator"])
            train, heldout = (_open_side(folder, side, manifest[side]) for side in ("train", "heldout"))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} does not hold a prepared corpus ({error}); delete it and start again") from error
        return cls(folder, tokenizer, train, heldout)

    def bits_per_byte(self, nats_per_token: float, side: Side = "heldout") -> float:
        """Turn a mean loss per token, separators included, into bits per byte of text."""
        tokens = getattr(self, side)
        return nats_per_token * len(tokens.tokens) / tokens.bytes / math.log(2)


def prepare(data: DataSettings, cache: str | Path) -> Corpus:
    """Read and tokenise a source, or open what an earlier call left in `cache`.

    Only the first call with the same content, tokenizer and share held out uses Ray; it starts one if none is running.

    Raises:
        DataError: the source or the tokenizer is missing, empty, unreadable or too small to hold anything out.
    """
    tokenizer = open_tokenizer(data)
    source = open_source(data.source)
    threshold = round(data.heldout_percent / 100 * BUCKETS)
    settings = [FORMAT, source.fingerprint(), tokenizer.definition, tokenizer.separator_name, threshold]
    folder = Path(cache) / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with connected():
            _commit(folder, source, tokenizer, threshold)
    return Corpus.open(folder)


def open_tokenizer(data: DataSettings) -> Tokenizer:
    """The tokenizer that a job names; raises DataError if it cannot be used."""
    if data.tokenizer != "bytes":
        return Tokenizer.load(data.tokenizer, data.separator)
    if data.separator is not None:
        raise DataError(
            f"data.separator: got {data.separator!r}, but the byte tokenizer has a separator of its own; "
            "leave data.separator out, or set data.tokenizer to the path of a tokenizer.json"
        )
    return Tokenizer.bytes()


def _commit(folder: Path, source: Source, tokenizer: Tokenizer, threshold: int) -> None:
    """Write a corpus beside `folder` and rename it; if another process was faster, its corpus is the same."""
    draft = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    draft.chmod(0o755)  # a runs folder may be shared
    try:
        manifest = _write(draft, source, tokenizer, threshold)
        if manifest["heldout"]["documents"] == 0 or manifest["train"]["documents"] == 0:
            manifest = _write(draft, source, tokenizer, _nearest_threshold(manifest))
        tokenizer.save(draft / "tokenizer.json")
        with open(draft / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=2)
            _sync(file)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(draft: Path, source: Source, tokenizer: Tokenizer, threshold: int) -> dict[str, Any]:
    """One pass over the source; returns the manifest."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
    buckets: list[int] = []
    sides = (_Writer(draft / f"{side}.npy", dtype, tokenizer) for side in ("train", "heldout"))
    with next(sides) as train, next(sides) as heldout:
        for row in _packed(source, tokenizer, threshold, dtype):
            if row["error"]:
                raise DataError(f"data.source: {row['error']}")
            (heldout if row["heldout"] else train).append(row)
            buckets += row["lowest"], row["highest"]
    if not buckets:
        raise DataError(f"data.source: {source.spec} holds no text, only white space; give a source with text in it")
    return {
        "format": FORMAT,
        "source": source.spec,
        "separator": tokenizer.separator_name,
        "heldout_below": threshold,
        "buckets": [min(buckets), max(buckets)],
        "train": train.entry(),
        "heldout": heldout.entry(),
    }


def _nearest_threshold(manifest: dict[str, Any]) -> int:
    """Where to split a source so small that one side is empty: beside the lowest hash, or the highest."""
    lowest, highest = manifest["buckets"]
    if lowest == highest:
        size = manifest["train"]["bytes"] + manifest["heldout"]["bytes"]
        raise DataError(
            f"data.source: {manifest['source']} is a single document of {size} bytes, so nothing can be held "
            "out; give more text: files are documents, and from 4 KB on they are cut into several at blank lines"
        )
    return lowest + 1 if manifest["heldout"]["documents"] == 0 else highest


def _packed(source: Source, tokenizer: Tokenizer, threshold: int, dtype: np.dtype) -> Iterator[dict[str, Any]]:
    """Rows of `_pack` in the order of the documents."""
    pack = partial(_pack, tokenizer=tokenizer, threshold=threshold, dtype=dtype)
    rows = source.dataset().map_batches(pack, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from cast("pa.Table", batch).to_pylist()


def _pack(documents: pa.Table, tokenizer: Tokenizer, threshold: int, dtype: np.dtype) -> pa.Table:
    """Turn documents into one row a side with everything the writer needs, and each error into a row of its own."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = [{"error": error} for error in documents["error"].to_pylist() if error]
    placed = [(bucket(text), text) for text in documents["text"].to_pylist() if text]
    for heldout in (False, True):
        chosen = [(place, text) for place, text in placed if (place < threshold) == heldout]
        if not chosen:
            continue
        ids = [part for _, text in chosen for part in (tokenizer.encode(text), [tokenizer.separator])]
        row = {
            "heldout": heldout,
            "tokens": np.concatenate(ids).astype(dtype).tobytes(),
            "documents": len(chosen),
            "bytes": sum(len(text.encode()) for _, text in chosen),
            "lowest": min(chosen)[0],
            "highest": max(chosen)[0],
        }
        rows.append(row)
    schema = {
        "heldout": pa.bool_(),
        "tokens": pa.large_binary(),
        "documents": pa.int64(),
        "bytes": pa.int64(),
        "lowest": pa.int64(),
        "highest": pa.int64(),
        "error": pa.string(),
    }
    return pa.Table.from_pylist(rows, schema=pa.schema(schema))


def bucket(text: str) -> int:
    """Where a document's hash puts it, 0 to BUCKETS - 1; it is held out below `heldout_percent` of them."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()) % BUCKETS


class _Writer:
    """Appends tokens to a .npy file whose length is known only at the end."""

    def __init__(self, path: Path, dtype: np.dtype, tokenizer: Tokenizer) -> None:
        self._dtype, self._separator = dtype, tokenizer.separator
        self._file = open(path, "wb")  # noqa: SIM115
        self._documents = self._tokens = self._bytes = 0
        self._histogram = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._digest = hashlib.sha256()

    def __enter__(self) -> _Writer:
        self._write_header()
        return self

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(row["tokens"])
        self._digest.update(row["tokens"])
        ids = np.frombuffer(row["tokens"], dtype=self._dtype)
        self._tokens += len(ids)
        self._documents += row["documents"]
        self._bytes += row["bytes"]
        self._histogram += np.bincount(ids, minlength=len(self._histogram))

    def entry(self) -> dict[str, Any]:
        """What the manifest says about the file; the hash is that of the tokens, without the header."""
        text = np.delete(self._histogram, self._separator)
        return {
            "tokens": self._tokens,
            "bytes": self._bytes,
            "documents": self._documents,
            "unigram_bits_per_byte": _entropy(text) * int(text.sum()) / max(self._bytes, 1),
            "sha256": self._digest.hexdigest(),
        }

    def __exit__(self, *exception: object) -> None:
        # numpy pads the header, so that one for another length takes the same room.
        self._file.seek(0)
        self._write_header()
        _sync(self._file)
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _open_side(folder: Path, side: Side, entry: dict[str, Any]) -> Tokens:
    tokens = np.load(folder / f"{side}.npy", mmap_mode="r")
    if len(tokens) != entry["tokens"]:
        raise ValueError(f"{side}.npy has {len(tokens)} tokens, the manifest says {entry['tokens']}")
    return Tokens(tokens, entry["bytes"], entry["documents"], entry["unigram_bits_per_byte"])


def _entropy(histogram: np.ndarray) -> float:
    share = histogram[histogram > 0] / max(histogram.sum(), 1)
    return float(-(share * np.log2(share)).sum())


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())

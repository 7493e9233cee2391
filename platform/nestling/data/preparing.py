"""Sources, read once: from documents to the folders that `Corpus.open` maps.

Ray Data reads, cuts and tokenises in parallel; one writer appends the results in order, so the arrays do not depend on
the number of CPUs or blocks. A document is held out by the hash of its text: equal documents lie on the same side and
the choice needs no seed. A folder appears by one rename and its name is a hash of content and settings: what has been
prepared before is found at once, without Ray. A side is one file however large it is; a memory map does not care.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from nestling.cluster import connected
from nestling.data import split
from nestling.data.corpus import Corpus
from nestling.data.digests import Digests
from nestling.data.errors import DataError
from nestling.data.sources import Source, open_source
from nestling.data.tokenizer import Tokenizer
from nestling.data.writer import Writer, sync, token_dtype

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

#: Part of every key: raise it when documents are cut, split or stored in another way.
FORMAT = 3
#: Seconds after which what a killed process left in the cache is removed.
ABANDONED = 24 * 3600
#: How their names begin.
DRAFT = ".draft-"


class MixSettings(Protocol):
    """One source of a mix, as in `nestling.config.MixConfig`."""

    source: str
    weight: float
    column: str | None
    name: str | None


class DataSettings(Protocol):
    """The part of `nestling.config.DataConfig` that decides what a corpus holds."""

    source: str
    column: str
    tokenizer: str
    separator: str | None
    heldout_percent: float

    @property
    def mix(self) -> Sequence[MixSettings] | None: ...


def prepare(data: DataSettings, cache: str | Path) -> Corpus:
    """Read and tokenise a source or a mix, or open what an earlier call left in `cache`.

    Only the first call with the same content, tokenizer and share held out uses Ray; it starts one if none is running.

    Raises:
        DataError: a source or the tokenizer is missing, empty, unreadable or too small to hold anything out.
    """
    cache, tokenizer, threshold = Path(cache), open_tokenizer(data), split.threshold(data.heldout_percent)
    sources, digests = sources_of(data), Digests(cache)
    settings = [FORMAT, tokenizer.definition, tokenizer.separator_name, threshold]
    folders = [cache / _name([*settings, source.fingerprint(digests)]) for source in sources]
    digests.save()
    missing = {folder: source for folder, source in zip(folders, sources, strict=True) if not folder.exists()}
    if missing:
        with connected():
            for folder, source in missing.items():
                with _appearing(folder) as draft:
                    _write_part(draft, source, tokenizer, threshold)
    return Corpus.open(folders[0] if data.mix is None else _write_mix(data.mix, folders))


def sources_of(data: DataSettings) -> list[Source]:
    """The sources of a job, of which there is one without a mix; raises DataError as `open_source` does."""
    if data.mix is None:
        return [open_source(data.source, data.column)]
    return [
        open_source(part.source, part.column or data.column, f"data.mix.{number}.source")
        for number, part in enumerate(data.mix)
    ]


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


def _write_mix(mix: Sequence[MixSettings], folders: Sequence[Path]) -> Path:
    """The folder that names the parts of a mix, which lie beside it."""
    parts = zip(mix, folders, strict=True)
    entries = [{"name": part.name, "weight": part.weight, "folder": folder.name} for part, folder in parts]
    folder = folders[0].parent / _name([FORMAT, entries])
    if not folder.exists():
        with _appearing(folder) as draft:
            _write_json(draft / "mix.json", entries)
    return folder


def _write_part(draft: Path, source: Source, tokenizer: Tokenizer, threshold: int) -> None:
    """Write everything that a source comes to into a folder."""
    passed = _Pass(draft, source, tokenizer, threshold)
    settled = split.filling_both_sides(threshold, passed.lowest, passed.highest)
    if settled != threshold:
        passed = _Pass(draft, source, tokenizer, settled)
    tokenizer.save(draft / "tokenizer.json")
    np.save(draft / "lengths.npy", np.array(sorted(passed.lengths.items()), dtype=np.int64).T)
    _write_json(draft / "manifest.json", passed.manifest())
    if passed.replaced:
        log.warning(
            "%s: bytes that are not UTF-8 became U+FFFD: %d, the first one in %s; if the file has another encoding, "
            "convert it (iconv -f latin1 -t utf-8)",
            source.key,
            passed.replaced,
            passed.place,
        )


class _Pass:
    """One pass over a source, which writes the arrays of both sides, and what was seen on the way."""

    def __init__(self, draft: Path, source: Source, tokenizer: Tokenizer, threshold: int) -> None:
        self.source, self.separator, self.threshold = source, tokenizer.separator_name, threshold
        self.empty = self.replaced = 0
        self.place = ""
        self.lengths: Counter[int] = Counter()
        self.lowest, self.highest = split.BUCKETS, -1
        train, heldout = (Writer(draft / f"{side}.npy", tokenizer) for side in ("train", "heldout"))
        with train, heldout:
            for row in _packed(source, tokenizer, threshold):
                if row["error"]:
                    raise DataError(f"{source.key}: {row['error']}")
                self._count(row)
                train.append(**row["train"])
                heldout.append(**row["heldout"])
        self.sides = {"train": train.entry(), "heldout": heldout.entry()}
        self._check()

    def _count(self, row: dict[str, Any]) -> None:
        self.empty += row["empty"]
        self.replaced += row["replaced"]
        self.place = self.place or row["place"]
        self.lengths.update(dict(zip(row["lengths"], row["documents"], strict=True)))
        self.lowest, self.highest = min(self.lowest, row["lowest"]), max(self.highest, row["highest"])

    def _check(self) -> None:
        """Raises DataError if there is no way to fill both sides."""
        key, spec = self.source.key, self.source.spec
        if self.highest < 0:
            raise DataError(f"{key}: {spec} holds no text, only white space; give a source with text in it")
        if self.lowest == self.highest:
            size = sum(side["bytes"] for side in self.sides.values())
            raise DataError(
                f"{key}: {spec} is a single document of {size} bytes, so nothing can be held out; give more text: "
                "text files are documents, and from 4 KB on they are cut into several at blank lines"
            )

    def manifest(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": self.source.spec,
            "separator": self.separator,
            "heldout_below": self.threshold,
            "counts": {"documents": self.lengths.total(), "empty": self.empty, "replaced": self.replaced},
            "first_replaced": self.place or None,
            **self.sides,
        }


def _packed(source: Source, tokenizer: Tokenizer, threshold: int) -> Iterator[dict[str, Any]]:
    """Rows of `_pack` in the order of the documents."""
    pack = partial(_pack, tokenizer=tokenizer, threshold=threshold)
    rows = source.dataset().map_batches(pack, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from cast("pa.Table", batch).to_pylist()


def _pack(documents: pa.Table, tokenizer: Tokenizer, threshold: int) -> pa.Table:
    """Turn documents into one row with everything the writers need, and the first error if there is one."""
    import pyarrow as pa

    columns = documents.to_pydict()
    texts = [text for text in columns["text"] if text and not text.isspace()]
    errors = list(filter(None, columns["error"]))
    sides: tuple[_Side, _Side] = _Side([], []), _Side([], [])
    buckets, lengths = [], []
    for text in texts:
        buckets.append(split.bucket(text))
        ids = tokenizer.encode(text)
        lengths.append(len(ids))
        side = sides[buckets[-1] < threshold]
        side.texts.append(text)
        side.ids.extend((ids, [tokenizer.separator]))
    found, documents_of_length = np.unique(np.array(lengths, dtype=np.int64), return_counts=True)
    row = {
        "train": sides[0].row(tokenizer),
        "heldout": sides[1].row(tokenizer),
        "lengths": found,
        "documents": documents_of_length,
        "lowest": min(buckets, default=split.BUCKETS),
        "highest": max(buckets, default=-1),
        "empty": len(columns["text"]) - len(texts) - len(errors),
        "replaced": sum(columns["replaced"]),
        "place": next(filter(None, columns["place"]), ""),
        "error": errors[0] if errors else "",
    }
    side_type = pa.struct({"tokens": pa.large_binary(), "documents": pa.int64(), "bytes": pa.int64()})
    types = {
        "train": side_type,
        "heldout": side_type,
        "lengths": pa.list_(pa.int64()),
        "documents": pa.list_(pa.int64()),
    }
    types |= dict.fromkeys(("lowest", "highest", "empty", "replaced"), pa.int64())
    types |= dict.fromkeys(("place", "error"), pa.string())
    return pa.Table.from_pylist([row], schema=pa.schema(types))


class _Side(NamedTuple):
    """Documents of one side and their ids, each followed by the separator."""

    texts: list[str]
    ids: list[Any]

    def row(self, tokenizer: Tokenizer) -> dict[str, Any]:
        tokens = np.concatenate(self.ids or [[]]).astype(token_dtype(tokenizer)).tobytes()
        return {"tokens": tokens, "documents": len(self.texts), "bytes": sum(len(text.encode()) for text in self.texts)}


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A draft that becomes `folder` when the block ends; if another process was faster, its folder is the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder.parent))
    draft.chmod(0o755)  # a runs folder may be shared
    try:
        yield draft
        try:
            draft.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove drafts into which nobody has written for a day: their process was killed."""
    for draft in cache.glob(f"{DRAFT}*"):
        with suppress(OSError):  # another process may be removing it
            if max(path.stat().st_mtime for path in (draft, *draft.iterdir())) < time.time() - ABANDONED:
                shutil.rmtree(draft, ignore_errors=True)


def _name(settings: list[Any]) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=2)
        sync(file)

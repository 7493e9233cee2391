"""A prepared corpus: memory-mapped tokens to train on and to hold out, of one source or of a mix.

A corpus is a folder, and the folder is what travels to workers: that of a source holds the arrays and a manifest
(`nestling.data.preparing` writes it), that of a mix only names the folders of its parts, so that two mixes share what
they have in common.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nestling.data.errors import DataError
from nestling.data.tokenizer import Tokenizer

Side = Literal["train", "heldout"]


@dataclass(frozen=True)
class Tokens:
    """One side of a part: its documents one after another, each followed by the separator."""

    #: 1-D, memory-mapped and read-only; uint16, or int32 for a vocabulary of more than 65536.
    tokens: np.ndarray
    #: UTF-8 bytes of the text, without separators.
    bytes: int
    documents: int
    #: What a model scores that knows nothing but how often each token of this text occurs; separators left out. With
    #: the byte tokenizer it is the entropy of the byte histogram.
    unigram_bits_per_byte: float

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for, separators counted as tokens."""
        return self.bytes / len(self.tokens)


@dataclass(frozen=True)
class Counts:
    """What a source held, both sides together."""

    documents: int
    #: Documents left out because they hold no text, only white space.
    empty: int
    #: Bytes that are not UTF-8 and became U+FFFD.
    replaced: int
    #: Documents by their length in tokens: row 0 the lengths, row 1 how many documents have them.
    lengths: np.ndarray

    def longer_than(self, tokens: int) -> int:
        """How many documents have more tokens; what a sequence does not hold runs on over the next ones."""
        lengths, documents = self.lengths
        return int(documents[lengths > tokens].sum())

    def line(self, sequence_length: int) -> str:
        """All of it in words, such as "1,204 documents (3 empty ones left out)"."""
        longer = self.longer_than(sequence_length)
        remarks = [
            _counted(self.empty, "empty one", "empty ones") + " left out" if self.empty else "",
            _counted(self.replaced, "undecodable byte", "undecodable bytes") + " replaced" if self.replaced else "",
            f"{longer:,} longer than a sequence" if longer else "",
        ]
        text = ", ".join(filter(None, remarks))
        return _counted(self.documents, "document", "documents") + (f" ({text})" if text else "")


@dataclass(frozen=True)
class Part:
    """One source of a corpus; a corpus of one source is one part with the weight 1."""

    name: str
    #: Share of the corpus's sequences; the weights of all parts add up to 1.
    weight: float
    train: Tokens
    heldout: Tokens
    counts: Counts


@dataclass(frozen=True)
class Corpus:
    """A prepared source or mix. Send its `folder` to workers, not the corpus: a pickled memory map is a copy."""

    folder: Path
    tokenizer: Tokenizer
    parts: tuple[Part, ...]

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Map a folder that `prepare` wrote; raises DataError if it is not one."""
        folder = Path(folder)
        if not (folder / "mix.json").is_file():
            tokenizer, part = _open_part(folder, "text", 1.0)
            return cls(folder, tokenizer, (part,))
        try:
            mix = json.loads((folder / "mix.json").read_text())
            total = sum(entry["weight"] for entry in mix)
            entries = [(folder.parent / entry["folder"], entry["name"], entry["weight"] / total) for entry in mix]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, error) from error
        tokenizers, parts = zip(*(_open_part(*entry) for entry in entries), strict=True)
        return cls(folder, tokenizers[0], parts)

    def bits_per_byte(self, nats_per_token: float | Sequence[float], side: Side = "heldout") -> float:
        """Turn a mean loss per token, separators included, into bits per byte of text.

        Args:
            nats_per_token: of the whole corpus, parts taken by their weights, or of each part.
            side: on which side it was measured.
        """
        each = [nats_per_token] * len(self.parts) if isinstance(nats_per_token, float | int) else nats_per_token
        return bits_per_byte(self.parts, each, side)

    def unigram_bits_per_byte(self) -> float:
        """The chance line of the held-out text; of a mix, what a model scores that knows which part it reads."""
        sizes = [part.weight * part.heldout.bytes_per_token for part in self.parts]
        lines = [part.heldout.unigram_bits_per_byte for part in self.parts]
        return sum(size / sum(sizes) * line for size, line in zip(sizes, lines, strict=True))

    def line(self, sequence_length: int) -> str:
        """What the sources held, in words; see `Counts.line`."""
        if len(self.parts) == 1:
            return self.parts[0].counts.line(sequence_length)
        return "; ".join(
            f"{part.name}: {part.counts.line(sequence_length)}, {part.weight:.3g} of the mix" for part in self.parts
        )


def bits_per_byte(parts: Sequence[Part], nats_per_token: Sequence[float], side: Side = "heldout") -> float:
    """Bits per byte of a mix of parts, from each part's mean loss per token: all its nats over all its bytes."""
    tokens: list[Tokens] = [getattr(part, side) for part in parts]
    nats = sum(part.weight * nats for part, nats in zip(parts, nats_per_token, strict=True))
    size = sum(part.weight * each.bytes_per_token for part, each in zip(parts, tokens, strict=True))
    return nats / size / math.log(2)


def _open_part(folder: Path, name: str, weight: float) -> tuple[Tokenizer, Part]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        tokenizer = Tokenizer.load(folder / "tokenizer.json", manifest["separator"])
        counts = Counts(**manifest["counts"], lengths=np.load(folder / "lengths.npy"))
        train, heldout = (_open_side(folder, side, manifest[side]) for side in ("train", "heldout"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    return tokenizer, Part(name, weight, train, heldout, counts)


def _open_side(folder: Path, side: str, entry: dict[str, Any]) -> Tokens:
    tokens = np.load(folder / f"{side}.npy", mmap_mode="r")
    if len(tokens) != entry["tokens"]:
        raise ValueError(f"{side}.npy has {len(tokens)} tokens, the manifest says {entry['tokens']}")
    return Tokens(tokens, entry["bytes"], entry["documents"], entry["unigram_bits_per_byte"])


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"{folder} does not hold a prepared corpus ({error}); delete it and start again")


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"

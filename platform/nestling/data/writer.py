"""Tokens that arrive piece by piece become one .npy file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from nestling.data.tokenizer import Tokenizer


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """How the ids of a tokenizer are stored."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")


class Writer:
    """Appends tokens to a .npy file whose length is known only at the end."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._dtype, self._separator = token_dtype(tokenizer), tokenizer.separator
        self._file = open(path, "wb")  # noqa: SIM115
        self._documents = self._tokens = self._bytes = 0
        self._histogram = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._digest = hashlib.sha256()

    def __enter__(self) -> Writer:
        self._write_header()
        return self

    def append(self, tokens: bytes, documents: int, bytes: int) -> None:
        """Add the tokens of some documents with their separators, as raw ids, and the size of their text."""
        self._file.write(tokens)
        self._digest.update(tokens)
        ids = np.frombuffer(tokens, dtype=self._dtype)
        self._tokens += len(ids)
        self._documents += documents
        self._bytes += bytes
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
        sync(self._file)
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def sync(file: IO[Any]) -> None:
    """Put a file on the disk before its folder gets its name."""
    file.flush()
    os.fsync(file.fileno())


def _entropy(histogram: np.ndarray) -> float:
    share = histogram[histogram > 0] / max(histogram.sum(), 1)
    return float(-(share * np.log2(share)).sum())

"""Text to token ids and back, always through a `tokenizer.json` of the `tokenizers` library.

The default tokenizer needs no file: a token is a byte, and id 256 separates documents. It is an ordinary byte-level BPE
without merges, so every tool that knows the format reads what it saves; since its ids are the bytes themselves, it
encodes and decodes by a short cut through numpy that is a hundred times faster and gives the same ids.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nestling.data.errors import DataError

#: Names of the token that ends a text, in the order in which they are looked for.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "[EOS]", "[SEP]")


class TextStream(Protocol):
    """Decodes one token at a time and never returns a part of a character."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is complete by now, often one character, sometimes none."""
        ...

    def flush(self) -> str:
        """Return what is still incomplete, as U+FFFD, and start afresh."""
        ...


class Tokenizer:
    """A tokenizer and the token that separates documents.

    Args:
        definition: content of a `tokenizer.json`.
        separator: token put after each document; None takes the first of `SEPARATORS` that the vocabulary holds.

    Raises:
        DataError: the definition cannot be read or has no such separator.
    """

    def __init__(self, definition: str, separator: str | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises a bare Exception
            raise DataError(f"not a tokenizer.json of the `tokenizers` library: {error}") from error
        # A file may hold the truncation of the model it was made for; text that spells a special token is only text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.definition = definition
        #: The token put after each document, and its id.
        self.separator_name, self.separator = _find_separator(self._tokenizer, separator)
        #: Number of ids that a model has to know: the largest id + 1.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._is_bytes = self.vocab_size == 257 and json.loads(definition) == json.loads(_byte_definition())

    @classmethod
    def bytes(cls) -> Tokenizer:
        """The tokenizer of 256 bytes and a separator: byte value == id, separator == 256."""
        return cls(_byte_definition())

    @classmethod
    def load(cls, path: str | Path, separator: str | None = None) -> Tokenizer:
        """Read a `tokenizer.json`; raises DataError if it is missing, unreadable or without separator."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise DataError(
                f"data.tokenizer: there is no file {path}; "
                "give the path of a tokenizer.json, or `bytes` for the one that needs no file"
            )
        try:
            return cls(path.read_text(encoding="utf-8"), separator)
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"data.tokenizer: {path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the `tokenizer.json`; `load` and the `tokenizers` library read it."""
        Path(path).write_text(self.definition, encoding="utf-8")

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text without separator, int32 of shape (tokens,); what UTF-8 cannot hold becomes a question mark."""
        raw = text.encode("utf-8", errors="replace")
        if self._is_bytes:
            return np.frombuffer(raw, dtype=np.uint8).astype(np.int32)
        return np.asarray(self._tokenizer.encode(raw.decode(), add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of some ids; separators are left out, bytes that are not UTF-8 become U+FFFD."""
        array = np.asarray(ids, dtype=np.int64)
        array = array[array != self.separator]
        if self._is_bytes:
            return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        return self._tokenizer.decode(array.tolist(), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder for tokens that come one at a time."""
        return _ByteStream() if self._is_bytes else _TokenStream(self._tokenizer, self.separator)

    def __reduce__(self) -> tuple:
        return _restore, (self.definition, self.separator_name)


@lru_cache(maxsize=4)
def _restore(definition: str, separator: str) -> Tokenizer:
    """Unpickle: a worker process reads the same definition once, not once a task."""
    return Tokenizer(definition, separator)


def _find_separator(tokenizer: tokenizers.Tokenizer, wanted: str | None) -> tuple[str, int]:
    for name in SEPARATORS if wanted is None else (wanted,):
        if (token_id := tokenizer.token_to_id(name)) is not None:
            return name, token_id
    if wanted is None:
        raise DataError(
            f"its vocabulary has none of {', '.join(SEPARATORS)}; "
            "name the token that separates documents with data.separator"
        )
    raise DataError(f"its vocabulary has no token {wanted!r}; name one that it has with data.separator")


@cache
def _byte_definition() -> str:
    """The `tokenizer.json` of the byte tokenizer.

    ByteLevel writes each byte as a character: the printable ones as themselves, the others, in order, from U+0100 on.
    The separator is a plain entry of the vocabulary that no text can produce.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = [byte for byte in range(256) if byte not in printable.values()]
    vocabulary = printable | dict(zip(alphabet[len(printable) :], others, strict=True)) | {SEPARATORS[0]: 256}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str(pretty=True)


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else self.flush()

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _TokenStream:
    #: A character has at most four bytes: a longer wait is for text that will never become valid.
    LONGEST_WAIT = 16

    def __init__(self, tokenizer: tokenizers.Tokenizer, separator: int) -> None:
        self._tokenizer = tokenizer
        self._separator = separator
        self._start()

    def _start(self) -> None:
        self._decoder = decoders.DecodeStream(skip_special_tokens=True)
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id == self._separator or len(self._waiting) == self.LONGEST_WAIT:
            return self.flush() + ("" if token_id == self._separator else self.push(token_id))
        self._waiting.append(token_id)
        text = self._decoder.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._waiting = []
        return text

    def flush(self) -> str:
        text = self._tokenizer.decode(self._waiting, skip_special_tokens=True)
        self._start()
        return text

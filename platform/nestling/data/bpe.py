"""Train a tokenizer on a source: byte-level BPE of the `tokenizers` library, with one special token, the separator.

It reads the training side only: what a run with the same source and share would hold out is left out here too, so that
held-out figures stay honest, and serves to say how many bytes a token is worth. Equal texts give equal tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nestling.data import split
from nestling.data.errors import DataError
from nestling.data.sources import Source
from nestling.data.tokenizer import SEPARATORS, Tokenizer

#: All bytes and the separator: a vocabulary without any merges.
SMALLEST_VOCABULARY = 257
#: Bytes of held-out text on which a token's worth is measured, at most.
MEASURED_BYTES = 4_000_000


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer and what it was trained on."""

    tokenizer: Tokenizer
    #: Documents and bytes of text that it was trained on.
    documents: int
    bytes: int
    #: Bytes of held-out text for one token.
    bytes_per_token: float


def train_tokenizer(source: Source, vocab_size: int, heldout_percent: float) -> TrainedTokenizer:
    """Train a tokenizer of `vocab_size` tokens, of which id 0 is the separator, in this process and without Ray.

    Raises:
        DataError: the vocabulary is too small, or the source unreadable or too small for it.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"a vocabulary of {vocab_size} tokens is too small, needs at least {SMALLEST_VOCABULARY}: "
            "one for each byte and one that separates documents"
        )
    text = _Text(source, heldout_percent)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[SEPARATORS[0]],
        show_progress=False,
    )
    library.train_from_iterator(iter(text), trainer)
    tokenizer = Tokenizer(library.to_str(pretty=True))
    if tokenizer.vocab_size < vocab_size:
        raise DataError(
            f"{source.key}: {source.spec} gives {tokenizer.vocab_size} tokens and no more, fewer than {vocab_size}; "
            f"ask for {tokenizer.vocab_size}, or give more text"
        )
    tokens = sum(len(tokenizer.encode(document)) for document in text.heldout)
    size = sum(len(document.encode()) for document in text.heldout)
    return TrainedTokenizer(tokenizer, text.documents, text.bytes, size / tokens)


class _Text:
    """The training side of a source, document by document; counts what it gives and keeps some of the other side."""

    def __init__(self, source: Source, heldout_percent: float) -> None:
        self.documents = self.bytes = 0
        self.heldout: list[str] = []
        self._source = source
        # A first pass, because of a source with few documents one must be held out that is not below the threshold.
        lowest, highest = split.BUCKETS, -1
        for text in self._texts():
            bucket = split.bucket(text)
            lowest, highest = min(lowest, bucket), max(highest, bucket)
        if lowest >= highest:
            raise DataError(f"{source.key}: {source.spec} holds fewer than two different documents; give more text")
        self._threshold = split.filling_both_sides(split.threshold(heldout_percent), lowest, highest)

    def __iter__(self) -> Iterator[str]:
        kept = 0
        for text in self._texts():
            size = len(text.encode())
            if split.bucket(text) >= self._threshold:
                self.documents += 1
                self.bytes += size
                yield text
            elif kept < MEASURED_BYTES:
                self.heldout.append(text)
                kept += size

    def _texts(self) -> Iterator[str]:
        try:
            for document in chain.from_iterable(map(self._source.read, self._source.shards)):
                if document.text and not document.text.isspace():
                    yield document.text
        except DataError as error:
            raise DataError(f"{self._source.key}: {error}") from error

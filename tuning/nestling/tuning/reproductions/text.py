"""Embedded text as a task: bytes to be predicted one by one, scored in bits per byte on documents held out.

Documents are held out by the hash of their text, as in training (`nestling.data.split`); of those, the lowest buckets
are for validation and the others for the test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nestling.data import DOMAINS
from nestling.data.split import BUCKETS, bucket
from nestling.tasks import IGNORE, Examples, Task

#: Token between two documents; the others are bytes. It is read but not scored.
SEPARATOR = 256
#: Shares of the documents held out for validation and for the test.
VALIDATION, TEST = 0.03, 0.07


@dataclass(frozen=True)
class Text(Task):
    """Sequences from random places of a domain; the test reads its held-out text in stretches, evenly spread.

    Chance is the entropy of the test's byte histogram: what a model scores that knows only how often each byte occurs.

    Attributes:
        domain: one of `nestling.data.DOMAINS`.
        length: bytes that a sequence predicts.
        test_length: the same in the test; longer shows whether a model can use what it was not trained to.
        test_bytes: bytes that the test predicts.
    """

    name = "text"
    metric = "bits"
    domain: str = "english"
    length: int = 256
    test_length: int = 256
    test_bytes: int = 65536

    @property
    def vocab_size(self) -> int:
        return SEPARATOR + 1

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        text = stream(self.domain, "train")
        starts = torch.randint(len(text) - self.length, (count,), generator=generator)
        return _windows(text, starts, self.length)

    def validation(self, generator: torch.Generator, count: int = 128) -> Examples:
        return _spread(stream(self.domain, "validation"), count, self.length)

    def tests(self, seed: int) -> dict[str, Examples]:
        """The same text for every seed."""
        return {"held-out": _spread(stream(self.domain, "test"), self.test_bytes // self.test_length, self.test_length)}

    def chance(self, test: str) -> float:
        targets = self.tests(0)[test].targets
        counts = torch.bincount(targets[targets != IGNORE])
        shares = counts[counts > 0] / counts.sum()
        return -(shares * shares.log()).sum().item() / math.log(2)


def stream(domain: str, side: str) -> Tensor:
    """The documents of one side ("train", "validation" or "test") one after another, each behind a separator; int16."""
    return _streams(domain)[side]


@cache
def _streams(domain: str) -> dict[str, Tensor]:
    held_out, validation = (round(share * BUCKETS) for share in (VALIDATION + TEST, VALIDATION))
    pieces: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for _, text in DOMAINS[domain]():
        place = bucket(text)
        side = pieces["validation" if place < validation else "test" if place < held_out else "train"]
        side += [torch.tensor([SEPARATOR], dtype=torch.int16), torch.tensor(list(text.encode()), dtype=torch.int16)]
    return {side: torch.cat(documents) for side, documents in pieces.items()}


def _spread(text: Tensor, count: int, length: int) -> Examples:
    count = min(count, (len(text) - 1) // length)
    return _windows(text, torch.linspace(0, len(text) - length - 1, count).long(), length)


def _windows(text: Tensor, starts: Tensor, length: int) -> Examples:
    tokens = text[starts.unsqueeze(1) + torch.arange(length + 1)].long()
    targets = tokens[:, 1:]
    return Examples(tokens[:, :-1], targets.masked_fill(targets == SEPARATOR, IGNORE))


def text_bytes(domain: str, side: str) -> bytes:
    """The same documents as bytes, without separators."""
    text = stream(domain, side)
    return bytes(text[text != SEPARATOR].tolist())

"""Retention probes: a little of every domain, held out for good, and what the model still makes of it.

Which records are held out is decided by a hash of their text (`nestling.data.split`): the same text is never trained
on, however often it comes, and no random state is needed. Of a domain's held-out records those with the smallest hashes
are kept, up to a number of bytes: a uniform sample that does not depend on the order in which records came.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from nestling.data.tokenizer import Tokenizer
from nestling.evaluation.heldout import Reader, token_losses
from nestling.evaluation.prequential import metric_name
from nestling.evaluation.retention import lost_since_best, stability_gap

#: What the domain of records without one is called.
ALL = "all"


class Probes:
    """The probes of a stream by domain, and the losses on them over time.

    Args:
        limit: bytes of text kept of each domain.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        #: Of each domain (hash, text), by hash.
        self._kept: dict[str, list[tuple[str, str]]] = {}
        #: Of each domain its losses in bits per byte, evaluation by evaluation, from its first on.
        self.losses: dict[str, list[float]] = {}

    def add(self, domain: str, text: str) -> None:
        """Offer a held-out record."""
        kept = self._kept.setdefault(domain or ALL, [])
        entry = (hashlib.sha256(text.encode("utf-8")).hexdigest(), text)
        if entry not in kept:
            kept.append(entry)
            kept.sort()
        while len(kept) > 1 and sum(len(text.encode("utf-8")) for _, text in kept) > self._limit:
            kept.pop()

    @property
    def domains(self) -> list[str]:
        """In the order in which they came."""
        return list(self._kept)

    def rows(self, domain: str, tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, int]:
        """A domain's probes as rows (rows, length + 1) of tokens, and how many bytes their targets stand for.

        What does not fill the last row is left out, unless there is no other.
        """
        tokens = [np.array([tokenizer.separator], np.int32)]
        sizes = [np.zeros(1)]
        for _, text in self._kept[domain]:
            ids = tokenizer.encode(text)
            tokens += [ids, np.array([tokenizer.separator], np.int32)]
            sizes += [np.full(len(ids), len(text.encode("utf-8")) / max(len(ids), 1)), np.zeros(1)]
        flat, weights = np.concatenate(tokens), np.concatenate(sizes)
        length = min(length, len(flat) - 1)
        starts = np.arange((len(flat) - 1) // length) * length
        places = starts[:, None] + np.arange(length + 1)
        return flat[places].astype(np.int64), round(float(weights[places[:, 1:]].sum()))

    def record(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Take in an evaluation, bits per byte by domain; the figures under their names in MLflow."""
        for domain, loss in losses.items():
            self.losses.setdefault(domain, []).append(loss)
        figures = {f"probe/{metric_name(domain)}/bits_per_byte": loss for domain, loss in losses.items()}
        if losses:
            figures["probe/mean_bits_per_byte"] = sum(losses.values()) / len(losses)
            figures["probe/worst_bits_per_byte"] = max(losses.values())
            figures["probe/forgetting"] = lost_since_best(self.losses)
            figures["probe/stability_gap"] = stability_gap(self.losses)
        return figures

    def last(self) -> dict[str, float]:
        """The last loss of each domain."""
        return {domain: curve[-1] for domain, curve in self.losses.items()}

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON can hold it."""
        return {"kept": self._kept, "losses": self.losses}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        self._kept = {domain: [(key, text) for key, text in kept] for domain, kept in state["kept"].items()}
        self.losses = {domain: list(curve) for domain, curve in state["losses"].items()}


@torch.no_grad()
def probe_losses(
    model: Reader,
    probes: Probes,
    domains: Iterable[str],
    tokenizer: Tokenizer,
    length: int,
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """Bits per byte on the probes of some domains; every rank must call it."""
    was_training = model.training
    model.eval()
    losses = {}
    for domain in domains:
        rows, size = probes.rows(domain, tokenizer, length)
        losses[domain] = token_losses(model, rows, rank, world).sum().item() / math.log(2) / max(size, 1)
    model.train(was_training)
    return losses

"""Retention probes: a little of every domain, held out for good, and what the model still makes of it.

Which records are held out is decided by a hash of their text (`nestling.data.split`): the same text is never trained
on, however often it comes, and no random state is needed. Of a domain's held-out records those with the smallest hashes
are kept, up to a number of bytes: a uniform sample that does not depend on the order in which records came.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import numpy as np
import torch

from nestling.data.tokenizer import Tokenizer
from nestling.evaluation.heldout import Reader, token_losses
from nestling.evaluation.prequential import metric_name, told_apart

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
        #: Of each domain in bits per byte: the last loss, the lowest so far, and the largest rise above that so far.
        self.curves: dict[str, tuple[float, float, float]] = {}

    def add(self, domain: str, text: str) -> None:
        """Offer a held-out record."""
        kept = self._kept.setdefault(told_apart(domain or ALL, self._kept), [])
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
        """Take in an evaluation, bits per byte by domain; the figures under their names in MLflow.

        Forgetting and stability gap are `lost_since_best` and `stability_gap` of `nestling.evaluation.retention`, kept
        up in constant memory.
        """
        for domain, loss in losses.items():
            _, lowest, rise = self.curves.get(domain, (loss, loss, 0.0))
            lowest = min(lowest, loss)
            self.curves[domain] = (loss, lowest, max(rise, loss - lowest))
        figures = {f"probe/{metric_name(domain)}/bits_per_byte": loss for domain, loss in losses.items()}
        if losses:
            figures["probe/mean_bits_per_byte"] = sum(losses.values()) / len(losses)
            figures["probe/worst_bits_per_byte"] = max(losses.values())
            curves = self.curves.values()
            figures["probe/forgetting"] = fmean(last - lowest for last, lowest, _ in curves)
            figures["probe/stability_gap"] = fmean(rise for _, _, rise in curves)
        return figures

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON can hold it."""
        return {"kept": self._kept, "curves": self.curves}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        self._kept = {domain: [(key, text) for key, text in kept] for domain, kept in state["kept"].items()}
        self.curves = {domain: (last, lowest, rise) for domain, (last, lowest, rise) in state["curves"].items()}


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

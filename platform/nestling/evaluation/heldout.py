"""Held-out loss, loss by position, and three questions to the memory.

A HOPE can train well and never use its memory. So every evaluation also measures the loss with the memories' writes
switched off, and what a passage costs when it is read a second time, beside the same passage after another one. Work is
cut over the ranks in equal batches, because ZeRO-3 wants every rank to make the same calls; all ranks return the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nestling.config import JobConfig
from nestling.data import Corpus
from nestling.models.hope import mixers
from nestling.models.skeleton import LanguageModel

#: Sequences per forward pass.
BATCH = 8
#: Stretches of the sequence for which the loss is given.
POSITIONS = 8
#: Passages that are read twice, and their length in tokens (at most half a sequence).
PASSAGES, PASSAGE = 64, 128
#: Share of the evaluation's tokens on which the writes-off control runs.
CONTROL_TOKENS = 65536


@dataclass(frozen=True)
class Report:
    """One evaluation. Losses are nats a token over `tokens` predicted tokens; None: the model has no such part."""

    heldout_loss: float
    heldout_bits_per_byte: float
    #: Entropy of the byte histogram of the held-out text: what a model scores that knows only how often bytes occur.
    unigram_bits_per_byte: float
    tokens: int
    #: Bits per byte in each of eight equal stretches of the sequence.
    bits_per_byte_by_position: list[float]
    #: On `control_tokens` of the same text: with the memories writing, and with their writes switched off.
    control_tokens: int | None
    writes_on_bits_per_byte: float | None
    writes_off_bits_per_byte: float | None
    #: Passages read a second time, and the same passages after a different one.
    second_copy_bits_per_byte: float | None
    after_another_bits_per_byte: float | None
    #: Mean step size and retention gate of each self-modifying layer.
    eta: list[float]
    alpha: list[float]

    def as_dict(self) -> dict:
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """The figures under their names in MLflow."""
        named = {
            "heldout/loss": self.heldout_loss,
            "heldout/bits_per_byte": self.heldout_bits_per_byte,
            "heldout/unigram_bits_per_byte": self.unigram_bits_per_byte,
            "memory/writes_on_bits_per_byte": self.writes_on_bits_per_byte,
            "memory/writes_off_bits_per_byte": self.writes_off_bits_per_byte,
            "memory/second_copy_bits_per_byte": self.second_copy_bits_per_byte,
            "memory/after_another_bits_per_byte": self.after_another_bits_per_byte,
        }
        for name, values in (("eta", self.eta), ("alpha", self.alpha)):
            named |= {f"memory/layer{layer}/{name}": value for layer, value in enumerate(values)}
        return {name: value for name, value in named.items() if value is not None}


def heldout_report(
    model: LanguageModel, corpus: Corpus, config: JobConfig, tokens: int, rank: int = 0, world: int = 1
) -> Report:
    """Evaluate on up to `tokens` held-out tokens; every rank must call it with its rank and the number of ranks."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        report = _report(model, corpus, config.data.sequence_length, tokens, rank, world)
    model.train(was_training)
    return report


def _report(model: LanguageModel, corpus: Corpus, length: int, tokens: int, rank: int, world: int) -> Report:
    heldout = corpus.heldout.tokens
    length = min(length, len(heldout) - 1)
    rows = _rows(heldout, length, tokens // length)
    losses = _losses(model, rows, rank, world)
    gates = _gates(model, rows[:BATCH])
    mean = losses.mean().item()
    stretches = [part.mean().item() for part in losses.mean(0).tensor_split(min(POSITIONS, length))]
    control = _spread(len(rows), CONTROL_TOKENS // length)
    writing = None
    if gates:
        with _writes_off(model):
            still = _losses(model, rows[control], rank, world).mean().item()
        writing = losses[control].mean().item(), still
    copies = _copies(model, heldout, length, rank, world)

    def bits(nats: float) -> float:
        return corpus.bits_per_byte(nats, "heldout")

    return Report(
        heldout_loss=mean,
        heldout_bits_per_byte=bits(mean),
        unigram_bits_per_byte=corpus.heldout.unigram_bits_per_byte,
        tokens=losses.numel(),
        bits_per_byte_by_position=[bits(nats) for nats in stretches],
        control_tokens=len(control) * length if writing else None,
        writes_on_bits_per_byte=bits(writing[0]) if writing else None,
        writes_off_bits_per_byte=bits(writing[1]) if writing else None,
        second_copy_bits_per_byte=bits(copies[0]) if copies else None,
        after_another_bits_per_byte=bits(copies[1]) if copies else None,
        eta=[eta for eta, _ in gates],
        alpha=[alpha for _, alpha in gates],
    )


def _rows(tokens: np.ndarray, length: int, wanted: int) -> np.ndarray:
    """(rows, length + 1); neighbours share one token, so that each is predicted once. `wanted` rows, evenly spread."""
    starts = _spread((len(tokens) - 1) // length, wanted) * length
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)


def _spread(count: int, wanted: int) -> np.ndarray:
    """Numbers of `wanted` of `count` rows (at least one, at most all), evenly spread: a part stands for the whole."""
    chosen = max(1, min(count, wanted))
    return np.arange(chosen) * count // chosen


def _losses(model: LanguageModel, rows: np.ndarray, rank: int, world: int) -> Tensor:
    """Nats of every token (rows, T) float64 on the CPU; batches go round the ranks, the last round filled up."""
    device = next(model.parameters()).device
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    losses = torch.zeros(len(rows), rows.shape[1] - 1, dtype=torch.float64, device=device)
    for first in range(0, len(batches), world):
        number = first + rank
        batch = torch.from_numpy(batches[min(number, len(batches) - 1)]).to(device)
        logits, _ = model(batch[:, :-1])
        nats = F.cross_entropy(logits.float().transpose(1, 2), batch[:, 1:], reduction="none")
        if number < len(batches):
            losses[number * BATCH : number * BATCH + len(batch)] = nats.double()
    if world > 1:
        dist.all_reduce(losses)
    return losses.cpu()


def _copies(model: LanguageModel, tokens: np.ndarray, length: int, rank: int, world: int) -> tuple[float, float] | None:
    """Mean nats of passages after themselves and after another passage; None where the text is too short."""
    size = min(PASSAGE, length // 2)
    count = min(PASSAGES, len(tokens) // (2 * size) if size else 0)
    if count < 2:
        return None
    starts = np.linspace(0, len(tokens) - size, count).astype(np.int64)
    passages = tokens[starts[:, None] + np.arange(size)].astype(np.int64)
    results = []
    for before in (passages, np.roll(passages, count // 2, axis=0)):
        losses = _losses(model, np.concatenate([before, passages], axis=1), rank, world)
        results.append(losses[:, size:].mean().item())  # from the passage's second token on
    return results[0], results[1]


@contextmanager
def _writes_off(model: LanguageModel) -> Iterator[None]:
    layers = mixers(model)
    for layer in layers:
        layer.writes = False
    try:
        yield
    finally:
        for layer in layers:
            layer.writes = True


def _gates(model: LanguageModel, rows: np.ndarray) -> list[tuple[float, float]]:
    """(mean eta, mean alpha) of each self-modifying layer over these rows; every rank reads the same ones."""
    layers = mixers(model)
    for layer in layers:
        layer.gate_log = []
    try:
        if layers:
            _losses(model, rows, rank=0, world=1)
        return [gates for layer in layers for gates in layer.gate_log or []]
    finally:
        for layer in layers:
            layer.gate_log = None

"""Held-out loss, loss by position, and three questions to the memory.

A HOPE can train well and never use its memory. So every evaluation also measures the loss with the memories' writes
switched off, and what a passage costs when it is read a second time, beside the same passage after another one. Where
levels move while the model reads, it measures what the same text costs when they stay. Work is cut over the ranks in
equal batches, because ZeRO-3 wants every rank to make the same calls; all ranks return the same. Of a mix, each part is
read in proportion to its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nestling.config import JobConfig
from nestling.data import Corpus, Part
from nestling.data.corpus import bits_per_byte
from nestling.models.continuum import Continuum
from nestling.models.fast_state import Primed
from nestling.models.hope import mixers
from nestling.models.skeleton import LanguageModel

#: A model as `nestling.evaluation.reading` gives it.
Reader = LanguageModel | Continuum | Primed
#: Sequences per forward pass.
BATCH = 8
#: Stretches of the sequence for which the loss is given.
POSITIONS = 8
#: Passages that are read twice, and their length in tokens (at most half a sequence).
PASSAGES, PASSAGE = 64, 128
#: Share of the evaluation's tokens on which the controls run: writes off, levels still.
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
    #: On the same tokens, where levels move while the model reads (`continuum.drive`): so, and with levels that stay.
    levels_moving_bits_per_byte: float | None
    levels_still_bits_per_byte: float | None
    #: Passages read a second time, and the same passages after a different one.
    second_copy_bits_per_byte: float | None
    after_another_bits_per_byte: float | None
    #: Mean step size and retention gate of each self-modifying layer.
    eta: list[float]
    alpha: list[float]
    #: Of a mix: loss, bits per byte, unigram line and tokens of each part under its name; everything above is then the
    #: mean of the parts by their weights.
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict:
        """The figures by name; `parts` only for a mix."""
        return {name: value for name, value in asdict(self).items() if name != "parts" or value}

    def metrics(self) -> dict[str, float]:
        """The figures under their names in MLflow."""
        named = {
            "heldout/loss": self.heldout_loss,
            "heldout/bits_per_byte": self.heldout_bits_per_byte,
            "heldout/unigram_bits_per_byte": self.unigram_bits_per_byte,
            "memory/writes_on_bits_per_byte": self.writes_on_bits_per_byte,
            "memory/writes_off_bits_per_byte": self.writes_off_bits_per_byte,
            "memory/levels_moving_bits_per_byte": self.levels_moving_bits_per_byte,
            "memory/levels_still_bits_per_byte": self.levels_still_bits_per_byte,
            "memory/second_copy_bits_per_byte": self.second_copy_bits_per_byte,
            "memory/after_another_bits_per_byte": self.after_another_bits_per_byte,
        }
        for name, values in (("eta", self.eta), ("alpha", self.alpha)):
            named |= {f"memory/layer{layer}/{name}": value for layer, value in enumerate(values)}
        for part, figures in self.parts.items():
            named |= {f"heldout/{part}/{short}": figures[f"heldout_{short}"] for short in ("loss", "bits_per_byte")}
        return {name: value for name, value in named.items() if value is not None}


def heldout_report(
    model: Reader, corpus: Corpus, config: JobConfig, tokens: int, rank: int = 0, world: int = 1
) -> Report:
    """Evaluate on up to `tokens` held-out tokens; every rank must call it with its rank and the number of ranks."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        report = _report(model, corpus, config.data.sequence_length, tokens, rank, world)
    model.train(was_training)
    return report


@dataclass(frozen=True)
class _Measured:
    """What was measured on one part of the corpus; nats a token."""

    part: Part
    #: Of every token: (rows, tokens of a row).
    losses: Tensor
    #: Numbers of the controls' rows, and the mean over them with the writes switched off and with the levels still.
    control: np.ndarray
    writes_off: float | None
    levels_still: float | None
    #: Passages after themselves, and after another passage.
    copies: tuple[float, float] | None
    #: (eta, alpha) of each self-modifying layer.
    gates: list[tuple[float, float]]

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def uncontrolled(self) -> float:
        """The mean over the controls' rows with everything on."""
        return self.losses[self.control].mean().item()

    def by_position(self, stretches: int) -> list[float]:
        return [stretch.mean().item() for stretch in self.losses.mean(0).tensor_split(stretches)]


def _report(model: Reader, corpus: Corpus, length: int, tokens: int, rank: int, world: int) -> Report:
    measured = [_measure(model, part, length, tokens, rank, world) for part in corpus.parts]
    weights = [each.part.weight for each in measured]
    stretches = min(POSITIONS, *(each.losses.shape[1] for each in measured))
    places = zip(*(each.by_position(stretches) for each in measured), strict=True)
    writing = measured if measured[0].gates else []
    moving = measured if measured[0].levels_still is not None else []
    copying = [each for each in measured if each.copies]
    gates = np.average([each.gates for each in measured], axis=0, weights=weights)
    return Report(
        heldout_loss=float(np.average([each.loss for each in measured], weights=weights)),
        heldout_bits_per_byte=corpus.bits_per_byte([each.loss for each in measured]),
        unigram_bits_per_byte=corpus.unigram_bits_per_byte(),
        tokens=sum(each.losses.numel() for each in measured),
        bits_per_byte_by_position=[corpus.bits_per_byte(nats) for nats in places],
        control_tokens=sum(each.losses[each.control].numel() for each in writing or moving) or None,
        writes_on_bits_per_byte=_bits(writing, [each.uncontrolled for each in writing]),
        writes_off_bits_per_byte=_bits(writing, [each.writes_off for each in writing]),
        levels_moving_bits_per_byte=_bits(moving, [each.uncontrolled for each in moving]),
        levels_still_bits_per_byte=_bits(moving, [each.levels_still for each in moving]),
        second_copy_bits_per_byte=_bits(copying, [each.copies[0] for each in copying if each.copies]),
        after_another_bits_per_byte=_bits(copying, [each.copies[1] for each in copying if each.copies]),
        eta=[float(eta) for eta, _ in gates],
        alpha=[float(alpha) for _, alpha in gates],
        parts={each.part.name: _figures(each) for each in measured} if len(measured) > 1 else {},
    )


def _measure(model: Reader, part: Part, length: int, tokens: int, rank: int, world: int) -> _Measured:
    """Read the part's share of the tokens, and what the memories do on them."""
    heldout = part.heldout.tokens
    length = min(length, len(heldout) - 1)
    rows = _rows(heldout, length, round(tokens * part.weight) // length)
    losses = token_losses(model, rows, rank, world)
    gates = _gates(model, rows[:BATCH])
    control = _spread(len(rows), round(CONTROL_TOKENS * part.weight) // length)
    writes_off = levels_still = None
    if gates:
        with _writes_off(model):
            writes_off = token_losses(model, rows[control], rank, world).mean().item()
    if isinstance(model, Continuum):
        levels_still = token_losses(model.model, rows[control], rank, world).mean().item()
    copies = _copies(model, heldout, length, round(PASSAGES * part.weight), rank, world)
    return _Measured(part, losses, control, writes_off, levels_still, copies, gates)


def _bits(measured: list[_Measured], nats: list[Any]) -> float | None:
    """Bits per byte over the parts on which something was measured; None where it was on none."""
    return bits_per_byte([each.part for each in measured], nats) if measured else None


def _figures(each: _Measured) -> dict[str, float]:
    """What a report says of one part of a mix."""
    return {
        "heldout_loss": each.loss,
        "heldout_bits_per_byte": bits_per_byte([each.part], [each.loss]),
        "unigram_bits_per_byte": each.part.heldout.unigram_bits_per_byte,
        "tokens": each.losses.numel(),
    }


def _rows(tokens: np.ndarray, length: int, wanted: int) -> np.ndarray:
    """(rows, length + 1); neighbours share one token, so that each is predicted once. `wanted` rows, evenly spread."""
    starts = _spread((len(tokens) - 1) // length, wanted) * length
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)


def _spread(count: int, wanted: int) -> np.ndarray:
    """Numbers of `wanted` of `count` rows (at least one, at most all), evenly spread: a part stands for the whole."""
    chosen = max(1, min(count, wanted))
    return np.arange(chosen) * count // chosen


def token_losses(model: Reader, rows: np.ndarray, rank: int, world: int) -> Tensor:
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


def _copies(
    model: Reader, tokens: np.ndarray, length: int, wanted: int, rank: int, world: int
) -> tuple[float, float] | None:
    """Mean nats of passages after themselves and after another passage; None for fewer than two passages."""
    size = min(PASSAGE, length // 2)
    count = min(wanted, len(tokens) // (2 * size) if size else 0)
    if count < 2:
        return None
    starts = np.linspace(0, len(tokens) - size, count).astype(np.int64)
    passages = tokens[starts[:, None] + np.arange(size)].astype(np.int64)
    results = []
    for before in (passages, np.roll(passages, count // 2, axis=0)):
        losses = token_losses(model, np.concatenate([before, passages], axis=1), rank, world)
        results.append(losses[:, size:].mean().item())  # from the passage's second token on
    return results[0], results[1]


@contextmanager
def _writes_off(model: Reader) -> Iterator[None]:
    layers = mixers(model)
    for layer in layers:
        layer.writes = False
    try:
        yield
    finally:
        for layer in layers:
            layer.writes = True


def _gates(model: Reader, rows: np.ndarray) -> list[tuple[float, float]]:
    """(mean eta, mean alpha) of each self-modifying layer over these rows; every rank reads the same ones.

    Where levels move, a layer is called once a block of tokens.
    """
    layers = mixers(model)
    for layer in layers:
        layer.gate_log = []
    try:
        if layers:
            token_losses(model, rows, rank=0, world=1)
        logs = [np.array(layer.gate_log) for layer in layers]
        return [tuple(np.average(log[:, :2], axis=0, weights=log[:, 2])) for log in logs]
    finally:
        for layer in layers:
            layer.gate_log = None

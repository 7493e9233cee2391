"""A stream of domains as a trial: learnt once, in their order, with every domain's probes read at each domain's end.

It is the training of `nestling stream`, a job with overrides, over records read by the same functions; only Ray Data,
snapshots and books are left out, because a trial is one process that is not to survive anything.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from nestling.config import JobConfig, from_yaml
from nestling.data import Tokenizer
from nestling.data.streams import Interval, Record, Rules, open_stream
from nestling.data.streams.content import Content, batches, read_window
from nestling.data.streams.five_domains import NAME, ORDER
from nestling.data.streams.windows import Plan
from nestling.evaluation import retention
from nestling.evaluation.probes import probe_losses
from nestling.models.hope import mixers
from nestling.training.alone import form_group
from nestling.training.stream_loop import StreamTraining
from nestling.tuning.reproductions.experiment import Outcome

#: `jobs/five-domains.yaml` without what only a run of its own needs, at the size of a trial.
JOB = """
data: {source: "embedded:five-domains", sequence_length: 256}
model: {name: hope, vocab_size: 257, width: 64, layers: 2, heads: 2}
levels: [{width: 64, period: 1}, {width: 64, period: 1}, {width: 64, period: 1}]
training: {steps: null, batch_tokens: 1024, learning_rate: 2.0e-3, schedule: constant, warmup_steps: 20}
stream: {probe_percent: 10, probe_bytes: 8192}
"""
LEARN, FORGETTING, BACKWARD, SHARE, FINAL, WRITES_OFF, WORST, PREQUENTIAL = METRICS = (
    *("just learnt", "forgetting", "BWT", "lost share (%)"),
    *("final mean", "final mean, writes off", "worst domain", "prequential"),
)


@dataclass(frozen=True)
class Stream:
    """Learn the five domains and read the probes before the first and after each: a `Work`.

    The seed decides the initial weights, what is replayed, which records of a domain are read and in which order; the
    last two are the same for every arm. Of the shuffled source the same records come in one order over all domains,
    and what is measured at the ends of domains is left out.

    Attributes:
        overrides: of `JOB`, as a person would write them.
        domain_bytes: text that is trained on, of each domain.
        learnt: domains that are trained on; to those after them the model only has what reading a probe changes.
        pretrained: text of each domain that is learnt first, all domains in one order; other records than the stream's.
    """

    overrides: tuple[str, ...] = ()
    domain_bytes: int = 50_000
    learnt: int = len(ORDER)
    pretrained: int = 0

    def __call__(self, seed: int) -> Outcome:
        config = from_yaml(JOB, (*self.overrides, f"seed={seed}"))
        content = _read(config)
        in_order, run = config.data.source == NAME, _Run(config, content.held)
        if self.pretrained:
            run.learn(earlier(content.trained, self.domain_bytes, self.pretrained, seed))
        matrix = [run.losses()]
        for number, part in enumerate(parts(content.trained, in_order, self.domain_bytes, seed)):
            if number < self.learnt:
                run.learn(part)
            matrix.append(run.losses() if number < self.learnt else matrix[-1])
        metrics = figures(matrix, in_order) | run.writes_off()
        if self.learnt == len(ORDER) and not self.pretrained:
            metrics |= {PREQUENTIAL: run.training.prequential.bits_per_byte or math.nan}
        if run.diverged:
            metrics = dict.fromkeys(metrics, math.nan)
        return Outcome(
            metrics=metrics,
            chance=_chance(content.held),
            tokens=int(run.training.prequential.metrics()["prequential/bytes"]),
            parameters=sum(shape.numel() for shape in run.training.shapes.values()),
            validation=None if run.diverged else -metrics.get(PREQUENTIAL, 0.0),
            details={"losses": matrix, "updates": dict(run.training.levels.updates)},
        )


class _Run:
    def __init__(self, config: JobConfig, held: Sequence[Record]) -> None:
        form_group()
        self.training = StreamTraining(config, torch.device("cpu"), 0, 1)
        self._tokenizer, self._length = Tokenizer.bytes(), config.data.sequence_length
        self._rows = config.training.batch_tokens // self._length
        for record in held:
            self.training.probes.add(record.domain, record.text)

    def learn(self, records: Sequence[Record]) -> None:
        for batch in batches(records, self._tokenizer, self._length, self._rows):
            self.training.learn(batch)

    def losses(self) -> list[float]:
        """Bits per byte on the probes of each domain."""
        found = probe_losses(self.training.reader, self.training.probes, ORDER, self._tokenizer, self._length)
        return [found[domain] for domain in ORDER]

    def writes_off(self) -> dict[str, float]:
        """The mean over the probes with no memory written, where the model has any; they stay off."""
        memories = mixers(self.training.model)
        for memory in memories:
            memory.writes = False
        return {WRITES_OFF: fmean(self.losses())} if memories else {}

    @property
    def diverged(self) -> bool:
        """Whether the last steps moved nothing because losses or gradients were not finite."""
        return self.training.guard.in_a_row >= self.training.config.training.max_skipped


def parts(records: Sequence[Record], in_order: bool, domain_bytes: int, seed: int) -> list[list[Record]]:
    """What is learnt between two looks at the probes: a domain each, or equal parts of the shuffled records."""
    chosen = _first(records, domain_bytes, seed)
    if in_order:
        return chosen
    mixed = _mixed(chosen, seed)
    return [mixed[len(mixed) * n // len(ORDER) : len(mixed) * (n + 1) // len(ORDER)] for n in range(len(ORDER))]


def earlier(records: Sequence[Record], domain_bytes: int, size: int, seed: int) -> list[Record]:
    """`size` bytes of each domain, mixed, beyond the `domain_bytes` that `parts` takes with this seed."""
    taken, more = (_first(records, count, seed) for count in (domain_bytes, domain_bytes + size))
    return _mixed([long[len(short) :] for short, long in zip(taken, more, strict=True)], seed)


def _first(records: Sequence[Record], domain_bytes: int, seed: int) -> list[list[Record]]:
    """Of each domain the first records, in the order of the seed, that hold so many bytes."""
    chosen: dict[str, list[Record]] = {domain: [] for domain in ORDER}
    sizes = dict.fromkeys(ORDER, 0)
    for record in sorted(records, key=lambda record: _place(record, seed)):
        if sizes[record.domain] < domain_bytes:
            sizes[record.domain] += len(record.text.encode("utf-8"))
            chosen[record.domain].append(record)
    return list(chosen.values())


def _mixed(chosen: Sequence[Sequence[Record]], seed: int) -> list[Record]:
    return sorted((record for part in chosen for record in part), key=lambda record: _place(record, seed))


def _place(record: Record, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {record.key}".encode()).digest()


def figures(matrix: retention.Matrix, in_order: bool) -> dict[str, float]:
    """What follows from losses `matrix[i][j]` on domain j after i domains; of a shuffled stream only the last row."""
    found = {FINAL: fmean(matrix[-1]), WORST: max(matrix[-1])}
    if in_order:
        found |= {
            LEARN: retention.plasticity(matrix),
            FORGETTING: retention.forgetting_loss(matrix),
            BACKWARD: retention.backward_transfer_loss(matrix),
        }
        if all(min(losses) < losses[0] for losses in zip(*matrix, strict=True)):  # of nothing learnt, there is no share
            found[SHARE] = 100 * retention.normalised_forgetting(matrix)
    return found


def _read(config: JobConfig) -> Content:
    """The whole source as one window."""
    source = open_stream(config)
    (end,) = source.ends({}).values()
    return read_window(source, Plan(0, (Interval("0", 0, end),)), Rules(held_percent=config.stream.probe_percent), {})


def _chance(held: Sequence[Record]) -> dict[str, float]:
    """What a model scores that knows only how often each byte occurs in a domain; it forgets nothing."""
    entropies = [unigram_entropy([record.text for record in held if record.domain == domain]) for domain in ORDER]
    return {FORGETTING: 0.0, **dict.fromkeys((LEARN, FINAL, PREQUENTIAL), fmean(entropies))}


def unigram_entropy(texts: Sequence[str]) -> float:
    """Entropy of the byte histogram of some texts, bits per byte."""
    counts = np.bincount(np.frombuffer("".join(texts).encode("utf-8"), np.uint8))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())

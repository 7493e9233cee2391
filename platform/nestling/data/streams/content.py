"""What a window holds once it is read: text to train on in batches, and what became of every other record.

A window is complete in itself. Its tokens fill sequences one after another, the first of which begins with a
separator, so that every token is predicted exactly once; what the last batch lacks is masked. Nothing runs on into the
next window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nestling.data.feed import IGNORED
from nestling.data.split import bucket, threshold
from nestling.data.streams.source import Broken, Interval, Record, StreamSource
from nestling.data.streams.windows import Plan
from nestling.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rules:
    """What decides about a record besides its content.

    Attributes:
        lateness: seconds by which event times may lag behind; None: nothing is late.
        aside: whether late records are set aside instead of trained on.
        held_percent: share of the records that is held out, by a hash of their text.
        unlearnt: names of the sources that no weights learn from, so that nothing need be held out of them.
    """

    lateness: float | None = None
    aside: bool = True
    held_percent: float = 0.0
    unlearnt: frozenset[str] = frozenset()


@dataclass
class Counted:
    """One interval of a window: what the ledger says of it."""

    interval: Interval
    records: int = 0
    dead: int = 0
    late: int = 0
    held: int = 0
    sha256_of_record_ids: str = ""


@dataclass
class Content:
    """A window that was read.

    Attributes:
        plan: which one.
        source: name of the source of all its records.
        trained: its records to train on, in their order.
        counted: each of its intervals.
        letters: its broken records; `late` its late ones that are set aside; `held` those held out as probes.
        latest: of each source the latest event time of this and all earlier windows.
    """

    plan: Plan
    source: str
    trained: list[Record] = field(default_factory=list)
    counted: list[Counted] = field(default_factory=list)
    letters: list[Broken] = field(default_factory=list)
    late: list[Record] = field(default_factory=list)
    held: list[Record] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """All but the text, as JSON can hold it."""
        return {
            "window": self.plan.number,
            "source": self.source,
            "counted": [asdict(counted) for counted in self.counted],
            "letters": [asdict(letter) for letter in self.letters],
            "late": [asdict(record) for record in self.late],
            "held": [{"domain": record.domain, "text": record.text} for record in self.held],
            "latest": self.latest,
        }


@dataclass(frozen=True)
class Batch:
    """Sequences of one step.

    Attributes:
        inputs, targets: (sequences, sequence_length) int32; `IGNORED` where nothing is to be predicted.
        domains: (sequences, sequence_length) int16, the place in `names` of the domain of the target.
        names: the domains in the batch.
        bytes: UTF-8 bytes of the text that is predicted, of each of them.
    """

    inputs: np.ndarray
    targets: np.ndarray
    domains: np.ndarray
    names: list[str]
    bytes: list[int]


def read_window(source: StreamSource, plan: Plan, rules: Rules, latest: Mapping[str, float]) -> Content:
    """Read the records of a window and sort them.

    Args:
        latest: of each source the latest event time of earlier windows.
    """
    origin = source.part(plan.intervals[0].partition).name
    content = Content(plan, origin, latest=dict(latest))
    watermark = latest[origin] - rules.lateness if origin in latest and rules.lateness is not None else None
    percent = 0.0 if origin in rules.unlearnt else rules.held_percent
    for interval in plan.intervals:
        counted, ids = Counted(interval), hashlib.sha256()
        for record in source.read(interval):
            counted.records += 1
            ids.update(f"{record.partition}:{record.offset}\n".encode())
            if isinstance(record, Broken):
                counted.dead += 1
                content.letters.append(record)
                continue
            late = watermark is not None and record.event_time is not None and record.event_time < watermark
            counted.late += late
            held = bucket(record.text) < threshold(percent)
            counted.held += held
            place = content.held if held else content.late if late and rules.aside else content.trained
            place.append(record)
            if record.event_time is not None:
                content.latest[origin] = max(record.event_time, content.latest.get(origin, record.event_time))
        counted.sha256_of_record_ids = ids.hexdigest()
        content.counted.append(counted)
    return content


def batches(
    records: Iterable[Record], tokenizer: Tokenizer, length: int, rows: int, lanes: bool = False
) -> list[Batch]:
    """The text of some records in batches of `rows` sequences of `length` tokens, each token predicted once.

    Args:
        lanes: whether each row of a batch goes on where that row ended in the batch before, so that it can be read with
            the state that was left there: the text is cut into `rows` equal stretches, and batch t holds the tokens
            [t length, (t + 1) length) of each. Otherwise sequences follow one another row by row.
    """
    names: dict[str, int] = {}
    tokens, domains, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.int16)], [np.zeros(0, np.float64)]
    for record in records:
        ids = tokenizer.encode(record.text)
        # A token's share of its record's bytes: exact where a token is a byte, and in the sum everywhere.
        size = np.full(len(ids), len(record.text.encode("utf-8")) / max(len(ids), 1))
        if record.whole:
            ids, size = np.append(ids, np.int32(tokenizer.separator)), np.append(size, 0.0)
        tokens.append(ids)
        sizes.append(size)
        domains.append(np.full(len(ids), names.setdefault(record.domain, len(names)), np.int16))
    flat, of, weights = np.concatenate(tokens), np.concatenate(domains), np.concatenate(sizes)
    known, made = list(names), []
    for places in (_lanes if lanes else _sequences)(len(flat), rows, length):
        there = places >= 0
        targets = np.full(places.shape, IGNORED, np.int32)
        inputs = np.full(places.shape, tokenizer.separator, np.int32)
        domain = np.zeros(places.shape, np.int16)
        targets[there] = flat[places[there]]
        inputs[places > 0] = flat[places[places > 0] - 1]
        found = of[places[there]]
        here = sorted(set(found.tolist()))
        number_of = np.zeros(len(known), np.int16)
        number_of[here] = np.arange(len(here), dtype=np.int16)
        domain[there] = number_of[found]
        bytes_of = [round(float(weights[places[there]][found == number].sum())) for number in here]
        made.append(Batch(inputs, targets, domain, [known[number] for number in here], bytes_of))
    return made


def _sequences(count: int, rows: int, length: int) -> np.ndarray:
    """Places in the text (batches, rows, length), -1 where the last batch is filled up."""
    places = np.arange(-(-count // (rows * length)) * rows * length)
    return np.where(places < count, places, -1).reshape(-1, rows, length)


def _lanes(count: int, rows: int, length: int) -> np.ndarray:
    """The same in lanes, whose lengths differ by one token at most: no lane is filled up by more than it has to be."""
    sizes = count // rows + (np.arange(rows) < count % rows)
    columns = np.arange(-(-sizes[0] // length) * length)
    places = np.where(columns < sizes[:, None], (np.cumsum(sizes) - sizes)[:, None] + columns, -1)
    return places.reshape(rows, -1, length).swapaxes(0, 1)

"""The `stream` section of a job: how `nestling stream` reads a source without end, and what it keeps of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nestling.config.checks import fraction, need, not_negative, positive, whole
from nestling.config.data import SourceConfig, check_sources


@dataclass
class StreamSourceConfig(SourceConfig):
    """One of a stream's sources, and its policy."""

    #: Names of the levels that its records may write (`base`: what is in no level). Null: all. An empty list: none,
    #: they are only read and scored.
    levels: list[str] | None = None


@dataclass
class StreamConfig:
    """Records and windows.

    A stream is read in windows: bounded stretches of each partition, planned before they are read. A window is trained
    on as a whole; a snapshot may lie in the middle of one.
    """

    #: Several sources, which take turns, in the place of `data.source`.
    sources: list[StreamSourceConfig] | None = None
    #: UTF-8 bytes of text after which a window is full. A window without trainable text takes no step.
    window_bytes: int = 65536
    #: Windows that may be read ahead of the one being trained on: what bounds the memory of reading.
    windows_ahead: int = 2
    #: Seconds after which a window is closed that is not full, counted from when it could have been begun.
    close_after: float = 5.0
    #: Seconds from one look for new data to the next where there is none.
    poll_every: float = 0.5
    #: Seconds without a change after which the last line of a file counts as whole though no newline ends it.
    settle_after: float = 10.0
    #: Field of JSON records and Parquet rows with the record's key; null: its partition and offset.
    key_column: str | None = None
    #: Field with the event time: seconds since 1970, or a text in ISO 8601. Null: Kafka's own, others have none.
    time_column: str | None = None
    #: Field with the domain by which losses and probes are told apart. Null: records have none.
    domain_column: str | None = None
    #: Largest record in bytes; a larger one is a broken one.
    record_bytes: int = 1 << 20
    #: Share of a window's records that may be broken. More of them, and more than one, stop the stream.
    dead_share: float = 0.1
    #: Seconds by which an event time may lag behind the latest one of earlier windows; null: nothing is late.
    lateness: float | None = None
    #: What becomes of late records: `aside` writes them to late.jsonl, `train` trains on them and counts them.
    late: Literal["aside", "train"] = "aside"
    #: Share of the records, in per cent, that is held out as probes: by a hash of the text, and for good.
    probe_percent: float = 2.0
    #: Bytes of probes kept of each domain.
    probe_bytes: int = 16384
    #: Steps from one evaluation of the probes to the next; 0: none, and nothing is held out.
    probe_every: int = 200
    #: The drift detector (Page-Hinkley, one-sided) on the loss before learning, in bits per byte: the rise that it
    #: tolerates, and the sum of rises beyond that at which it gives the alarm.
    drift_delta: float = 0.1
    drift_threshold: float = 3.0
    #: Whether a window is undone that damages the probes without improving on what is held out of it. Snapshots then
    #: lie at the end of every window, and a window needs so many records that `probe_percent` holds some out.
    guard: bool = False
    #: Replay: sequences of the past in each batch, as a share of its new ones (0.05: one to twenty, on average); 0:
    #: none.
    replay_share: float = 0.0
    #: Bytes of memory for the sequences that are kept to be replayed, a uniform sample of all so far.
    replay_bytes: int = 1 << 20
    #: DER++: weight of the mean squared difference of a replayed token's logits from those that it gave when it was
    #: learnt, beside its cross-entropy; 0: none. The logits take 2 bytes x the vocabulary for each token of
    #: `replay_bytes`, which then holds much less.
    der_alpha: float = 0.0
    #: Online elastic weight consolidation: weight of the penalty that holds the weights that have mattered so far; 0:
    #: none. It is measured against the squares of clipped gradients, so that useful values are large.
    ewc_strength: float = 0.0
    #: Steps from one consolidation to the next, and what is then kept of the importance of earlier ones.
    ewc_every: int = 50
    ewc_decay: float = 0.9
    #: Learning-rate re-warming: factor on all rates to which they rise after an alarm of drift; 1: they do not.
    rewarm_factor: float = 1.0
    #: Steps of that rise, and of the decay back to where the schedule is.
    rewarm_steps: int = 10
    redecay_steps: int = 50
    #: Whether memories and other fast state go on from batch to batch and window to window, instead of beginning anew
    #: with every sequence: a window is then laid out in lanes, in which each row goes on where it ended.
    carry_state: bool = False
    #: Factor of the fading prequential loss: how much of the past is left after a step.
    fading: float = 0.98

    @property
    def policies(self) -> dict[str, list[str] | None]:
        """Of each of several sources `levels`, see `StreamSourceConfig`; empty for a stream with one."""
        return {str(part.name): part.levels for part in self.sources or ()}

    def __post_init__(self) -> None:
        if self.sources is not None:
            check_sources("stream.sources", self.sources, "[{source: texts}, {source: chat, levels: [level1]}]")
        need("stream", self, "at least 1", whole, "window_bytes", "windows_ahead", "record_bytes")
        need("stream", self, "a finite value of at least 0", not_negative, "close_after", "settle_after", "lateness")
        need("stream", self, "at least 1", whole, "probe_bytes", "replay_bytes", "ewc_every")
        need("stream", self, "at least 1", whole, "rewarm_steps", "redecay_steps")
        need("stream", self, "a finite value of at least 1", lambda value: 1 <= value < math.inf, "rewarm_factor")
        need("stream", self, "a fraction from 0 to 1", fraction, "replay_share", "ewc_decay")
        need("stream", self, "a finite value of at least 0", not_negative, "ewc_strength", "der_alpha")
        need("stream", self, "at least 0", lambda value: value >= 0, "probe_every")
        need("stream", self, "at least 0 and below 100", lambda value: 0 <= value < 100, "probe_percent")
        need("stream", self, "a finite value of at least 0", not_negative, "drift_delta")
        need("stream", self, "a finite value above 0", positive, "drift_threshold")
        need("stream", self, "a value from 0.01 on", lambda value: value >= 0.01, "poll_every")
        need("stream", self, "a fraction from 0 to 1", fraction, "dead_share")
        need("stream", self, "a value above 0 and at most 1", lambda value: 0 < value <= 1, "fading")
        if self.der_alpha and not self.replay_share:
            raise ValueError(
                f"stream.der_alpha: got {self.der_alpha}, but nothing is replayed whose logits could be kept; give "
                "stream.replay_share, for example 0.05"
            )
        if self.guard and not (self.probe_every and self.probe_percent):
            raise ValueError(
                "stream.guard: judges windows by what is held out of them; needs stream.probe_every and "
                "stream.probe_percent above 0"
            )

    def replay_room(self, length: int, vocabulary: int) -> int:
        """Sequences that `replay_bytes` hold, of `length` tokens: inputs and targets, and for DER++ the logits."""
        return self.replay_bytes // self._sequence_bytes(length, vocabulary)

    def check_replay(self, length: int, vocabulary: int) -> None:
        """Raises ValueError if there is room for no sequence at all."""
        if self.replay_share and not self.replay_room(length, vocabulary):
            logits = f" and logits of {vocabulary} tokens" if self.der_alpha else ""
            raise ValueError(
                f"stream.replay_bytes: got {self.replay_bytes}, but one sequence of data.sequence_length={length}"
                f"{logits} takes {self._sequence_bytes(length, vocabulary)}; give room for many"
            )

    def _sequence_bytes(self, length: int, vocabulary: int) -> int:
        return length * (2 * 4 + (2 * vocabulary if self.der_alpha else 0))

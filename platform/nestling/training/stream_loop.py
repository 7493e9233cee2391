"""The state of a training on a stream: the loop's, where the stream stands, and what was lost before it was learnt.

Every batch is scored by the step that trains on it, before it moves anything, so the prequential loss costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.config import JobConfig
from nestling.config.stream import StreamConfig
from nestling.data.feed import IGNORED
from nestling.data.streams import Batch, Opening, Position
from nestling.evaluation.drift import PageHinkley
from nestling.evaluation.prequential import Prequential
from nestling.evaluation.probes import Probes
from nestling.models.fast_state import Continuing
from nestling.optim import EWC, Levels
from nestling.training.dark import DarkKnowledge
from nestling.training.guard import Guard
from nestling.training.lanes import Lanes
from nestling.training.loop import TrainingLoop
from nestling.training.replay import Replay
from nestling.training.schedule import rewarming

#: How the names begin of the tensors that go on from batch to batch.
FAST = "fast/"


def hold(levels: Levels, stream: StreamConfig) -> None:
    """Have all levels hold the weights that have mattered, if the job says so."""
    if stream.ewc_strength:
        for group in levels.param_groups:
            group["ewc"] = EWC(stream.ewc_strength, stream.ewc_every, stream.ewc_decay)


class StreamTraining(TrainingLoop):
    """A training whose batches come one after another, and only once.

    Attributes:
        position: where the next window begins.
        batches_done: batches of that window that were trained on.
        counts: records trained on, broken and late so far, whole windows only.
        records: records so far of each of several sources, whole windows only.
        prequential: the losses before learning; `window_nats` and `window_bytes` are those of the present window.
        probes: what is held out.
        detectors: of each source the detector of drift: going from one source to another is none.
        source: name of the present window's source.
        rollbacks: windows that were undone.
    """

    def __init__(
        self,
        config: JobConfig,
        device: torch.device,
        rank: int,
        world: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(config, device, rank, world, stopping)
        # A sudden rise is what a new domain looks like: only what is not finite is refused.
        self.guard = Guard(0.0)
        self.position, self.batches_done = Position(), 0
        self.counts = {"records": 0, "dead": 0, "late": 0}
        self.records = dict.fromkeys(config.stream.policies, 0)
        self.source = ""
        self.prequential = Prequential(config.stream.fading)
        self.probes = Probes(config.stream.probe_bytes)
        self.detectors: dict[str, PageHinkley] = {}
        #: Alarms of the detector, and the step of the last one.
        self.drifts, self.drifted = 0, 0
        #: Step of the last alarm that rates rise after: one that may not write every level raises none.
        self.rewarmed = 0
        self.rollbacks = 0
        self.window_nats = self.window_bytes = 0.0
        stream, length = config.stream, config.data.sequence_length
        assert config.model.vocab_size is not None
        vocabulary = config.model.vocab_size if stream.der_alpha else 0
        room = stream.replay_room(length, config.model.vocab_size)
        self.replay = Replay(stream.replay_share, room, length, config.seed, vocabulary)
        hold(self.levels, stream)
        #: What goes on from batch to batch, of each source by itself: a mood must not reach what others learn.
        self._lanes: dict[str, Lanes] = {}
        #: Rows of it that had to begin anew after the last step, and so far.
        self.anew = self.lanes_anew = 0
        #: What else the snapshot says, kept by rank 0's worker.
        self.files: dict[str, Any] = {}
        self._rows: tuple[np.ndarray, np.ndarray] | None = None
        self._tokens = 0
        self._parts: list[Tensor] = []
        self._dark: DarkKnowledge | None = None

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        assert self._rows is not None
        return self._rows

    def open(self, source: str) -> None:
        """Begin a window of a source, or go on with it: its policy says which levels it may write."""
        self.source = source
        allowed = self.config.stream.policies.get(source)
        self.levels.frozen = frozenset() if allowed is None else frozenset(self.levels.updates.keys() - set(allowed))

    @property
    def lanes(self) -> Lanes | None:
        """What goes on from batch to batch of the present window's source; None: every sequence begins anew."""
        if not self.config.stream.carry_state:
            return None
        return self._lanes_of(self.source if self.source in self.records else "")

    def _lanes_of(self, source: str) -> Lanes:
        rows = self.config.training.batch_tokens // self.config.data.sequence_length // self.world
        return self._lanes.setdefault(source, Lanes(rows))

    @property
    def lasting(self) -> bool:
        """Whether the present window may write every level: what may not is neither replayed nor a probe."""
        return not self.levels.frozen

    def learn(self, batch: Batch) -> None:
        """One optimizer step on a batch of the present window; all ranks with the same one."""
        *past, remembered = self.replay.draw(self.done + 1, len(batch.inputs) if self.lasting else 0)
        halves = (self._mine(new, old) for new, old in zip((batch.inputs, batch.targets), past, strict=True))
        # Lanes end together: what fills up a window's last batch is not read, so that it leaves nothing in the state.
        width = batch.inputs.shape[1] if self.lanes is None else int((batch.targets != IGNORED).any(0).sum())
        inputs, targets = (np.concatenate(half)[:, :width].astype(np.int64) for half in halves)
        self._rows, self._tokens, self._parts = (inputs, targets), batch.inputs.size + past[0].size, []
        places = self.replay.places(batch.targets) if self.lasting else {}
        if self.config.stream.der_alpha:
            self._dark = self._dark_knowledge(len(batch.inputs), remembered, list(places))
        if self.lanes is not None:
            self.lanes.begin()
        self.step()
        if not self.refused and self.lasting:
            logits = None if self._dark is None else self._dark.kept(len(places))
            self.replay.add(batch.inputs, batch.targets, logits)
        (mine,) = self._mine(batch.domains)
        domains = torch.from_numpy(mine[:, :width].astype(np.int64)).to(self.device).flatten()
        new = torch.cat(self._parts)[: len(domains)].double()  # replayed ones come last
        # Nats of each domain, and rows that begin anew.
        figures = torch.zeros(len(batch.names) + 1, dtype=torch.float64, device=self.device)
        figures.index_add_(0, domains, new)
        if self.lanes is not None:
            if not self.refused:
                self.lanes.keep()
            figures[-1] = self.lanes.mend(new.view(-1, width).isfinite().all(1))
        dist.all_reduce(figures)
        *nats, anew = figures.tolist()
        self.anew, self.lanes_anew = int(anew), self.lanes_anew + int(anew)
        self.batches_done += 1
        by_domain = dict(zip(batch.names, nats, strict=True))
        if not math.isfinite(sum(by_domain.values())):
            return  # counted among the skipped steps; in a sum it would stay for ever
        self.prequential.add(by_domain, dict(zip(batch.names, batch.bytes, strict=True)))
        total, size = sum(by_domain.values()), sum(batch.bytes)
        filled = float((batch.targets != IGNORED).mean())
        if size and self._detector(self.source).add(total / math.log(2) / size, filled):
            self.drifts, self.drifted = self.drifts + 1, self.done
            if self.lasting:
                self.rewarmed = self.done
        self.window_nats += total
        self.window_bytes += size

    def close(self, opening: Opening) -> None:
        """Go on to the next window."""
        counted = opening.summary["counted"]
        for name in self.counts:
            self.counts[name] += sum(interval[name] for interval in counted)
        if self.source in self.records:
            self.records[self.source] += sum(interval["records"] for interval in counted)
        ends = {each["interval"]["partition"]: each["interval"]["end"] for each in counted}
        self.position = Position(self.position.window + 1, self.position.offsets | ends, opening.summary["latest"])
        self.batches_done, self.window_nats, self.window_bytes = 0, 0.0, 0.0

    def record(self) -> dict[str, float]:
        counts = {f"stream/{name}": float(value) for name, value in self.counts.items()}
        others = {
            "stream/window": float(self.position.window),
            "stream/drifts": float(self.drifts),
            "stream/rollbacks": float(self.rollbacks),
            "stream/lanes_anew": float(self.lanes_anew),
        }
        each = {f"stream/records/{name}": float(number) for name, number in self.records.items()}
        return super().record() | self.prequential.metrics() | counts | each | others

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "stream": {
                "position": asdict(self.position),
                "batches_done": self.batches_done,
                "counts": self.counts,
                "records": self.records,
                "prequential": self.prequential.state(),
                "probes": self.probes.state(),
                "detectors": {source: detector.state() for source, detector in self.detectors.items()},
                "drifts": [self.drifts, self.drifted, self.rewarmed],
                "rollbacks": self.rollbacks,
                "replayed_from": self.replay.seen,
                "fast": {source: lanes.numbers() for source, lanes in self._lanes.items()},
                "lanes_anew": self.lanes_anew,
                "window": [self.window_nats, self.window_bytes],
                "files": self.files,
            }
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        stream = state["stream"]
        self.position, self.batches_done = Position(**stream["position"]), stream["batches_done"]
        self.counts, self.records = dict(stream["counts"]), dict(stream["records"])
        self.prequential.load(stream["prequential"])
        self.probes.load(stream["probes"])
        self.detectors = {}
        for source, kept in stream["detectors"].items():
            self._detector(source).load(kept)
        self.drifts, self.drifted, self.rewarmed = stream["drifts"]
        self.rollbacks = stream["rollbacks"]
        self._seen, self._numbers = stream["replayed_from"], stream["fast"]
        self.lanes_anew = stream.get("lanes_anew", 0)  # older snapshots do not count them
        self.window_nats, self.window_bytes = stream["window"]
        self.files = stream["files"]

    def tensors(self) -> dict[str, Tensor]:
        return self.replay.tensors()

    def shares(self) -> dict[str, Tensor]:
        return {
            f"{FAST}{source}/{name}": mine
            for source, lanes in self._lanes.items()
            for name, mine in lanes.tensors().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.replay.load(self._seen, tensors)
        self._lanes = {}
        for source, numbers in self._numbers.items() if self.config.stream.carry_state else ():
            place = f"{FAST}{source}/"
            fast = {name.removeprefix(place): tensor for name, tensor in tensors.items() if name.startswith(place)}
            self._lanes_of(source).load(self.engine.module, self.rank, fast, numbers)

    def _trained(self) -> nn.Module:
        return super()._trained() if not self.config.stream.carry_state else Continuing(self.model)

    def _logits(self, inputs: Tensor) -> Tensor:
        return super()._logits(inputs) if self.lanes is None else self.lanes.read(self.engine, inputs)

    def _dark_knowledge(self, count: int, remembered: np.ndarray, kept: list[int]) -> DarkKnowledge:
        """DER++ of a step of `count` new sequences, of which the `kept` ones are going to be kept."""
        new, (mine,) = self._mine(np.arange(count))[0].tolist(), self._mine(remembered)
        wanted = {number: new.index(row) for number, row in enumerate(kept) if row in new}
        logits = torch.from_numpy(mine).to(self.device)
        return DarkKnowledge(self.config.stream.der_alpha, len(new), logits, wanted)

    def _detector(self, source: str) -> PageHinkley:
        stream = self.config.stream
        return self.detectors.setdefault(source, PageHinkley(stream.drift_delta, stream.drift_threshold))

    def _mine(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """This rank's rows of each array."""
        rank, world = self.rank, self.world
        return [array[rank * len(array) // world : (rank + 1) * len(array) // world] for array in arrays]

    def _share(self, targets: Tensor) -> float:
        # Ranks may have different numbers of replayed rows, and the gradient is the mean over ranks and micro-batches.
        return self._tokens / (self.world * self.engine.gradient_accumulation_steps())

    def _rate_factor(self) -> float:
        since = self.done - self.rewarmed if self.rewarmed else math.inf
        return super()._rate_factor() * rewarming(since, self.config.stream)

    def _penalty(self, logits: Tensor, targets: Tensor) -> Tensor | float:
        return 0.0 if self._dark is None else self._dark.penalty(logits, targets)

    def _nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        self._parts.append(each.detach())
        return each.sum()

"""The state of a training on one rank and its optimizer step; when to evaluate, log and save is the worker's concern.

The number of a step decides its batch, learning rate and chunk size, so that a position is just two numbers: the steps
done, and the batches passed over by going back to a checkpoint.
"""

from __future__ import annotations

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.config import JobConfig
from nestling.data import IGNORED, Corpus, Feed
from nestling.models import HopeConfig, build
from nestling.models.continuum import with_moving_levels
from nestling.models.hope import set_chunk_size
from nestling.training.engine import levels_of, make_engine, optimizer_step, set_rate
from nestling.training.groups import parameter_groups
from nestling.training.guard import Guard
from nestling.training.schedule import rate_factor


class TrainingLoop(ABC):
    """The state of a training loop on one rank, wherever its batches come from.

    Args:
        config: the job.
        device: where this rank computes.
        rank, world: number of this worker, and of workers.
        stopping: asked on rank 0 at every step whether training should stop after it.

    Attributes:
        done: optimizer steps taken, those that moved nothing included.
        passed_over: batches left out by going back to a checkpoint.
        loss: mean loss of the last step's batch, nats a token.
        refused: why the last step moved nothing; empty if it did.
        stop: whether rank 0 was asked to stop; equal on all ranks.
        until: a step after which it stops as if it had been asked to.
    """

    def __init__(
        self,
        config: JobConfig,
        device: torch.device,
        rank: int,
        world: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.device = config, device
        self.rank, self.world, self._stopping = rank, world, stopping
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        self.model = build(config.model).to(device)
        self.model.activation_checkpointing = config.training.activation_checkpointing
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        #: The model as evaluations read with it, and, if the outer gradient passes through the moves, as it is trained.
        self.reader = with_moving_levels(self.model, config.continuum)
        self.engine = make_engine(self._trained(), parameter_groups(self.model, config), config, world)
        self.levels = levels_of(self.engine)
        self.guard = Guard(config.training.spike_sigmas)
        self.done = self.passed_over = 0
        self.loss, self.gradient_norm, self._rate = math.nan, math.nan, math.nan
        self.refused, self.stop = "", False
        self.until: float = math.inf
        self.restart_clock()

    @abstractmethod
    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's inputs and targets of a batch, (sequences, sequence_length) integers; see `Feed.batch`."""

    def step(self) -> float:
        """One optimizer step; returns `loss`."""
        self.done += 1
        self._rate = self._rate_factor()
        set_rate(self.engine, self._rate)
        self._run_batch(self._judge)
        self._timed += 1
        self._ended = time.perf_counter()
        return self.loss

    def first_bad_gradient(self) -> str:
        """Go over the last batch once more, moving nothing, and name the first gradient from the loss backwards that is
        not finite, or else the largest one; every rank must call it."""
        seen: list[tuple[str, float]] = []

        def watch(name: str) -> Callable[[torch.Tensor], None]:
            return lambda gradient: seen.append((name, float(gradient.float().norm())))

        hooks = [parameter.register_hook(watch(name)) for name, parameter in self.model.named_parameters()]
        self._run_batch(lambda norm: True)
        for hook in hooks:
            hook.remove()
        mine = next(((name, norm) for name, norm in seen if not math.isfinite(norm)), None)
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, (mine, max(seen, key=lambda pair: pair[1], default=None)))
        for rank, (bad, _) in enumerate(everyone):
            if bad is not None:
                return (
                    f"the first gradient that is not finite, from the loss backwards, is that of {bad[0]} (rank {rank})"
                )
        largest = max((large for _, large in everyone if large is not None), key=lambda pair: pair[1])
        return f"all gradients are finite, the largest is that of {largest[0]} (norm {largest[1]:.3g})"

    def record(self) -> dict[str, float]:
        """The metrics of the last step; every rank takes part, because update norms are summed over shards."""
        training = self.config.training
        record = {
            "train/loss": self.loss,
            "train/tokens": self.done * training.batch_tokens,
            "train/tokens_per_second": self._tokens_per_second(),
            "train/learning_rate": self._rate * training.learning_rate,
            "train/gradient_norm": self.gradient_norm,
            "train/skipped_steps": self.guard.skipped,
        }
        squared = self.levels.pop_update_norms()
        names = sorted(self.levels.updates)
        norms = torch.tensor([float(squared.get(name, 0.0)) for name in names], device=self.device)
        if self.engine.zero_optimization():  # each rank moved its own shard
            dist.all_reduce(norms)
        for name, norm in zip(names, norms.sqrt().tolist(), strict=True):
            record[f"levels/{name}/updates"] = self.levels.updates[name]
            record[f"levels/{name}/update_norm"] = norm
        for group in self.engine.optimizer.param_groups:
            record[f"levels/{group['name']}/learning_rate"] = group["lr"]
        return {key: value for key, value in record.items() if math.isfinite(value)}

    def state(self) -> dict[str, Any]:
        """What `load_state` takes: all that is neither a tensor nor a rank's own, as JSON can hold it."""
        return {
            "step": self.done,
            "passed_over": self.passed_over,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "updates": self.levels.updates,
            "guard": self.guard.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the position and the counters of a state."""
        self.done, self.passed_over = state["step"], state["passed_over"]
        self.loss = math.nan if state["loss"] is None else state["loss"]
        self.levels.updates.update({name: n for name, n in state["updates"].items() if name in self.levels.updates})
        self.levels.moved = {}
        self.guard.load(state["guard"])

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors that belong into a checkpoint beside weights and optimizer state; equal on all ranks."""
        return {}

    def shares(self) -> dict[str, Tensor]:
        """The same, but of each tensor only this rank's stretch: all of one length, in the order of the ranks."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` and all ranks' `shares` gave, after `load_state`."""
        assert not tensors

    def load_moved(self, moved: Mapping[str, float]) -> None:
        """What this rank's shards have moved by since the last record."""
        self.levels.moved = {name: torch.tensor(norm, device=self.device) for name, norm in moved.items()}

    def layout(self) -> dict[str, Any]:
        """How the state is spread; a checkpoint of the same layout comes back to the bit."""
        training = self.config.training
        return {"workers": self.world, "zero_stage": training.zero_stage, "precision": training.precision}

    def restart_clock(self) -> None:
        """Leave what has been done since the last step out of the tokens per second."""
        self._timed = 0
        self._began = self._ended = time.perf_counter()

    def _rate_factor(self) -> float:
        """Share of the peak learning rates at step `done`."""
        return rate_factor(self.done, self.config.training)

    def _run_batch(self, refuse: Callable[[float], bool]) -> None:
        """Forward, backward and optimizer step on the batch of step `done`; sets its loss and gradient norm."""
        self.engine.train()
        model = self.config.model
        if isinstance(model, HopeConfig) and model.redraw_chunk_sizes:
            draw = random.Random(f"{self.config.seed} chunk size {self.done}")
            set_chunk_size(self.model, draw.choice(model.redraw_chunk_sizes))
        batch = (torch.from_numpy(half).to(self.device) for half in self.batch(self.done - 1 + self.passed_over))
        count = self.engine.gradient_accumulation_steps()
        pieces = list(zip(*(half.tensor_split(count) for half in batch), strict=True))
        # Sum of the losses, predicted tokens, and whether to stop: what all ranks have to know before they move.
        figures = torch.zeros(3, dtype=torch.float64, device=self.device)
        figures[2] = self.rank == 0 and (self.done >= self.until or self._stopping())
        for place, (inputs, targets) in enumerate(pieces):
            logits = self._logits(inputs)
            total = self._nats(logits, targets)
            self.engine.backward((total + self._penalty(logits, targets)) / self._share(targets))
            figures[0] += total.detach()
            figures[1] += (targets != IGNORED).sum()
            if place == len(pieces) - 1:
                dist.all_reduce(figures)
                nats, predicted, stop = figures.tolist()
                self.loss, self.stop = nats / predicted, stop > 0
            norm = optimizer_step(self.engine, self.config.training.clip, refuse)
        set_chunk_size(self.model, None)
        assert norm is not None
        self.gradient_norm = norm

    def _trained(self) -> nn.Module:
        """The model as the engine trains it."""
        return self.reader if self.config.continuum.drive == "meta" else self.model

    def _logits(self, inputs: Tensor) -> Tensor:
        """The logits of the next micro-batch."""
        logits, _ = self.engine(inputs)
        return logits

    def _nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of a micro-batch."""
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def _penalty(self, logits: Tensor, targets: Tensor) -> Tensor | float:
        """What training minimises beside the summed loss of a micro-batch, and does not report."""
        return 0.0

    def _share(self, targets: Tensor) -> float:
        """What a micro-batch's loss is divided by: each token weighs the same, however many are masked."""
        return targets.numel()

    def _judge(self, norm: float) -> bool:
        self.refused = self.guard.judge(self.loss, norm)
        return bool(self.refused)

    def _tokens_per_second(self) -> float:
        """Of the steps since the last record, so that the records add up to the seconds that a run has trained."""
        tokens, seconds = self._timed * self.config.training.batch_tokens, self._ended - self._began
        self.restart_clock()
        return tokens / seconds if seconds else math.nan


class Training(TrainingLoop):
    """A training on a prepared corpus, whose batches are found by their number.

    Args:
        config, corpus: the job and its prepared data.
        device, rank, world, stopping: see `TrainingLoop`.
    """

    def __init__(
        self,
        config: JobConfig,
        corpus: Corpus,
        device: torch.device,
        rank: int,
        world: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        length = config.data.sequence_length
        self.corpus = corpus
        self.feed = Feed(corpus, length, config.training.batch_tokens // length, config.seed, rank, world)
        super().__init__(config, device, rank, world, stopping)

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self.feed.batch(number)

    def record(self) -> dict[str, float]:
        bits = self.corpus.bits_per_byte(self.loss, "train")
        return super().record() | ({"train/bits_per_byte": bits} if math.isfinite(bits) else {})

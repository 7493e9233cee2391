"""What one Ray Train worker does: build, train, evaluate, leave the weights.

Every rank builds the same model from the seed, takes its rows of each global batch and steps DeepSpeed's engine. Rank 0
writes the log; the number of a step decides its batch, learning rate and chunk size, so a position is just a number.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nestling.checkpoint import save_weights
from nestling.config import JobConfig, from_yaml
from nestling.data import Corpus, Feed
from nestling.evaluation import heldout_report
from nestling.models import HopeConfig, build
from nestling.models.hope import set_chunk_size
from nestling.tracking import RunFolder, Tracker
from nestling.training.engine import full_weights, levels_of, make_engine, optimizer_step, set_rate
from nestling.training.groups import parameter_groups
from nestling.training.schedule import rate_factor

#: Steps over which tokens per second are averaged.
RATE_WINDOW = 20


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry point on every worker; rank 0's return value reaches the driver."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    config, folder = from_yaml(settings["config"]), RunFolder.open(settings["folder"])
    device = ray.train.torch.get_device() if config.training.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # two threads on two busy cores were up to 19 times slower
        torch.set_flush_denormal(True)  # a memory that decays to zero gets there five times faster
    rank, world = context.get_world_rank(), context.get_world_size()
    tracker = Tracker(folder, settings["tracking_uri"], settings["mlflow_run_id"]) if rank == 0 else None
    try:
        training = Training(config, Corpus.open(settings["corpus"]), device, rank, world, tracker)
        return training.run(folder)
    finally:
        if tracker is not None:
            tracker.close()


class Training:
    """The state of a training loop on one rank."""

    def __init__(
        self, config: JobConfig, corpus: Corpus, device: torch.device, rank: int, world: int, tracker: Tracker | None
    ) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        self.rank, self.world, self.tracker = rank, world, tracker
        sequences = config.training.batch_tokens // config.data.sequence_length
        self.feed = Feed(corpus.train, config.data.sequence_length, sequences, config.seed, rank, world)
        torch.manual_seed(config.seed)
        self.model = build(config.model).to(device)
        self.model.activation_checkpointing = config.training.activation_checkpointing
        self.engine = make_engine(self.model, parameter_groups(self.model, config), config, world)
        self.levels = levels_of(self.engine)
        self.gradient_norm: float | None = None
        self._ends: deque[float] = deque([time.perf_counter()], maxlen=RATE_WINDOW + 1)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        training = self.config.training
        started, paused, loss = time.perf_counter(), 0.0, math.nan
        for step in range(1, training.steps + 1):
            loss = self.step(step)
            record = self.record(step, loss) if step % training.log_every == 0 or step == training.steps else {}
            last = step == training.steps
            if last or (training.evaluate_every and step % training.evaluate_every == 0):
                began = time.perf_counter()
                tokens = self.config.evaluation.final_tokens if last else self.config.evaluation.tokens
                report = heldout_report(self.model, self.corpus, self.config, tokens, self.rank, self.world)
                record |= report.metrics()
                paused += time.perf_counter() - began
                self._ends = deque([time.perf_counter()], maxlen=RATE_WINDOW + 1)
            if record and self.tracker is not None:
                self.tracker.log(record, step)
        seconds = time.perf_counter() - started - paused
        weights = full_weights(self.engine, keep=self.rank == 0)
        if self.rank == 0:
            save_weights(weights, folder.weights)
        return {
            "steps": training.steps,
            "tokens": training.steps * training.batch_tokens,
            "train_loss": loss,
            "tokens_per_second": training.steps * training.batch_tokens / seconds,
            "evaluation": report.as_dict(),
        }

    def step(self, step: int) -> float:
        """One optimizer step; returns the mean loss of its global batch in nats a token."""
        self.engine.train()
        model = self.config.model
        if isinstance(model, HopeConfig) and model.redraw_chunk_sizes:
            draw = random.Random(f"{self.config.seed} chunk size {step}")
            set_chunk_size(self.model, draw.choice(model.redraw_chunk_sizes))
        set_rate(self.engine, rate_factor(step, self.config.training))
        rows = torch.from_numpy(self.feed.batch(step - 1)).to(self.device)
        pieces = rows.split(self.engine.train_micro_batch_size_per_gpu())
        total = torch.zeros((), device=self.device)
        for piece in pieces:
            logits, _ = self.engine(piece[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten())
            self.engine.backward(loss)
            self.gradient_norm = optimizer_step(self.engine, self.config.training.clip)
            total += loss.detach() / len(pieces)
        set_chunk_size(self.model, None)
        dist.all_reduce(total)
        mean = total.item() / self.world
        self._ends.append(time.perf_counter())
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss of step {step} is {mean}: training has diverged; lower training.learning_rate, "
                "model.eta_max or training.clip"
            )
        return mean

    def record(self, step: int, loss: float) -> dict[str, float]:
        """The metrics of a step; every rank takes part, because update norms are summed over shards."""
        training = self.config.training
        record = {
            "train/loss": loss,
            "train/bits_per_byte": self.corpus.bits_per_byte(loss, "train"),
            "train/tokens": step * training.batch_tokens,
            "train/tokens_per_second": self._tokens_per_second(),
            "train/learning_rate": rate_factor(step, training) * training.learning_rate,
        }
        if self.gradient_norm is not None:
            record["train/gradient_norm"] = float(self.gradient_norm)
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
        return record

    def _tokens_per_second(self) -> float:
        steps, seconds = len(self._ends) - 1, self._ends[-1] - self._ends[0]
        return steps * self.config.training.batch_tokens / max(seconds, 1e-9)

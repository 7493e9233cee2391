"""What one Ray Train worker does: take up the last checkpoint, train, evaluate, save, leave the weights.

All ranks walk through the same steps and make the same decisions; rank 0 writes the log. A worker group that replaces
one that died begins here too, so that starting, starting again and resuming are one thing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nestling.checkpoint import ResumeError, Store, export_weights, run_store
from nestling.config import JobConfig, from_yaml
from nestling.data import Corpus
from nestling.evaluation import heldout_report
from nestling.evaluation.heldout import Report
from nestling.tracking import RunFolder, Tracker
from nestling.training.keeper import Keeper
from nestling.training.loop import Training

#: Times that training goes back to the same checkpoint before it gives up.
RETURNS = 2


@dataclass(frozen=True)
class Post:
    """Where a worker stands: its job, folder and device, its rank among `world`, and rank 0's tracker."""

    config: JobConfig
    folder: RunFolder
    device: torch.device
    rank: int
    world: int
    tracker: Tracker | None


@contextmanager
def at_post(settings: dict[str, Any]) -> Iterator[Post]:
    """What every entry point of Ray Train begins with, from the settings that the driver sent."""
    import ray.train.torch

    config, folder = from_yaml(settings["config"]), RunFolder.open(settings["folder"])
    device = torch.device("cpu")
    if config.training.device == "cuda":
        device = torch.device("cuda", 0) if settings["part"].in_process else ray.train.torch.get_device()
    else:
        torch.set_num_threads(1)  # two threads on two busy cores were up to 19 times slower
        torch.set_flush_denormal(True)  # a memory that decays to zero gets there five times faster
    rank, world = dist.get_rank(), dist.get_world_size()  # Ray Train's own would not answer inside a trial of Ray Tune
    tracker = Tracker(folder, settings["tracking_uri"], settings["mlflow_run_id"]) if rank == 0 else None
    try:
        yield Post(config, folder, device, rank, world, tracker)
    finally:
        if tracker is not None:
            tracker.close()


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry point on every worker; rank 0's return value reaches the driver."""
    with at_post(settings) as post:
        corpus, folder = Corpus.open(settings["corpus"]), post.folder
        training = Training(post.config, corpus, post.device, post.rank, post.world, folder.stop.exists)
        training.until = settings["part"].until
        return Worker(training, run_store(post.config, folder), folder, post.tracker).run()


class Worker:
    """Runs a training to its end, or until it is told to stop or cannot go on."""

    def __init__(self, training: Training, store: Store, folder: RunFolder, tracker: Tracker | None) -> None:
        self.training, self.store, self.folder, self.tracker = training, store, folder, tracker
        self.keeper = Keeper(training, store, tracker)
        self._returns: dict[int, int] = {}
        #: Step that training went back to, until it has saved a later one.
        self._back: int | None = None
        self._overdue = False
        self._evaluation: Report | None = None
        self._paused = 0.0

    def run(self) -> dict[str, Any]:
        """The figures of the summary: `status`, and what is known of the others."""
        training, steps = self.training, self.training.config.training.last_step
        try:
            self._begin()
        except ResumeError as reason:
            return self._figures("failed") | {"error": str(reason)}
        first, began = training.done, time.perf_counter()
        training.restart_clock()
        while training.done < steps and not training.stop:
            training.step()
            step = training.done
            if training.refused:
                self._event("skipped", f"step {step} moved nothing: {training.refused}")
                if training.guard.in_a_row >= training.config.training.max_skipped:
                    if error := self._go_back():
                        self.keeper.close()
                        return self._figures("failed") | {"error": error}
                    if training.done < step:  # it has gone back
                        continue
            self._after_step()
        seconds = time.perf_counter() - began - self._paused
        if problem := self.keeper.close():
            return self._figures("failed") | {"error": problem}
        if training.done < steps:
            return self._figures("interrupted")
        report = self._evaluation or self._evaluate(training.config.evaluation.final_tokens)
        if self.tracker is not None:
            export_weights(self.store, training.config, self.folder.weights)
        tokens = (training.done - first) * training.config.training.batch_tokens
        rate = tokens / seconds if tokens else None
        return self._figures("finished") | {"tokens_per_second": rate, "evaluation": report.as_dict()}

    def _begin(self) -> None:
        """Take up the newest checkpoint; the log goes back to it."""
        step = self.keeper.restore()
        begun = self.folder.log.exists() and self.folder.log.stat().st_size > 0
        if self.tracker is not None:
            self.tracker.rewind(self.training.done)
        if step is not None:
            self._event("resumed", f"training goes on from the checkpoint of step {step}", step=step)
        elif begun:
            self._event("resumed", "there is no checkpoint yet, so training begins anew", step=0)

    def _after_step(self) -> None:
        """Evaluate, log and save where it is due."""
        training, settings = self.training, self.training.config.training
        step, last = training.done, training.done == settings.last_step
        record = training.record() if last or training.stop or step % settings.log_every == 0 else {}
        if last or step == training.until or _due(step, settings.evaluate_every):
            began = time.perf_counter()
            evaluation = training.config.evaluation
            report = self._evaluate(evaluation.final_tokens if last else evaluation.tokens)
            record |= report.metrics()
            self._evaluation = report if last else None
            self._paused += time.perf_counter() - began
            training.restart_clock()
        if record and self.tracker is not None:
            self.tracker.log(record, step)
        self._overdue |= _due(step, settings.checkpoint_every)
        if last or training.stop or (self._overdue and not training.guard.in_a_row):
            self.keeper.save(record)
            self._overdue, self._back = False, None
            training.restart_clock()
        self.keeper.tell()

    def _evaluate(self, tokens: int) -> Report:
        training = self.training
        return heldout_report(training.reader, training.corpus, training.config, tokens, training.rank, training.world)

    def _go_back(self) -> str:
        """Go on from the last good checkpoint, past the batches since; returns why not if that is not to be."""
        training, settings = self.training, self.training.config.training
        step, following = training.done, training.done + training.passed_over
        report = (
            f"step {step} (batch {following - 1}): {training.refused}, and {training.guard.in_a_row} steps in a row "
            f"could not be used; {training.first_bad_gradient()}"
        )
        advice = "lower training.learning_rate, model.eta_max or training.clip"
        if settings.on_divergence == "stop":
            return f"{report}; {advice}"
        if self._back is not None and training.guard.spiking:
            training.guard.forget()
            self._event(
                "accepted", f"{report}; with good weights too, so it is the data that has changed: training goes on"
            )
            return ""
        back = self.keeper.restore(before=step - training.guard.in_a_row + 1)
        if back is None:
            return f"{report}; there is no checkpoint to go back to: {advice}"
        self._returns[back] = self._returns.get(back, 0) + 1
        if self._returns[back] > RETURNS:
            return f"{report}; going back to step {back} has not helped {RETURNS} times: {advice}"
        self._back, self._overdue = back, False
        training.passed_over = following - back
        if self.tracker is not None:
            self.tracker.rewind(back)
        self._event("rolled-back", f"{report}; training goes on from step {back}, past the batches since", step=back)
        self.keeper.save_again()  # from now on, whatever happens, those batches stay passed over
        training.restart_clock()
        return ""

    def _event(self, kind: str, message: str, **fields: Any) -> None:
        if self.tracker is not None:
            self.tracker.event(kind, message, **fields)

    def _figures(self, status: str) -> dict[str, Any]:
        training = self.training
        return {
            "status": status,
            "steps": training.done,
            "tokens": training.done * training.config.training.batch_tokens,
            "train_loss": training.loss if math.isfinite(training.loss) else None,
            "skipped_steps": training.guard.skipped,
        }


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0

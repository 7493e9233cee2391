"""The checkpoints of a training: what they hold, when one counts, and the way back to it.

All ranks save and restore together: each writes and reads its own stretches, and what one of them cannot do none does.
"""

from __future__ import annotations

import json
import queue
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from nestling.checkpoint import WEIGHT, Checkpoint, Piece, ResumeError, Saver, Store, grown
from nestling.config import to_yaml
from nestling.tracking import Tracker
from nestling.training.state import engine_pieces, load_engine, optimizer_scalars, random_state, set_random_state

if TYPE_CHECKING:
    from nestling.training.loop import TrainingLoop

FORMAT = 1
#: How the names begin of tensors that are neither weights nor optimizer state.
BESIDE = "beside/"
#: Metrics that MLflow shows beside a checkpoint.
SHOWN = ("train/loss", "heldout/loss", "heldout/bits_per_byte")


class Keeper:
    """Saves a training and brings it back; every method that is not marked is called by all ranks at the same step."""

    def __init__(self, training: TrainingLoop, store: Store, tracker: Tracker | None) -> None:
        settings = training.config.checkpoint
        self._training, self._store, self._tracker = training, store, tracker
        self._rank, self._world = training.rank, training.world
        self._saver = Saver(
            store, self._rank, self._world, settings.keep, settings.keep_best, self._committed, self._failed
        )
        self._news: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._lineage: list[dict[str, Any]] = []
        self._metrics: dict[str, float] = {}
        #: Whether the last save went well so far; None before the first.
        self._saved: bool | None = None
        #: Why the last failed save failed, on rank 0.
        self._problem = ""
        #: Held-out loss of the checkpoint that was taken up.
        self._heldout: dict[str, float] = {}
        if self._rank == 0:
            store.clear_drafts()
        #: The last checkpoint that is known to be good, on rank 0.
        self.good: Checkpoint | None = None

    def save(self, metrics: Mapping[str, float]) -> None:
        """Write the state after the present step; blocks until the bytes are in files, the rest happens beside.

        Args:
            metrics: what is known of the present step; `heldout/loss` among them decides about the best checkpoints.
        """
        training = self._training
        self._saver.wait()
        self.tell()
        self._saved = False
        token = self._from_first(secrets.token_hex(4))
        pieces = engine_pieces(training.engine)
        if self._rank == 0:
            kept = training.tensors()
            pieces += [Piece(BESIDE + name, 0, tensor) for name, tensor in kept.items() if tensor.numel()]
        shares = training.shares()
        pieces += [Piece(BESIDE + name, self._rank * len(mine), mine) for name, mine in shares.items() if len(mine)]
        problem = ""
        spoilt = next((piece.name for piece in pieces if not piece.data.sum().isfinite()), None)
        if spoilt:
            problem = f"{spoilt} is not finite"
        else:
            try:
                self._saver.write(training.done, token, pieces, self._documents())
            except OSError as error:
                problem = str(error)
        problems = [problem for problem in self._from_all(problem) if problem]
        if not problems:
            self._metrics = {key: metrics[key] for key in SHOWN if key in metrics}
            self._saver.commit(metrics.get("heldout/loss"))
            self._saved = True
            return
        self._saver.abandon()
        self._failed(training.done, problems[0])
        self.tell()

    def restore(self, before: int | None = None) -> int | None:
        """Take up the newest good checkpoint, of a step lower than `before` if that is given; returns its step.

        None: there is no checkpoint.

        Raises:
            ResumeError: there are checkpoints, but none is good or they hold another model.
        """
        self._saver.wait()
        checkpoint = self._newest_good(before)
        if checkpoint is None:
            return None
        found = grown(self._store.open(checkpoint), self._training.config)
        state = json.loads(found.documents["state.json"])
        if state["format"] != FORMAT:
            raise ResumeError(
                f"{self._store.location(checkpoint)} has the format {state['format']}, this version reads {FORMAT}; "
                "resume with the version that wrote it"
            )
        training = self._training
        expected = {WEIGHT + name: shape.numel() for name, shape in training.shapes.items()}
        held = {name: size for name, size in found.pieces.sizes.items() if name.startswith(WEIGHT)}
        if held != expected:
            raise ResumeError(
                f"{self._store.location(checkpoint)} holds another model than the job's: parameters or their sizes "
                "differ; resume with the model that the run began with"
            )
        load_engine(training.engine, found.pieces, state["optimizer"])
        training.load_state(state)
        beside = {name: size for name, size in found.pieces.sizes.items() if name.startswith(BESIDE)}
        training.load_tensors({n.removeprefix(BESIDE): found.pieces.read(n, 0, size) for n, size in beside.items()})
        mine = json.loads(found.documents.get(f"rank-{self._rank:05}.json", "{}"))
        if mine and state["layout"] == training.layout():
            set_random_state(mine["random"])
            training.load_moved(mine["moved"])
        self._lineage = [*state["lineage"], {"from": checkpoint.name, "layout": state["layout"]}]
        self.good = checkpoint
        self._heldout = {} if checkpoint.metric is None else {"heldout/loss": checkpoint.metric}
        return checkpoint.step

    def note(self, **fields: Any) -> None:
        """Write down in the lineage what has come to the checkpoint that was taken up."""
        self._lineage[-1] |= fields

    def save_again(self) -> None:
        """Save the checkpoint that was taken up once more, because the position in the data is another one now."""
        self.save(self._heldout)

    def settled(self) -> Checkpoint | None:
        """The last checkpoint that is known to be good, once the save under way has ended; on rank 0."""
        self._saver.wait()
        self.tell()
        return self.good

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of this rank's last save by stage; complete after `close`."""
        return self._saver.stages

    def close(self) -> str:
        """Wait for the last save; why it failed, empty if it succeeded or nothing was to be saved."""
        committed = self._saver.wait()
        self.tell()
        if self._saved is None or all(self._from_all(self._saved and committed)):
            return ""
        return self._from_first(self._problem)

    def tell(self) -> None:
        """Rank 0: pass on what the committing thread has reported."""
        while not self._news.empty():
            kind, news = self._news.get()
            tracker = self._tracker
            if tracker is None:
                continue
            if kind == "failed":
                tracker.event("save-failed", news.pop("message"), **news)
                continue
            checkpoint, removed = news["checkpoint"], news["removed"]
            self.good = checkpoint
            location = self._store.location(checkpoint)
            tracker.event("checkpoint", f"step {checkpoint.step} saved to {location}", step=checkpoint.step)
            tracker.checkpoint(checkpoint.step, location, news["metrics"])
            for old in removed:
                tracker.forget(old.step)

    def _committed(self, checkpoint: Checkpoint, removed: list[Checkpoint]) -> None:
        self._news.put(("committed", {"checkpoint": checkpoint, "removed": removed, "metrics": self._metrics}))

    def _failed(self, step: int, reason: str) -> None:
        if self._rank != 0:
            return
        last = "there is none yet" if self.good is None else f"the last good one is that of step {self.good.step}"
        self._problem = f"the checkpoint of step {step} could not be saved: {reason}; {last}"
        self._news.put(("failed", {"message": self._problem, "step": step, "reason": reason}))

    def _documents(self) -> dict[str, str]:
        training = self._training
        mine = {"random": random_state(), "moved": {name: float(norm) for name, norm in training.levels.moved.items()}}
        documents = {f"rank-{self._rank:05}.json": json.dumps(mine)}
        if self._rank == 0:
            state = training.state() | {
                "format": FORMAT,
                "layout": training.layout(),
                "optimizer": optimizer_scalars(training.engine),
                "lineage": self._lineage,
            }
            documents |= {"state.json": json.dumps(state, indent=1), "config.yaml": to_yaml(training.config)}
        return documents

    def _newest_good(self, before: int | None) -> Checkpoint | None:
        listed = None
        if self._rank == 0:  # by now the last of an earlier group of workers is gone
            listed = [checkpoint.name for checkpoint in self._store.checkpoints()], self._store.damaged()
        names, damage = self._from_first(listed)
        found = {checkpoint.name: checkpoint for checkpoint in self._store.checkpoints()}
        for text in damage:
            self._tell_damage(text)
        for name in names:
            checkpoint = found[name]
            if before is not None and checkpoint.step >= before:
                continue
            own = self._store.problems(checkpoint, self._rank, self._world)
            problems = [problem for some in self._from_all(own) for problem in some]
            if not problems:
                return checkpoint
            damage.append(problems[0])
            self._tell_damage(problems[0])
        if damage and before is None:
            raise ResumeError(
                f"no checkpoint is left that is good: {'; '.join(damage)}; put back the files, or remove all of the "
                "run's checkpoints to train from the beginning"
            )
        return None

    def _tell_damage(self, text: str) -> None:
        if self._tracker is not None:
            self._tracker.event("damaged", f"a checkpoint is damaged, so the one before it is used: {text}")

    def _from_first(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def _from_all(self, value: Any) -> list[Any]:
        values = [None] * self._world
        dist.all_gather_object(values, value)
        return values

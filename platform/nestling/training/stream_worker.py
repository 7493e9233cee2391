"""What one Ray Train worker does on a stream: take up the last snapshot, learn window after window, leave a ledger.

All ranks read the same windows, so they walk through the same steps. Rank 0 plans the windows, in a thread, and keeps
the books: the ledger, the dead letters and the late records, each of which goes back with the snapshot.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

from nestling.checkpoint import ResumeError, Store, export_weights, run_store
from nestling.data import DataError, Tokenizer
from nestling.data.streams import Opening, Planner, Reading, Rules, WindowFolder, open_stream
from nestling.evaluation.probes import Probes, probe_losses
from nestling.tracking import RunFolder, Tracker
from nestling.tracking.files import replace_json
from nestling.training.books import Books
from nestling.training.changes import CHANGED
from nestling.training.keeper import Keeper
from nestling.training.needed_windows import NeededWindows
from nestling.training.stream_loop import StreamTraining
from nestling.training.whereabouts import whereabouts
from nestling.training.window_guard import Standing, harm, scrambled
from nestling.training.worker import at_post


def stream_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry point on every worker; rank 0's return value reaches the driver."""
    with at_post(settings) as post:
        config, folder = post.config, post.folder
        training = StreamTraining(config, post.device, post.rank, post.world, folder.stop.exists)
        training.until = settings["part"].until
        return StreamWorker(training, run_store(config, folder), folder, post.tracker).run()


class StreamWorker:
    """Learns from a stream until it ends, is told to stop, or cannot go on."""

    def __init__(self, training: StreamTraining, store: Store, folder: RunFolder, tracker: Tracker | None) -> None:
        self.training, self.store, self.folder, self.tracker = training, store, folder, tracker
        self.config = training.config
        self.keeper = Keeper(training, store, tracker)
        self.source = open_stream(self.config)
        self.books = Books(folder.path) if tracker is not None else None
        self.planner: Planner | None = None
        self._windows = WindowFolder(folder.path / "windows")
        self._saved: tuple[int, int] | None = None
        self._needed = NeededWindows(self._windows)
        self._overdue = False
        #: Whether levels are to change at the snapshot that was just saved; equal on all ranks.
        self._changing = False
        self._opening: Opening | None = None
        self._before = Standing({}, None, None)
        self._tokenizer = Tokenizer.load(folder.tokenizer, self.config.data.separator)

    def run(self) -> dict[str, Any]:
        """The figures of the summary: `status`, and what is known of the others."""
        training, settings = self.training, self.config.training
        try:
            self._begin()
        except ResumeError as unusable:
            return self._figures("failed") | {"error": str(unusable)}
        first, began = training.done, time.perf_counter()
        training.restart_clock()
        error = ""
        try:
            self._learn()
        except DataError as reason:
            error = str(reason)
        # Half a window that the guard has not judged is learnt again, unless this is the end.
        half_judged = self.config.stream.guard and training.batches_done and training.done < settings.last_step
        if training.guard.in_a_row >= settings.max_skipped:
            error = (
                f"step {training.done}: {training.refused}, {training.guard.in_a_row} steps in a row; lower "
                "training.learning_rate, model.eta_max or training.clip, and go on from the last snapshot"
            )
        elif not half_judged and self._saved != (training.position.window, training.batches_done):
            self._save(training.record() if training.done > first else {})
        seconds = time.perf_counter() - began
        if problem := self.keeper.close():
            error = error or problem
        if error:
            return self._figures("failed") | {"error": error}
        if training.stop or self.folder.stop.exists():
            return self._figures("interrupted")
        if self._changing:
            return self._figures(CHANGED)
        if self.tracker is not None:
            export_weights(self.store, self.config, self.folder.weights)
        tokens = (training.done - first) * settings.batch_tokens
        return self._figures("finished") | {"tokens_per_second": tokens / seconds if tokens else None}

    def _begin(self) -> None:
        """Take up the newest snapshot; log, ledger and side files go back to it, and planning begins."""
        training = self.training
        step = self.keeper.restore()
        if step is not None:
            self._saved = (training.position.window, training.batches_done)
        if training.batches_done and self._windows.plan(training.position.window) is None:
            raise ResumeError(
                f"the snapshot lies in the middle of window {training.position.window}, whose plan is missing in "
                f"{self.folder.path / 'windows'}; put it back"
            )
        if self.tracker is not None and self.books is not None:
            begun = self.folder.log.exists() and self.folder.log.stat().st_size > 0
            self.tracker.rewind(training.done)
            self.books.load(training.files)
            if step is not None:
                at = f"step {step}, window {training.position.window}"
                self.tracker.event("resumed", f"the stream goes on from the snapshot of {at}", step=step)
            elif begun:
                self.tracker.event("resumed", "there is no snapshot yet, so the stream begins anew", step=0)
            self._windows.begin()
            self._tell_position()
            self.planner = Planner(self.source, self._windows, self.config.stream, training.position)
            threading.Thread(target=self.planner.run, args=(self._ending,), name="planner", daemon=True).start()
        torch.distributed.barrier()  # the mark of an earlier end is gone

    def _learn(self) -> None:
        """Window after window, batch after batch; leaves when the stream ends, is stopped or has had its steps."""
        training, settings = self.training, self.config.training
        skip = training.batches_done
        for item in self._reading().follow(training.position.window, training.position.latest):
            if isinstance(item, Opening):
                self._open(item)
            elif skip:
                skip -= 1
            else:
                training.learn(item)
                self._after_step()
            if self._opening is not None and training.batches_done == self._opening.batches:
                self._close()
            if training.stop or self._changing or training.done >= settings.last_step:
                return
            if training.guard.in_a_row >= settings.max_skipped:
                return

    def _reading(self) -> Reading:
        config, stream = self.config, self.config.stream
        length = config.data.sequence_length
        return Reading(
            source=self.source,
            folder=self.folder.path / "windows",
            rules=Rules(
                stream.lateness,
                stream.late == "aside",
                stream.probe_percent if stream.probe_every else 0.0,
                frozenset(name for name, levels in stream.policies.items() if levels == []),
            ),
            tokenizer=self._tokenizer,
            length=length,
            rows=config.training.batch_tokens // length,
            lanes=stream.carry_state,
        )

    def _open(self, opening: Opening) -> None:
        """Begin a window; of one that was begun before the snapshot, the books know already."""
        self._opening = opening
        self.training.open(opening.summary["source"])
        counted = opening.summary["counted"]
        records, dead = (sum(each[name] for each in counted) for name in ("records", "dead"))
        share = self.config.stream.dead_share
        if dead > max(1, share * records):
            first = opening.summary["letters"][0]
            raise DataError(
                f"window {opening.summary['window']}: {dead} of {records} records are broken, more than "
                f"stream.dead_share={share:g} allows; the first stands in {first['partition']} at offset "
                f"{first['offset']}: {first['reason']}. Nothing of the window was trained on: mend the source's "
                "reading (data.column, stream.*_column), or allow more"
            )
        if self.config.stream.guard:
            self._before = self._standing(opening)
        else:
            self._hold(opening)
        if self.books is not None and self.training.batches_done == 0:
            self.books.set_aside(opening.summary)

    def _close(self) -> None:
        """End a window: it goes into the ledger with the next snapshot."""
        training, opening = self.training, self._opening
        assert opening is not None
        judged = self.config.stream.guard and opening.batches
        reason = harm(self._before, self._standing(opening)) if judged else ""
        if reason:
            self._undo(opening, reason)
        elif self.config.stream.guard:
            self._hold(opening)  # not before the verdict: both sides of it are to read the same probes
        if not reason and self.books is not None:
            updates = [training.levels.updates[str(level.name)] for level in self.config.levels]
            size = training.window_bytes
            loss = training.window_nats / math.log(2) / size if size else None
            self.books.enter(opening.summary, training.done, loss, updates)
        training.close(opening)
        self._opening = None
        self._tell_position()
        if self.planner is not None:
            self.planner.consumed = training.position.window
        if self.config.stream.guard:
            self._save({})

    def _hold(self, opening: Opening) -> None:
        """Keep a window's held-out records as probes, if it is to last; doing so twice changes nothing."""
        for record in opening.summary["held"] if self.training.lasting else ():
            self.training.probes.add(record["domain"], record["text"])

    def _standing(self, opening: Opening) -> Standing:
        """What the model makes of the domains that were known before a window, and of what is held out of it."""
        training, held = self.training, Probes(1 << 30)
        for record in opening.summary["held"]:
            held.add("slice", record["text"])
            held.add("scrambled", scrambled(record["text"]))
        known = self._before.probes if self._opening is not None and training.batches_done else training.probes.domains
        probes = self._losses(training.probes, known)
        training.restart_clock()
        own = self._losses(held, held.domains)
        return Standing(probes, own.get("slice"), own.get("scrambled"))

    def _losses(self, probes: Probes, domains: Iterable[str]) -> dict[str, float]:
        training, length = self.training, self.config.data.sequence_length
        return probe_losses(training.reader, probes, domains, self._tokenizer, length, training.rank, training.world)

    def _undo(self, opening: Opening, reason: str) -> None:
        """Go back to before a window, and past it."""
        training, step, window = self.training, self.training.done, opening.summary["window"]
        if self.keeper.restore() is None or training.position.window != window:
            raise RuntimeError(
                f"window {window} is to be undone ({reason}), but the snapshot before it could not be saved; make room "
                "for snapshots"
            )
        training.rollbacks += 1
        if self.tracker is not None and self.books is not None:
            self.tracker.rewind(training.done)
            message = f"window {window} is undone, from step {step} back to {training.done}: {reason}"
            self.tracker.event("rolled-back", message, step=training.done, window=window)
            self.books.undone(opening.summary, reason)
            updates = [training.levels.updates[str(level.name)] for level in self.config.levels]
            self.books.enter(opening.summary, training.done, None, updates, undone=True)

    def _tell_position(self) -> None:
        """For whoever asks how the stream stands; the snapshot has its own."""
        if self.books is not None:
            position = self.training.position
            replace_json(self.folder.position, {"window": position.window, "offsets": position.offsets})

    def _after_step(self) -> None:
        """Log and save where it is due."""
        training, settings = self.training, self.config.training
        if training.refused and self.tracker is not None:
            self.tracker.event("skipped", f"step {training.done} moved nothing: {training.refused}")
        if training.anew and self.tracker is not None:
            message = f"step {training.done}: the carried state of {training.anew} rows diverged, so they begin anew"
            self.tracker.event("lanes-anew", message, step=training.done, window=training.position.window)
        last = training.done >= settings.last_step
        record = training.record() if last or training.done % settings.log_every == 0 else {}
        if record and self.planner is not None:
            record |= whereabouts(training.position.offsets, self.planner.lag(training.position.offsets))
            if self.keeper.good is not None:
                record["stream/snapshot_age_seconds"] = max(0.0, time.time() - self.keeper.good.created)
        if training.drifted == training.done and self.tracker is not None:
            where = f" of {training.source}" if training.records else ""
            message = f"step {training.done}: the loss has risen as it does when the data{where} change"
            self.tracker.event("drift", message, step=training.done, window=training.position.window)
        every = self.config.stream.probe_every
        if every and (last or training.done % every == 0):
            record |= self._probe()
        if record and self.tracker is not None:
            self.tracker.log(record, training.done)
        self._overdue |= bool(settings.checkpoint_every) and training.done % settings.checkpoint_every == 0
        # With the guard, snapshots lie between windows: the way back leads to a window's beginning.
        if not self.config.stream.guard and ((self._overdue and not training.guard.in_a_row) or training.stop):
            self._save(record)
        self.keeper.tell()

    def _probe(self) -> dict[str, float]:
        """Evaluate the probes; every rank."""
        training = self.training
        losses = self._losses(training.probes, training.probes.domains)
        training.restart_clock()
        return training.probes.record(losses)

    def _save(self, record: dict[str, float]) -> None:
        training = self.training
        if self.books is not None:
            good = self.keeper.settled()
            with suppress(OSError):  # another time
                self._needed.forget({checkpoint.step for checkpoint in self.store.checkpoints()})
            self._needed.saving(training.done, training.position.window)
            training.files = self.books.commit(training.done, None if good is None else good.step)
        self.keeper.save(record)
        self._overdue = False
        self._saved = (training.position.window, training.batches_done)
        training.restart_clock()
        asked = [self.folder.changes.exists()]
        torch.distributed.broadcast_object_list(asked)
        self._changing = asked[0]

    def _ending(self) -> bool:
        """Whether no more windows are to be planned here."""
        return self._changing or self.folder.stop.exists()

    def _figures(self, status: str) -> dict[str, Any]:
        training = self.training
        return {
            "status": status,
            "steps": training.done,
            "tokens": training.done * self.config.training.batch_tokens,
            "train_loss": training.loss if math.isfinite(training.loss) else None,
            "tokens_per_second": None,
            "prequential_bits_per_byte": training.prequential.bits_per_byte,
            "dead_letters": training.counts["dead"],
            "records": training.counts["records"],
            "windows": training.position.window,
        }

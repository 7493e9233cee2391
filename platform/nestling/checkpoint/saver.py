"""Saving without holding up training: the bytes are copied to files, and a thread does what takes long.

`write` blocks until a rank's share is in the page cache; hashing, syncing, uploading and the commit run in a thread
while training goes on. The ranks tell each other through receipts in the draft and not through collectives, which
would get into the way of training's own. A save that fails leaves everything older as it was, and says why.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from nestling.checkpoint.draft import Draft
from nestling.checkpoint.errors import CheckpointError
from nestling.checkpoint.manifest import Checkpoint, is_file_name
from nestling.checkpoint.pieces import Piece, write_pieces
from nestling.checkpoint.place import MANIFEST
from nestling.checkpoint.store import SHARD, Store
from nestling.tracking.client import shown

PATIENCE = 1800.0
"""Seconds that the first rank waits for the receipts of the others; uploads of large shards take minutes."""

GRACE = 5.0
"""Seconds that it still waits when the save has failed anyway, to clean up behind all of them."""

_STAGES = ("write", "hash", "sync", "upload", "commit")
_log = logging.getLogger(__name__)


class Saver:
    """Writes one rank's share of each checkpoint; the commit happens in a thread of its own.

    Args:
        store: where the checkpoints lie.
        rank: this process among those that save together; rank 0 commits.
        world: how many they are.
        keep: the newest checkpoints that stay.
        keep_best: those with the lowest metric that stay as well.
        on_commit: gets each committed checkpoint and those removed for it; on rank 0, in the thread.
        on_failure: gets the step and the reason of each save that came to nothing; on rank 0, in the thread.

    Attributes:
        stages: seconds of the last save by stage: `write` (all that blocks), `hash`, `sync`, `upload`, and `commit`
            (on rank 0, with the wait for the others). Complete after `wait`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        keep: int,
        keep_best: int,
        on_commit: Callable[[Checkpoint, list[Checkpoint]], None],
        on_failure: Callable[[int, str], None],
    ) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._keep = keep
        self._keep_best = keep_best
        self._on_commit = on_commit
        self._on_failure = on_failure
        self.stages = dict.fromkeys(_STAGES, 0.0)
        self._step = 0
        self._draft: Draft | None = None
        self._names: list[str] = []
        self._thread: threading.Thread | None = None
        self._succeeded = False

    def write(self, step: int, token: str, pieces: Sequence[Piece], documents: Mapping[str, str]) -> None:
        """Copy this rank's share to files, after the commit before has ended; then `commit` or `abandon` it.

        Args:
            step: optimizer steps done.
            token: letters and digits, the same on all ranks and new for each attempt.
            pieces: what this rank contributes of the tensors; may be changed again once this returns.
            documents: texts by file name (`state.json`); a name may come from one rank only.

        Raises:
            ValueError: a document's name cannot be used.
            OSError: the files cannot be written, because the disk is full for example.
        """
        self.wait()
        shard = f"rank-{self._rank:05d}{SHARD}"
        for name in documents:
            if "/" in name or name.endswith(SHARD) or name == MANIFEST or not is_file_name(name):
                raise ValueError(f"a checkpoint cannot hold a document {name!r}; letters, digits, '.', '_' and '-' can")
        self.stages = dict.fromkeys(_STAGES, 0.0)
        self._step, self._draft, self._names = step, self._store.draft(step, token), [shard, *documents]
        with self._timed("write"):
            self._draft.folder.mkdir(parents=True, exist_ok=True)
            write_pieces(self._draft.folder / shard, pieces)
            for name, text in documents.items():
                (self._draft.folder / name).write_text(text, encoding="utf-8")

    def commit(self, metric: float | None = None) -> None:
        """Start the thread that makes what all ranks have written a checkpoint; every rank must call it.

        Args:
            metric: what the best checkpoints are chosen by, lower is better; rank 0's counts.
        """
        if self._draft is None:
            raise RuntimeError("nothing was written: call write before commit")
        draft, self._draft = self._draft, None
        self._succeeded = False
        self._thread = threading.Thread(target=self._run, args=(draft, metric), name="checkpoint", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """Remove this rank's files of a draft that is not to be committed; for all ranks when one of them failed."""
        if self._draft is not None:
            self._draft.leave(self._names)
            self._draft = None

    def wait(self) -> bool:
        """Wait until the thread has ended.

        Returns:
            Whether the last commit succeeded; on other ranks than 0, whether their share was delivered.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._succeeded

    def _run(self, draft: Draft, metric: float | None) -> None:
        """The thread: nothing may escape from it, because nobody would see it."""
        try:
            receipt = self._deliver(draft)
            if self._rank == 0:
                with self._timed("commit"):
                    checkpoint = self._conclude(draft, receipt, metric)
                self._succeeded = True
                self._on_commit(checkpoint, self._prune())
            else:
                self._succeeded = self._hand_in(draft, receipt)
        except Exception as error:
            self._report(draft, error)

    def _deliver(self, draft: Draft) -> dict[str, Any]:
        """Make this rank's files last; the receipt says what they are, or what went wrong."""
        files = {}
        try:
            for name in self._names:
                path = draft.folder / name
                with self._timed("hash"), path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[name] = {"bytes": path.stat().st_size, "sha256": digest}
                with self._timed("upload" if draft.remote else "sync"):
                    draft.deliver(name)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            if draft.remote:
                draft.leave(self._names)
        return {"files": files}

    def _hand_in(self, draft: Draft, receipt: Mapping[str, Any]) -> bool:
        """Give rank 0 the receipt; whether it is one of success."""
        try:
            draft.put_receipt(self._rank, receipt)
        except OSError as error:  # the disk may be full: make room for a few bytes, or rank 0 waits in vain
            draft.empty(self._names)
            receipt = {"error": f"{type(error).__name__}: {error}"}
            draft.put_receipt(self._rank, receipt)
        return "error" not in receipt

    def _conclude(self, draft: Draft, receipt: Mapping[str, Any], metric: float | None) -> Checkpoint:
        """Wait for the other ranks and commit.

        Raises:
            CheckpointError: a rank failed, or did not report in time.
        """
        receipts = self._collect(draft, receipt)
        failures = [f"rank {rank}: {receipt['error']}" for rank, receipt in receipts.items() if "error" in receipt]
        missing = [str(rank) for rank in range(self._world) if rank not in receipts]
        if missing and not failures:
            failures.append(
                f"nothing was heard from rank {', '.join(missing)} for {PATIENCE:.0f} seconds; "
                "all nodes must see the same folder, and every rank must commit"
            )
        files = [file for receipt in receipts.values() for file in receipt.get("files", {}).items()]
        if len(dict(files)) < len(files):
            failures.append("two ranks wrote a document of the same name")
        if failures:
            raise CheckpointError("; ".join(failures))
        return draft.commit(dict(files), metric)

    def _collect(self, draft: Draft, receipt: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
        """The receipts of all ranks that report in time, rank 0's own being this one."""
        receipts = {0: receipt}
        deadline, pause = time.monotonic() + PATIENCE, 0.01
        while len(receipts) < self._world and time.monotonic() < deadline:
            if any("error" in receipt for receipt in receipts.values()):
                deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(pause)
            pause = min(1.5 * pause, 1.0)
            with suppress(OSError):  # a place that cannot be listed now may be there again the next time
                receipts |= draft.receipts(self._world, receipts)
        return receipts

    def _prune(self) -> list[Checkpoint]:
        """Remove old checkpoints; one that cannot be removed is no reason to call the save a failure."""
        try:
            return self._store.prune(self._keep, self._keep_best, self._step)
        except OSError as error:
            _log.warning("old checkpoints could not be removed: %s", shown(str(error)))
            return []

    def _report(self, draft: Draft, error: Exception) -> None:
        """Say that a save failed, and clean up after it; once committed, only the callback can have failed."""
        if self._rank != 0:
            _log.error("step %d: rank %d cannot deliver its share: %s", self._step, self._rank, shown(str(error)))
            return
        if self._succeeded:
            _log.error("step %d was saved, but that could not be reported", self._step, exc_info=error)
            return
        draft.drop()
        try:
            self._on_failure(self._step, shown(str(error)))
        except Exception:
            _log.exception("the failure of saving step %d could not be reported: %s", self._step, shown(str(error)))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] += time.perf_counter() - start

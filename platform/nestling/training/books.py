"""What a stream leaves beside its snapshots: ledger, dead letters, late records set aside, windows that were undone.

Lines wait here until the snapshot that covers them, are written and synced before it, and are cut off again when a
stream goes back to an earlier one. So each of them stands there exactly once, whatever was killed when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestling.checkpoint.errors import ResumeError
from nestling.checkpoint.ledger import Ledger, Lines
from nestling.checkpoint.manifest import folder_name

LEDGER, DEAD_LETTERS, LATE, UNDONE = "ledger.jsonl", "dead_letters.jsonl", "late.jsonl", "undone.jsonl"
#: Files whose lines wait here.
ASIDE = (DEAD_LETTERS, LATE, UNDONE)


class Books:
    """The files of one stream; kept by rank 0.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._ledger = Ledger(folder / LEDGER)
        self._files = {name: Lines(folder / name) for name in ASIDE}
        self._entries: list[dict[str, Any]] = []
        self._waiting: dict[str, list[dict[str, Any]]] = {name: [] for name in ASIDE}
        #: The last attempt at a snapshot: its step, the ledger before it, and the lines that it was to commit.
        self._attempt: tuple[int, dict[str, Any], list[dict[str, Any]]] | None = None

    def set_aside(self, summary: Mapping[str, Any]) -> None:
        """Keep a window's broken and late records; see `Content.summary`."""
        window = {"window_id": summary["window"], "source": summary["source"]}
        self._waiting[DEAD_LETTERS] += [window | letter for letter in summary["letters"]]
        self._waiting[LATE] += [window | record for record in summary["late"]]

    def undone(self, summary: Mapping[str, Any], reason: str) -> None:
        """Keep where a window stands that was undone, for a person to look at."""
        intervals = [counted["interval"] for counted in summary["counted"]]
        window = {"window_id": summary["window"], "source": summary["source"]}
        self._waiting[UNDONE].append(window | {"intervals": intervals, "reason": reason})

    def enter(
        self, summary: Mapping[str, Any], step: int, loss: float | None, updates: Sequence[int], undone: bool = False
    ) -> None:
        """A window has been trained on, or `undone`.

        Args:
            step: optimizer steps done after it.
            loss: its prequential loss in bits per byte.
            updates: of each level so far.
        """
        for counted in summary["counted"]:
            interval = counted["interval"]
            self._entries.append(
                {
                    "step": step,
                    "window_id": summary["window"],
                    "source": summary["source"],
                    "partition": interval["partition"],
                    "start": interval["start"],
                    "end": interval["end"],
                    "n_records": counted["records"],
                    "n_dead": counted["dead"],
                    "n_late": counted["late"],
                    "n_held": counted["held"],
                    "sha256_of_record_ids": counted["sha256_of_record_ids"],
                    "preq_loss": loss,
                    "level_updates": list(updates),
                    **({"undone": True} if undone else {}),
                }
            )

    def commit(self, step: int, good: int | None) -> dict[str, Any]:
        """Write down what waits, for the snapshot of `step`; returns what that has to know for `load`.

        Args:
            good: step of the last snapshot that was committed. If the last attempt was another one, it has failed, and
                its lines are written again for this one.
        """
        if self._attempt is not None and self._attempt[0] != good:
            _, before, entries = self._attempt
            self._ledger.load(before)
            self._entries = entries + self._entries
        before, entries, self._entries = self._ledger.state(), self._entries, []
        self._attempt = (step, before, entries)
        self._ledger.append({**entry, "ckpt_id": folder_name(step)} for entry in entries)
        for name, lines in self._files.items():
            if self._waiting[name]:
                lines.append(self._waiting[name])
                self._waiting[name] = []
        return {"ledger": self._ledger.state()} | {name: lines.bytes for name, lines in self._files.items()}

    def load(self, files: Mapping[str, Any]) -> None:
        """Go back to what a snapshot knows; to nothing if there is none.

        Raises:
            ResumeError: a file is shorter than it was.
        """
        try:
            self._ledger.load(files.get("ledger", {"bytes": 0, "last": ""}))
            for name, lines in self._files.items():
                lines.rewind(files.get(name, 0))
        except ValueError as error:
            raise ResumeError(f"{error}: the books of the stream were altered; put the file back") from error

"""One attempt at a checkpoint: the files of all ranks, until one of them commits it or it is dropped.

In a local place (which the nodes share) a draft is the hidden folder `.step-00000120.TOKEN`, renamed when it is
complete. An object store cannot rename, so there the files go to `step-00000120/TOKEN/` and the manifest that names
them is put last: that one object is the commit. Either way a checkpoint of the same step stays whole until it is
replaced, and what a killed process leaves cannot be mistaken for a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nestling.checkpoint.manifest import Checkpoint, dump, folder_name, new_checkpoint
from nestling.checkpoint.place import MANIFEST, Place, sync

_RECEIPT = "receipt-{:05d}.json"


class Draft:
    """A rank's hold on one attempt.

    Attributes:
        folder: the local folder into which this rank writes its files.
        remote: whether files still have to be uploaded from there.
    """

    def __init__(self, place: Place, step: int, token: str) -> None:
        self._place = place
        self._step = step
        self._name = folder_name(step)
        self._token = token
        hidden = f".{self._name}.{token}"
        self.remote = place.folder is None
        self.folder: Path = place.workspace / hidden
        self._path = f"{self._name}/{token}" if self.remote else hidden

    def deliver(self, name: str) -> None:
        """Make a file of this rank last: synced to disk, or uploaded and no longer held here."""
        if self.remote:
            self._place.upload(self.folder / name, f"{self._path}/{name}")
            (self.folder / name).unlink()
        else:
            sync(self.folder / name)

    def empty(self, names: list[str]) -> None:
        """Delete this rank's local files, as far as that can be done."""
        for name in names:
            with suppress(OSError):
                (self.folder / name).unlink()

    def leave(self, names: list[str]) -> None:
        """Delete this rank's local files, and the folder once no rank has any left in it."""
        self.empty(names)
        with suppress(OSError):
            self.folder.rmdir()

    def put_receipt(self, rank: int, receipt: Mapping[str, Any]) -> None:
        """Tell the committing rank how this one fared."""
        self._place.write(f"{self._path}/{_RECEIPT.format(rank)}", json.dumps(receipt).encode())

    def receipts(self, world: int, known: Container[int]) -> dict[int, Mapping[str, Any]]:
        """The receipts that have arrived, by rank, but for those already known."""
        there = set(self._place.files(self._path))
        found = {}
        for rank in range(world):
            if rank not in known and _RECEIPT.format(rank) in there:
                with suppress(ValueError):  # half of it is there; it will be whole next time
                    found[rank] = json.loads(self._place.read(f"{self._path}/{_RECEIPT.format(rank)}"))
        return found

    def commit(self, files: Mapping[str, Mapping[str, Any]], metric: float | None) -> Checkpoint:
        """Make the draft the checkpoint of its step; one that was there before is replaced."""
        for name in self._place.files(self._path):
            if name not in files:  # receipts
                self._place.remove_file(f"{self._path}/{name}")
        if self.remote:
            checkpoint = new_checkpoint(self._step, {f"{self._token}/{name}": files[name] for name in files}, metric)
            self._place.write(f"{self._name}/{MANIFEST}", dump(checkpoint))
            remove_attempts(self._place, checkpoint)
            return checkpoint
        checkpoint = new_checkpoint(self._step, files, metric)
        self._place.write(f"{self._path}/{MANIFEST}", dump(checkpoint))
        sync(self.folder)
        _publish(self.folder)
        return checkpoint

    def drop(self) -> None:
        """Remove what all ranks put into the draft, as far as that can be done."""
        with suppress(OSError):
            if not self.remote:
                shutil.rmtree(self.folder)
            elif self._token in self._place.folders(self._name):
                self._place.remove(self._path)


def target_of(folder: Path) -> Path:
    """The folder of the checkpoint that a local draft is to become."""
    return folder.with_name(folder.name[1:].partition(".")[0])


def _publish(folder: Path) -> None:
    """Rename a complete local draft to its checkpoint, in place of one that is there."""
    target = target_of(folder)
    replaced = folder.with_name(f".removed-{folder.name[1:]}")
    with suppress(FileNotFoundError):
        os.rename(target, replaced)
    try:
        os.rename(folder, target)
    except OSError:
        with suppress(FileNotFoundError):
            os.rename(replaced, target)
        raise
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_attempts(place: Place, checkpoint: Checkpoint) -> None:
    """Remove the uploads of other attempts at a remote checkpoint's step."""
    committed = {path.partition("/")[0] for path in checkpoint.files}
    for token in place.folders(checkpoint.name):
        if token not in committed:
            place.remove(f"{checkpoint.name}/{token}")

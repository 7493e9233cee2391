"""The checkpoints of one run: found, checked, opened and thinned out.

A checkpoint is a folder with a manifest, shards (safetensors) and documents (JSON, YAML), so reading one runs no code.
Whatever is not exactly what its manifest says is named and left out; the checkpoint before it is then the newest.
"""

from __future__ import annotations

import fcntl
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nestling.checkpoint.draft import Draft, remove_attempts, target_of
from nestling.checkpoint.errors import CheckpointError
from nestling.checkpoint.manifest import Checkpoint, is_folder_name, parse, step_of
from nestling.checkpoint.pieces import Pieces
from nestling.checkpoint.place import MANIFEST, Place

SHARD = ".safetensors"
"""How the names of files with pieces end; all other files are documents."""

_PINNED = ".pinned"  # beside the folder of a checkpoint that is pinned lies an empty file of its name and this
_ASIDE = "set-aside-"


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint ready to be read.

    Attributes:
        checkpoint: which one.
        documents: the text of each file that is no shard, by name.
        pieces: the tensors.
    """

    checkpoint: Checkpoint
    documents: Mapping[str, str]
    pieces: Pieces


class Store:
    """Checkpoints `<place>/step-00000120/`, in a local folder or at a URI of a pyarrow file system.

    A local place must be one that all nodes see. A local checkpoint appears by one rename; a remote one when its
    manifest is put, after all its files (see `draft`).

    Args:
        place: folder or URI; credentials in a URI are shown nowhere.
        scratch: a local folder for files on their way to or from a remote place, this run's own.

    Raises:
        CheckpointError: the URI cannot be used.
    """

    def __init__(self, place: str | Path, scratch: Path | None = None) -> None:
        self._place = Place(place, scratch)

    def location(self, checkpoint: Checkpoint) -> str:
        """Path or URI of a checkpoint, without credentials."""
        return f"{self._place.address}/{checkpoint.name}"

    def draft(self, step: int, token: str) -> Draft:
        """Begin an attempt at a step's checkpoint, under a token that was never used before."""
        return Draft(self._place, step, token)

    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints, newest (highest step) first; `damaged` names those with a damaged manifest.

        Raises:
            OSError: the place cannot be listed.
        """
        return sorted(self._listed()[0], key=lambda checkpoint: checkpoint.step, reverse=True)

    def damaged(self) -> list[str]:
        """What is wrong with each folder of a checkpoint whose manifest cannot be read, newest first."""
        return sorted(self._listed()[1], reverse=True)

    def _listed(self) -> tuple[list[Checkpoint], list[str]]:
        found, damaged = [], []
        for name in filter(is_folder_name, self._place.folders()):
            try:
                found.append(self._read_manifest(name))
            except FileNotFoundError:
                if self._place.folder:  # in a remote place it is a draft
                    damaged.append(f"{self._place.address}/{name}/{MANIFEST} is missing")
            except ValueError as error:
                damaged.append(f"{self._place.address}/{name}/{MANIFEST} is damaged: {error}")
        return found, damaged

    def problems(self, checkpoint: Checkpoint, rank: int = 0, world: int = 1) -> list[str]:
        """Read every `world`-th file, beginning with number `rank`, and say what is not as it was written.

        Returns:
            A text for each damaged file with its path; empty if all is well. All ranks together see all files.
        """
        texts = []
        for file in [MANIFEST, *checkpoint.files][rank::world]:
            try:
                problem = self._manifest_problem(checkpoint) if file == MANIFEST else self._problem(checkpoint, file)
            except OSError as error:
                problem = f"cannot be read: {error}"
            if problem:
                texts.append(f"{self.location(checkpoint)}/{file} {problem}")
        return texts

    def open(self, checkpoint: Checkpoint) -> OpenCheckpoint:
        """Read the documents and open the shards; a remote checkpoint is fetched to the scratch folder and verified.

        Local shards are taken as they are: `problems` verifies them, shared among the ranks.

        Raises:
            CheckpointError: a file is missing or damaged.
            OSError: the place cannot be reached, or the scratch folder cannot be written.
        """
        folder = self._place.folder / checkpoint.name if self._place.folder else self._fetch(checkpoint)
        documents = {}
        for file in checkpoint.files:
            if not file.endswith(SHARD):
                if self._place.folder and (problem := self._problem(checkpoint, file)):
                    raise CheckpointError(f"{self.location(checkpoint)}/{file} {problem}")
                documents[Path(file).name] = (folder / file).read_text(encoding="utf-8")
        shards = [folder / file for file in checkpoint.files if file.endswith(SHARD)]
        return OpenCheckpoint(checkpoint, documents, Pieces(shards))

    def document(self, checkpoint: Checkpoint, name: str) -> str:
        """One document alone, verified; nothing else is fetched.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        file = next((file for file in checkpoint.files if Path(file).name == name), name)
        problem = self._problem(checkpoint, file) if file in checkpoint.files else "is missing"
        if problem:
            raise CheckpointError(f"{self.location(checkpoint)}/{file} {problem}")
        return self._place.read(f"{checkpoint.name}/{file}").decode()

    def adopt(self, other: Store, checkpoint: Checkpoint) -> Checkpoint:
        """Copy a checkpoint from another run's store, verified; one of the same step that is here is replaced.

        Raises:
            CheckpointError: a file of it is missing or damaged.
            OSError: a place cannot be read or written.
        """
        draft = self.draft(checkpoint.step, secrets.token_hex(4))
        draft.folder.mkdir(parents=True, exist_ok=True)
        files = {Path(path).name: path for path in checkpoint.files}  # in a remote place they are below an attempt
        try:
            for name, path in files.items():
                with (draft.folder / name).open("wb") as copy:
                    problem = other._problem(checkpoint, path, copy)
                if problem:
                    raise CheckpointError(f"{other.location(checkpoint)}/{path} {problem}")
                draft.deliver(name)
            return draft.commit({name: checkpoint.files[path] for name, path in files.items()}, checkpoint.metric)
        except BaseException:
            draft.drop()
            raise
        finally:
            if draft.remote:
                draft.leave(list(files))

    def pin(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint whatever `prune` is told.

        Raises:
            CheckpointError: it has been removed meanwhile.
        """
        self._place.write(checkpoint.name + _PINNED, b"")
        if checkpoint not in self.checkpoints():
            self.unpin(checkpoint)
            raise CheckpointError(f"{self.location(checkpoint)} has just been removed; pin a newer one")

    def unpin(self, checkpoint: Checkpoint) -> None:
        """Let `prune` remove a checkpoint again."""
        self._unpin(checkpoint.name)

    def pinned(self) -> set[int]:
        """Steps of the checkpoints that are pinned."""
        names = (name.removesuffix(_PINNED) for name in self._place.files("") if name.endswith(_PINNED))
        return {step_of(name) for name in names if is_folder_name(name)}

    def set_aside(self, after: int) -> list[int]:
        """Move checkpoints of steps later than `after`, damaged ones and their pins too, to where they do not count.

        That is a folder `set-aside-1` (2, 3, ...) of the place. If it is cut short, do it again.

        Returns:
            Their steps.
        """
        names = [name for name in self._place.folders() if is_folder_name(name) and step_of(name) > after]
        return [step_of(name) for name in self._set_aside(sorted(names, key=step_of, reverse=True))]

    def _set_aside(self, names: list[str]) -> list[str]:
        numbers = [name.removeprefix(_ASIDE) for name in self._place.folders() if name.startswith(_ASIDE)]
        number = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
        for name in names:
            self._place.move(name, f"{_ASIDE}{number}/{name}")
            self._unpin(name)
        return names

    def _unpin(self, name: str) -> None:
        if name + _PINNED in self._place.files(""):
            self._place.remove_file(name + _PINNED)

    def prune(self, keep: int, keep_best: int, newest: int | None = None) -> list[Checkpoint]:
        """Remove all but the newest `keep` checkpoints, the `keep_best` with the lowest metric, and those pinned.

        Args:
            newest: the step that training is at. Checkpoints of later steps, of a history that it has left because they
                were damaged or led nowhere, are removed as well; a pinned one among them is set aside.

        Returns:
            The ones that are gone. One whose manifest is damaged is not touched.
        """
        if keep < 1 or keep_best < 0:
            raise ValueError(f"keep={keep} and keep_best={keep_best}: at least the newest checkpoint must be kept")
        everything = self.checkpoints()
        checkpoints = [found for found in everything if newest is None or found.step <= newest]
        measured = [checkpoint for checkpoint in checkpoints if checkpoint.metric is not None]
        best = sorted(measured, key=lambda checkpoint: checkpoint.manifest["metric"])[:keep_best]  # newest of equals
        kept = {checkpoint.step for checkpoint in checkpoints[:keep] + best}
        pinned = self.pinned()
        kept |= {checkpoint.step for checkpoint in checkpoints if checkpoint.step in pinned}
        removed = [checkpoint for checkpoint in everything if checkpoint.step not in kept]
        for checkpoint in removed:
            if checkpoint.step in pinned:
                self._set_aside([checkpoint.name])
            else:
                self._place.remove(checkpoint.name)
        return removed

    def clear_drafts(self) -> None:
        """Remove what killed processes left, here and in this node's scratch folder.

        Call it while nothing is saved or open; any number of processes may. A local draft that lacks nothing but its
        rename becomes a checkpoint.
        """
        if self._place.folder is None:
            for name in filter(is_folder_name, self._place.folders()):
                try:
                    remove_attempts(self._place, self._read_manifest(name))
                except FileNotFoundError:
                    self._place.remove(name)
                except ValueError:
                    pass  # a damaged checkpoint, not a draft: `checkpoints` names it
        for folder in self._place.workspace.glob(".step-*"):
            if (folder / MANIFEST).exists():
                with suppress(OSError):  # the checkpoint is there, or another process was faster
                    folder.rename(target_of(folder))
        for pattern in (".step-*", ".removed-*", ".fetched-*"):
            for folder in self._place.workspace.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def _read_manifest(self, name: str) -> Checkpoint:
        return parse(name, self._place.read(f"{name}/{MANIFEST}"))

    def _manifest_problem(self, checkpoint: Checkpoint) -> str | None:
        try:
            same = self._read_manifest(checkpoint.name).manifest == checkpoint.manifest
        except FileNotFoundError:
            return "is missing"
        except ValueError as error:
            return f"is damaged: {error}"
        return None if same else "was replaced: it describes another checkpoint of this step"

    def _problem(self, checkpoint: Checkpoint, file: str, copy: BinaryIO | None = None) -> str | None:
        """What is wrong with one file; `copy` gets its content."""
        written = checkpoint.files[file]
        try:
            size, digest = self._place.digest(f"{checkpoint.name}/{file}", copy)
        except FileNotFoundError:
            return "is missing"
        if size != written["bytes"]:
            return f"has {size} bytes; {written['bytes']} were written"
        if digest != written["sha256"]:
            return f"was altered: its SHA-256 is {digest}, that of the written file {written['sha256']}"
        return None

    def _fetch(self, checkpoint: Checkpoint) -> Path:
        """A verified copy in the scratch folder, made by the first process of this node that asks for it."""
        folder = self._place.workspace / f".fetched-{checkpoint.name}-{checkpoint.manifest['sha256'][:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for file in checkpoint.files:
                target = folder / file
                if target.exists():
                    continue
                target.parent.mkdir(exist_ok=True)
                partial = target.with_name(f"{target.name}.part")
                with partial.open("wb") as copy:
                    problem = self._problem(checkpoint, file, copy)
                if problem:
                    raise CheckpointError(f"{self.location(checkpoint)}/{file} {problem}")
                partial.replace(target)
        return folder

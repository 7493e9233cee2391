"""The folder of a run, and finding one again.

A run is a folder `<run.dir>/<name>-<run_id>/` whose `run.json` says how it stands. The folder is the record that later
verbs start from and needs no server: MLflow gets a copy. `run.json` is replaced as a whole on every change, so a reader
never sees half of it; one process (the driver) writes it, and holds the claim on the folder while it lives.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nestling.config import RunConfig
from nestling.tracking.files import Locked, append_whole, is_locked, locked, replace_json

LATEST = "latest"
_TAIL = 1 << 18  # bytes of a log's end in which the last record of everything is looked for

_CLAIM_PATIENCE = 1.0  # seconds: one who only looks whether there is a claim holds it for a moment


class RunBusyError(RuntimeError):
    """The run is being trained by another process; the message is complete and ready to print."""


@dataclass(frozen=True)
class RunFolder:
    """One run on disk.

    Attributes:
        path: the folder itself, absolute.
        run_id: eight hexadecimal digits, unique in the runs folder.
        name: what the job called the run; many runs may share it.
    """

    path: Path
    run_id: str
    name: str

    @classmethod
    def create(cls, runs_dir: str | Path, name: str) -> RunFolder:
        """Make the folder of a new run, with the status `running`.

        Raises:
            ValueError: the name cannot be a part of a folder name, or there is no folder.
        """
        RunConfig(name, str(runs_dir))  # checks them
        root = Path(runs_dir).expanduser().resolve()
        root.mkdir(parents=True, exist_ok=True)
        run_id = secrets.token_hex(4)
        while any(root.glob(f"*-{run_id}")):
            run_id = secrets.token_hex(4)
        folder = cls(root / f"{name}-{run_id}", run_id, name)
        folder.path.mkdir()
        folder.update(run_id=run_id, name=name, status="running", started=_now())
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Take up an existing folder.

        Raises:
            LookupError: there is no readable `run.json` in it.
        """
        path = Path(path).expanduser().resolve()
        try:
            info = json.loads((path / "run.json").read_text(encoding="utf-8"))
            return cls(path, info["run_id"], info["name"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LookupError(f"{path} is not the folder of a run: its run.json cannot be read ({error})") from error

    @property
    def config(self) -> Path:
        """The resolved configuration, `config.yaml`."""
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        """One JSON object for each logged step, `log.jsonl`."""
        return self.path / "log.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object for each thing that happened besides steps, `events.jsonl`."""
        return self.path / "events.jsonl"

    @property
    def mlflow(self) -> Path:
        """What MLflow has not got yet, `mlflow/`."""
        return self.path / "mlflow"

    @property
    def stop(self) -> Path:
        """While this file is there, the workers save and stop after their present step; `stop`."""
        return self.path / "stop"

    @property
    def changes(self) -> Path:
        """Changes of levels that were asked for and wait for the next snapshot, `changes.json`."""
        return self.path / "changes.json"

    @property
    def ray_log(self) -> Path:
        """What Ray and DeepSpeed print, `ray.log`."""
        return self.path / "ray.log"

    @property
    def weights(self) -> Path:
        """The final weights, `model.safetensors`."""
        return self.path / "model.safetensors"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer the model was trained with, `tokenizer.json`."""
        return self.path / "tokenizer.json"

    @property
    def pretrained(self) -> Path:
        """What an adapted run keeps of the pretrained model's small files, `pretrained/`."""
        return self.path / "pretrained"

    @property
    def position(self) -> Path:
        """Where a stream stands, `position.json`."""
        return self.path / "position.json"

    @property
    def evaluation(self) -> Path:
        """The last evaluation's figures, `evaluation.json`."""
        return self.path / "evaluation.json"

    @property
    def figure(self) -> Path:
        """The curves of the run, `loss.png`."""
        return self.path / "loss.png"

    def info(self) -> dict[str, Any]:
        """How the run stands: the content of `run.json`, with the status `stopped` in place of a `running` that is no
        longer true because the driver was killed."""
        info = self._written()
        if info.get("status") == "running" and not self.claimed:
            info["status"] = "stopped"
        return info

    @property
    def is_stream(self) -> bool:
        """Whether the run learns from a stream, and not from a prepared corpus."""
        return self.info().get("kind") == "stream"

    def status(self) -> str:
        """`running`, `finished`, `failed`, `interrupted`, or `stopped` when the driver was killed."""
        return str(self.info().get("status"))

    def update(self, **fields: Any) -> None:
        """Merge `fields` into `run.json`; a status other than `running` also sets `finished` to the present time."""
        target = self.path / "run.json"
        info = self._written() if target.exists() else {}
        if fields.get("status", "running") != "running":
            info["finished"] = _now()
        info.update(fields)
        replace_json(target, info)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Be the one driver of this run while the block runs; a killed process loses its claim with its life.

        Raises:
            RunBusyError: another process is training the run.
        """
        try:
            with locked(self._claim, _CLAIM_PATIENCE):
                yield
        except Locked as busy:
            raise RunBusyError(
                f"run {self.run_id} ({self.name}) is being trained by {busy}; wait for its end or stop it (Ctrl-C)"
            ) from busy

    @property
    def claimed(self) -> bool:
        """Whether a living driver holds the claim."""
        return is_locked(self._claim)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Append to `events.jsonl` what happened, for people and for programs.

        Args:
            kind: a short word, the same for the same thing (`resumed`, `checkpoint`, `skipped`).
            message: one sentence for a person.
            fields: what a program would want to know of it.
        """
        line = json.dumps({"time": _now(), "kind": kind, "message": message, **fields}) + "\n"
        with self.events.open("ab", buffering=0) as file:  # one write: lines of two processes do not mix
            append_whole(file, line.encode())

    def write_config(self, text: str) -> None:
        """Write `config.yaml` as a whole."""
        draft = self.config.with_suffix(".tmp")
        draft.write_text(text, encoding="utf-8")
        draft.replace(self.config)

    def happened(self) -> list[dict[str, Any]]:
        """The events of `events.jsonl` in their order."""
        if not self.events.exists():
            return []
        lines = self.events.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def records(self) -> list[dict[str, float]]:
        """The records of `log.jsonl` in the order of their steps; a last line still being written is left out."""
        if not self.log.exists():
            return []
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def cut_log(self, step: int) -> None:
        """Take the records of later steps out of the log, all at once; nobody may be writing to it."""
        draft = self.log.with_suffix(".jsonl.tmp")
        with self.log.open("rb") as old, draft.open("wb") as new:
            new.writelines(line for line in old if json.loads(line)["step"] <= step)
            new.flush()
            os.fsync(new.fileno())
        draft.replace(self.log)

    def last_values(self, upto: float = math.inf) -> dict[str, float]:
        """The last value of everything that the end of the log holds, of later steps than `upto` nothing."""
        records = [record for record in self._last_records() if record["step"] <= upto]
        return {key: value for record in records for key, value in record.items()}

    def _last_records(self) -> list[dict[str, float]]:
        """The records at the end of the log, which may be longer than anybody wants to read."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().splitlines(keepends=True)
        return [json.loads(line) for line in lines[size > _TAIL :] if line.endswith(b"\n")]

    def reached(self) -> dict[str, Any]:
        """`info` with `steps`, `tokens` and `train_loss`: of a run that did not finish, those of the log's end."""
        info = self.info()
        if info.get("steps") is None:
            last = self.last_values()
            tokens = last.get("train/tokens")
            info["steps"], info["train_loss"] = last.get("step"), last.get("train/loss")
            info["tokens"] = None if tokens is None else int(tokens)
        return info

    @property
    def _claim(self) -> Path:
        return self.path / "driver.lock"

    def _written(self) -> dict[str, Any]:
        return json.loads((self.path / "run.json").read_text(encoding="utf-8"))


def list_runs(runs_dir: str | Path) -> list[RunFolder]:
    """Every run in the runs folder, the newest last; none where the folder does not exist."""
    found: list[tuple[str, RunFolder]] = []
    for path in Path(runs_dir).expanduser().glob("*/run.json"):
        try:
            folder = RunFolder.open(path.parent)
        except LookupError:
            continue
        found.append((str(folder.info().get("started", "")), folder))
    return [folder for _, folder in sorted(found, key=lambda pair: (pair[0], pair[1].path.name))]


def find_run(runs_dir: str | Path, reference: str) -> RunFolder:
    """The run that `reference` means.

    Args:
        runs_dir: where runs are kept.
        reference: a run id, `latest`, a run's name (the newest of that name) or a unique beginning of a run id;
            tried in this order.

    Raises:
        LookupError: no run or more than one fits; the message names the candidates.
    """
    runs = list_runs(runs_dir)
    if not runs:
        raise LookupError(
            f"there are no runs in {Path(runs_dir).expanduser().resolve()}; train one first (nestling train "
            "jobs/quickstart.yaml) or say where they are kept with run.dir=FOLDER or NESTLING_RUNS"
        )
    if reference == LATEST:
        return runs[-1]
    for fits in (
        [run for run in runs if run.run_id == reference],
        [run for run in runs if run.name == reference],
    ):
        if fits:
            return fits[-1]
    fits = [run for run in runs if reference and run.run_id.startswith(reference)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise LookupError(f"{reference!r} is the beginning of {len(fits)} run ids: {_described(fits)}; give more of it")
    known = [run.run_id for run in runs] + [run.name for run in runs]
    near = difflib.get_close_matches(reference, dict.fromkeys(reversed(known)), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise LookupError(
        f"no run {reference!r} in {Path(runs_dir).expanduser().resolve()}: {hint}"
        f"the newest are {_described(runs[-5:])}; give an id, a unique beginning of one, a name or {LATEST!r}"
    )


def _described(runs: Iterable[RunFolder]) -> str:
    return ", ".join(f"{run.run_id} ({run.name})" for run in runs)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")

"""The snapshots of a run in a person's hands: what there is, what is kept for good, and the way back to one of them.

A run goes on from its newest snapshot, and its log, ledger and side files go back to where that stands. So going back
to an older one means no more than setting the newer ones aside: what is done over is what was planned before.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from nestling.checkpoint import Checkpoint, CheckpointError, Store, run_store
from nestling.config import ConfigError, JobConfig, from_yaml, to_yaml
from nestling.data.streams import WindowFolder
from nestling.evaluation.prequential import Prequential
from nestling.tracking import RunFolder
from nestling.tracking.files import Locked
from nestling.tracking.outbox import Outbox
from nestling.tracking.runs import RunBusyError
from nestling.training.resume import job_of

#: Seconds that the workers of a killed driver have to end.
PATIENCE = 30.0


@dataclass(frozen=True)
class Snapshot:
    """One snapshot, checked.

    Attributes:
        step: optimizer steps done.
        created: when, in ISO 8601.
        bytes: of all its files.
        good: whether every file is as it was written.
        problem: what is wrong with the first that is not.
        pinned: whether it is kept for good.
        metric: held-out loss, if it was measured then.
        window: of a stream, the window that goes on from it.
        offsets: of a stream, where each partition stood when that window began.
        lineage: what the run went on from before, and which levels changed there.
        location: path or URI.
    """

    step: int
    created: str
    bytes: int
    good: bool
    problem: str | None
    pinned: bool
    metric: float | None
    window: int | None
    offsets: dict[str, int] | None
    lineage: list[dict[str, Any]] | None
    location: str


def snapshots(folder: RunFolder) -> tuple[list[Snapshot], list[str]]:
    """The snapshots, newest first, and what is wrong with those whose manifest cannot be read; reads every file.

    Raises:
        ConfigError: the run has not begun.
        OSError: the place of the snapshots cannot be listed.
    """
    store = run_store(job_of(folder), folder)
    pinned = store.pinned()
    found = [_checked(store, checkpoint, checkpoint.step in pinned) for checkpoint in store.checkpoints()]
    still_there = {checkpoint.step for checkpoint in store.checkpoints()}  # a running run removes old ones
    return [snapshot for snapshot in found if snapshot.step in still_there], store.damaged()


def standing(folder: RunFolder) -> tuple[dict[str, float], dict[str, Any]]:
    """Where a run at rest goes on: figures of its newest snapshot under their names in the log, and, of a stream, where
    it stands in its source. Both are empty if there is no snapshot; shards are not read.

    Raises:
        OSError: the place of the snapshots cannot be listed.
    """
    if not folder.config.exists():
        return {}, {}
    config = job_of(folder)
    store = run_store(config, folder)
    for checkpoint in store.checkpoints():
        try:
            state = json.loads(store.document(checkpoint, "state.json"))
        except CheckpointError:  # the run goes on from the one before
            continue
        figures = {"step": state["step"], "train/tokens": state["step"] * config.training.batch_tokens}
        figures |= {f"levels/{name}/updates": count for name, count in state["updates"].items()}
        if "stream" not in state:
            return figures, {}
        stream, prequential = state["stream"], Prequential(config.stream.fading)
        prequential.load(stream["prequential"])
        figures |= {f"stream/records/{name}": count for name, count in stream["records"].items()}
        return figures | prequential.metrics(), stream["position"]
    return {}, {}


def pin(folder: RunFolder, step: int | None = None, on: bool = True) -> Checkpoint:
    """Keep a snapshot for good, the newest if no step is given, or let go of it; also while the run goes on.

    Raises:
        ConfigError: there is no such snapshot.
    """
    store = run_store(job_of(folder), folder)
    checkpoint = _at(store, folder, step)
    if on:
        store.pin(checkpoint)
    else:
        store.unpin(checkpoint)
    return checkpoint


def restore(folder: RunFolder, step: int) -> dict[str, Any]:
    """Let the run go on from the snapshot of `step`, with the levels that it had then; newer ones are set aside.

    Returns:
        `step`, `window` (None for a training), `checkpoint` (where it is) and `set_aside` (steps).

    Raises:
        RunBusyError: the run is being trained.
        ConfigError: there is no such snapshot.
        CheckpointError: it is damaged.
    """
    try:
        with folder.claim(), closing(Outbox(folder.mlflow, PATIENCE)) as outbox:
            config = job_of(folder)
            store = run_store(config, folder)
            checkpoint = _at(store, folder, step)
            if problems := store.problems(checkpoint):
                raise CheckpointError(f"{problems[0]}, so the run cannot go on from it; choose another snapshot")
            state = json.loads(store.document(checkpoint, "state.json"))
            _check_plan(folder, state)
            # Levels first: a run of which only some snapshots were set aside must not go on with other levels.
            folder.write_config(to_yaml(_with_levels(config, store.document(checkpoint, "config.yaml"))))
            aside = store.set_aside(after=step)
            location, tokens = store.location(checkpoint), step * config.training.batch_tokens
            results = {"steps": step, "tokens": tokens, "train_loss": state["loss"], "checkpoint": location}
            folder.update(**results, status="interrupted", error=None, heldout_bits_per_byte=None)
            folder.event("restored", f"the run goes on from step {step}, saved to {location}", step=step)
            for other in aside:
                outbox.put_forgotten(other)
    except Locked as busy:
        raise RunBusyError(
            f"run {folder.run_id} ({folder.name}) is still recorded by {busy}; wait for its end"
        ) from busy
    window = state["stream"]["position"]["window"] if "stream" in state else None
    return {"step": step, "window": window, "checkpoint": location, "set_aside": aside}


def _at(store: Store, folder: RunFolder, step: int | None) -> Checkpoint:
    checkpoints = store.checkpoints()
    for checkpoint in checkpoints:
        if step in (None, checkpoint.step):
            return checkpoint
    there = ", ".join(str(checkpoint.step) for checkpoint in checkpoints) or "none"
    asked = "" if step is None else f" of step {step}"
    raise ConfigError(f"run {folder.run_id} ({folder.name}) has no snapshot{asked}; there are: {there}")


def _checked(store: Store, checkpoint: Checkpoint, pinned: bool) -> Snapshot:
    problem, state = next(iter(store.problems(checkpoint)), None), dict[str, Any]()
    if problem is None:
        try:
            state = json.loads(store.document(checkpoint, "state.json"))
        except (CheckpointError, OSError) as error:  # removed in this moment
            problem = str(error)
    position = state.get("stream", {}).get("position", {})
    return Snapshot(
        step=checkpoint.step,
        created=checkpoint.manifest["created"],
        bytes=sum(file["bytes"] for file in checkpoint.files.values()),
        good=problem is None,
        problem=problem,
        pinned=pinned,
        metric=checkpoint.metric,
        window=position.get("window"),
        offsets=position.get("offsets"),
        lineage=state.get("lineage"),
        location=store.location(checkpoint),
    )


def _check_plan(folder: RunFolder, state: dict[str, Any]) -> None:
    stream = state.get("stream", {"batches_done": 0})
    if stream["batches_done"] and WindowFolder(folder.path / "windows").plan(stream["position"]["window"]) is None:
        raise CheckpointError(
            f"the snapshot lies in the middle of window {stream['position']['window']}, whose plan is missing in "
            f"{folder.path / 'windows'}; put it back, or choose another snapshot"
        )


def _with_levels(config: JobConfig, text: str) -> JobConfig:
    """The job with the levels of another text of it."""
    before = from_yaml(text)
    try:
        return replace(config, levels=before.levels, model=before.model, continuum=before.continuum)
    except ValueError as error:
        raise ConfigError(
            f"the snapshot has other levels than the run has now, and the rest of its job does not fit them: {error}; "
            "go on with the run once, with that changed, and stop it again"
        ) from error

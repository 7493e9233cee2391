"""A level leaves a run by itself and enters another copy of the same base.

A copy of the same base is a run that was adapted from a pretrained model with the same weights. What counts are those
first weights, kept as a hash in `run.json`, and not the present ones: training moves every level and the attention, and
two copies that have learnt differently are still copies. That the rest of the model is not what the level grew up with
is found out as well, and told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.checkpoint import (
    WEIGHT,
    CheckpointError,
    OpenCheckpoint,
    export_weights,
    newest_good,
    open_weights,
    run_store,
    trained_step,
)
from nestling.checkpoint.alone import WeightsHash, commit_tensors
from nestling.checkpoint.level_file import LevelFile, Origin, read_level, write_level
from nestling.config import ConfigError, JobConfig, LevelConfig
from nestling.tracking import RunFolder
from nestling.training.groups import level_members
from nestling.training.resume import job_of


def export_level(run: RunFolder, level: str, out: Path) -> dict[str, Any]:
    """Write one level's weights and a manifest into an empty folder; returns the manifest.

    Args:
        run: an adapted run.
        level: a level's name, or its number: 1 is the first, and so the fastest.

    Raises:
        ConfigError: the run has no such level, or was not adapted.
        CheckpointError: it has no weights, or no good checkpoint, which says what its levels have seen.
    """
    config, base = job_of(run), _base(run)
    name = _level_name(config, level)
    settings = _settings(config, name)
    members, weights = level_members(config), open_weights(run, config)
    shapes = members[name]
    steps, tokens = _seen(run, config, shapes)
    origin = Origin(
        base={key: base[key] for key in ("name", "sha256")},
        level=name,
        period=settings.period,
        unit=settings.unit,
        steps=steps,
        tokens=tokens,
        rest_sha256=_rest(members, name, weights.read),
    )
    return write_level(out, origin, shapes, (weights.read(each) for each in shapes))


def load_level(run: RunFolder, folder: Path) -> dict[str, Any]:
    """Put a level that another run left into this one, in its newest checkpoint and its final weights.

    The level's optimizer state, which belongs to the weights that it replaces, is left out; all else stays. The
    checkpoint is replaced as a whole. The final weights follow it; if that is cut short, do it again.

    Returns:
        `level` (its name in this run), its `period` here and the `period_before` ("4 steps"), `step`, `checkpoint`, and
        `rest`: whether the rest of the model is the "same" as where the level comes from, or an "other".

    Raises:
        ConfigError: the run was not adapted, has another base, or no level with the same parameters.
        CheckpointError: the level is damaged, or the run's weights are.
        RunBusyError: the run is being trained.
    """
    with run.claim():
        config, base, entering = job_of(run), _base(run), read_level(folder)
        origin = entering.origin
        if origin.base["sha256"] != base["sha256"]:
            raise ConfigError(
                f"level {origin.level} in {folder} belongs to the base {origin.base['name']} "
                f"(SHA-256 {origin.base['sha256']}), but run {run.run_id} was adapted from {base['name']} "
                f"(SHA-256 {base['sha256']})"
            )
        members = level_members(config)
        name = _fitting(run, members, entering)
        finished, rest = run.status() == "finished", _rest(members, name, open_weights(run, config).read)
        store = run_store(config, run)
        found = newest_good(store)
        if found.checkpoint.step != trained_step(run):
            raise CheckpointError(f"the newest checkpoint of run {run.run_id} is damaged; resume the run first")
        checkpoint = commit_tensors(
            store,
            found.checkpoint.step,
            *_replaced(found, entering.weights),
            _documents(found, entering, name),
        )
        run.event("level-loaded", f"level {name} came from {folder}", level=name, sha256=origin.base["sha256"])
        if finished:
            export_weights(store, config, run.weights)
        run.evaluation.unlink(missing_ok=True)  # it is about the weights before
        run.update(heldout_bits_per_byte=None)
    settings = _settings(config, name)
    return {
        "level": name,
        "period": f"{settings.period} {settings.unit}",
        "period_before": f"{origin.period} {origin.unit}",
        "step": checkpoint.step,
        "checkpoint": store.location(checkpoint),
        "rest": "same" if rest == origin.rest_sha256 else "other",
    }


def _base(run: RunFolder) -> dict[str, str]:
    base = run.info().get("base")
    if base is None:
        raise ConfigError(
            f"run {run.run_id} ({run.name}) was not adapted from a pretrained model, so it has no base that another "
            "run could share; nestling adapt makes runs that have"
        )
    return base


def _level_name(config: JobConfig, level: str) -> str:
    names = [str(each.name) for each in config.levels]
    if level in names:
        return level
    if level.isdecimal() and 1 <= int(level) <= len(names):
        return names[int(level) - 1]
    raise ConfigError(f"--level: got {level!r}, needs one of {', '.join(names)}, or a number from 1 to {len(names)}")


def _settings(config: JobConfig, name: str) -> LevelConfig:
    return next(level for level in config.levels if level.name == name)


def _fitting(run: RunFolder, members: Mapping[str, Mapping[str, torch.Size]], entering: LevelFile) -> str:
    """The level of the run that has the same parameters."""
    shapes = {name: weights.shape for name, weights in entering.weights.items()}
    for name, own in members.items():
        if name != "base" and own == shapes:
            return name
    raise ConfigError(
        f"level {entering.origin.level} holds {', '.join(sorted(shapes)[:3])} and so on, and no level of run "
        f"{run.run_id} has exactly its parameters; adapt the base with the same --levels and --assign"
    )


def _rest(members: Mapping[str, Mapping[str, torch.Size]], level: str, read: Any) -> str:
    """The hash of all weights outside a level."""
    shapes = {n: shape for name, own in members.items() if name != level for n, shape in own.items()}
    shapes = dict(sorted(shapes.items()))
    digest = WeightsHash()
    for _ in digest.through(shapes, (read(name) for name in shapes)):
        pass
    return digest.hexdigest()


def _replaced(
    found: OpenCheckpoint, weights: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[torch.dtype, int]], Iterator[Tensor]]:
    """The checkpoint's tensors with other weights in some parameters, which lose their optimizer state."""
    pieces = found.pieces
    kept = [name for name in pieces.sizes if name.startswith(WEIGHT) or name.partition("/")[2] not in weights]
    kept.sort(key=lambda name: (-pieces.dtypes[name].itemsize, name))
    sizes = {name: (pieces.dtypes[name], pieces.sizes[name]) for name in kept}
    changed = {WEIGHT + name: tensor.flatten() for name, tensor in weights.items()}
    return sizes, (changed[name] if name in changed else pieces.read(name) for name in kept)


def _documents(found: OpenCheckpoint, entering: LevelFile, level: str) -> dict[str, str]:
    """The checkpoint's documents, with what the level brings along in the lineage, and no moves of it counted: averages
    that start afresh are corrected by the moves since."""
    state, origin = json.loads(found.documents["state.json"]), entering.origin
    state["updates"][level] = 0
    for name in entering.weights.keys() & state["optimizer"].keys():
        state["optimizer"][name] = {"steps": state["optimizer"][name]["steps"], "updates": 0}
    history = {"steps": origin.steps, "tokens": origin.tokens, "loaded_at": found.checkpoint.step}
    state["lineage"].append({"level": origin.level, "parameters": sorted(entering.weights)} | history)
    return dict(found.documents) | {"state.json": json.dumps(state, indent=1)}


def _seen(run: RunFolder, config: JobConfig, parameters: Iterable[str]) -> tuple[int, int]:
    """Steps and tokens that a level has behind it: where it came from, and in this run since it was loaded.

    Before the first step of a run its levels can be dealt out anew, so a level is known by its parameters.
    """
    found = newest_good(run_store(config, run))
    steps = tokens = since = 0
    for entry in json.loads(found.documents["state.json"])["lineage"]:
        if entry.get("parameters") == sorted(parameters):
            steps, tokens, since = entry["steps"], entry["tokens"], entry["loaded_at"]
    step = int(run.info()["steps"]) if run.status() == "finished" else found.checkpoint.step
    here = step - since
    return steps + here, tokens + here * config.training.batch_tokens

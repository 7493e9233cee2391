"""A checkpoint as a job with other levels reads it: a level that it lacks is there, and adds nothing yet.

Which levels a run has is said by its configuration alone. A checkpoint from before a level was added is complete with
what the level begins with: weights from the seed, an output matrix of zeros (so that the residual stream, and with it
every logit, is what it was to the bit), no moments, and the clock of the others. Everything else is the checkpoint's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nestling.checkpoint.pieces import WEIGHT, Pieces
from nestling.checkpoint.store import OpenCheckpoint
from nestling.config import JobConfig, from_yaml
from nestling.models import build
from nestling.models.cms import silent_level
from nestling.models.config import LevelsConfig
from nestling.models.skeleton import LanguageModel


def grown(found: OpenCheckpoint, config: JobConfig) -> OpenCheckpoint:
    """The checkpoint with the levels of a job; itself if these are the levels that it has.

    What is other is added to the lineage in its `state.json`: `{"from": its name, "levels": [...]}`, with an entry for
    each level that is new (`width`, `period`, `unit`) or moves at another period (`period_before`, `unit_before`).
    """
    if "config.yaml" not in found.documents:
        return found
    before = from_yaml(found.documents["config.yaml"])
    changes = _changes(before, config)
    if not changes:
        return found
    state = json.loads(found.documents["state.json"])
    state["lineage"].append({"from": found.checkpoint.name, "levels": changes})
    old, new = _level_parameters(before), _level_parameters(config)
    names = {was: now for level in old.keys() & new.keys() for was, now in zip(old[level], new[level], strict=True)}
    scalars = {names.get(name, name): values for name, values in state["optimizer"].items()}
    clock = max((values["steps"] for values in scalars.values()), default=0)
    fresh: dict[str, Callable[[], Tensor]] = {}
    for change in changes:
        if "width" in change:
            level = change["level"]
            state["updates"][level] = 0
            scalars |= {name: {"steps": clock, "updates": 0} for name in new[level]}
            fresh |= _beginning(
                new[level], f"{config.seed} {level}", config.model.layers, config.model.width, change["width"]
            )
    documents = dict(found.documents) | {"state.json": json.dumps(state | {"optimizer": scalars}, indent=1)}
    return replace(found, documents=documents, pieces=_Grown(found.pieces, names, fresh))


def _changes(before: JobConfig, after: JobConfig) -> list[dict[str, Any]]:
    known = {level.name: level for level in before.levels}
    changes = []
    for level in after.levels:
        now = {"level": level.name, "period": level.period, "unit": level.unit}
        if level.name not in known:
            if level.width is not None and isinstance(after.model, LevelsConfig):
                changes.append(now | {"width": level.width})
            continue
        was = known[level.name]
        if (was.period, was.unit) != (level.period, level.unit):
            changes.append(now | {"period_before": was.period, "unit_before": was.unit})
    return changes


def _level_parameters(config: JobConfig) -> dict[str, list[str]]:
    """Names of the parameters of each level of the Continuum Memory System, block by block."""
    with torch.device("meta"):
        model = build(config.model)
    assert isinstance(model, LanguageModel)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    levels = [str(level.name) for level in config.levels if level.width is not None]
    return {level: [names[id(p)] for p in own] for level, own in zip(levels, model.level_parameters(), strict=False)}


def _beginning(names: list[str], seed: str, layers: int, width: int, hidden: int) -> dict[str, Callable[[], Tensor]]:
    """What makes each parameter of a new level, named block by block, when it is asked for."""
    count = len(names) // layers
    return {name: partial(_parameter, seed, *divmod(n, count), width, hidden) for n, name in enumerate(names)}


def _parameter(seed: str, block: int, place: int, width: int, hidden: int) -> Tensor:
    """One parameter of a block's new level, flattened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.Random(f"{seed} {block}").getrandbits(63))
        return list(silent_level(width, hidden).parameters())[place].detach().flatten()


class _Grown(Pieces):
    """Pieces under new names, with whole weights that are in no file.

    Args:
        pieces: what there is.
        names: the new name of each parameter that has one.
        fresh: what makes the flattened weights of the others.
    """

    def __init__(self, pieces: Pieces, names: Mapping[str, str], fresh: Mapping[str, Callable[[], Tensor]]) -> None:
        self._pieces, self._fresh = pieces, {WEIGHT + name: make for name, make in fresh.items()}
        self._names: dict[str, str] = {}
        for old in pieces.sizes:
            kind, _, name = old.partition("/")
            self._names[f"{kind}/{names.get(name, name)}"] = old
        self.sizes = {new: pieces.sizes[old] for new, old in self._names.items()}
        self.dtypes = {new: pieces.dtypes[old] for new, old in self._names.items()}
        self.sizes |= {name: len(make()) for name, make in self._fresh.items()}
        self.dtypes |= dict.fromkeys(self._fresh, torch.float32)

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        if name not in self._fresh:
            return self._pieces.read(self._names.get(name, name), start, length)
        tensor = self._fresh[name]()
        return tensor[start:] if length is None else tensor[start : start + length]

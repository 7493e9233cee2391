"""Which parameter moves in which level: the parameter groups of `nestling.optim.Levels`.

The Continuum Memory System's levels come with the model; other levels name parameters by pattern; the rest is the level
`base`, which moves at every step. Matrices and the head decay, vectors and the embedding do not.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from nestling.config import ConfigError, JobConfig, LevelConfig
from nestling.models import build
from nestling.models.config import LevelsConfig
from nestling.models.skeleton import LanguageModel
from nestling.optim import COMPONENTS, is_matrix

#: Rules that leave all but matrices to AdamW.
MATRIX_RULES = [name for name, component in COMPONENTS.items() if component.matrices_only]


def parameter_groups(model: LanguageModel, config: JobConfig) -> list[dict[str, Any]]:
    """Parameter groups for `Levels`, every parameter in exactly one.

    Raises:
        ConfigError: a level's patterns match no parameter that is left, or one of a level behind it.
    """
    left = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in left.items()}
    members: list[tuple[LevelConfig, dict[str, nn.Parameter]]] = []
    cms = iter(model.level_parameters())
    for level in config.levels:
        if level.width is not None or level.layers:
            chosen = [names[id(parameter)] for parameter in next(cms, [])]
            if taken := [name for name in chosen if name not in left]:
                raise ConfigError(
                    f"level {level.name}: its parameter {taken[0]} is in a level before it, whose `parameters` match "
                    "it; give that level other patterns, or put it behind this one"
                )
        else:
            chosen = [name for name in left if any(fnmatchcase(name, pattern) for pattern in level.parameters)]
            if not chosen:
                raise ConfigError(
                    f"level {level.name}: no parameter (that is not in another level) matches {level.parameters}; "
                    f"parameters are named like {', '.join(list(left)[:4])}"
                )
        members.append((level, {name: left.pop(name) for name in chosen}))
    members.append((LevelConfig(name="base", optimizer=config.training.optimizer), left))
    groups = [group for level, parameters in members for group in _groups(level, parameters, config)]
    return _nested(groups, config)


def _nested(groups: list[dict[str, Any]], config: JobConfig) -> list[dict[str, Any]]:
    """In the nested variant, each level of the Continuum Memory System is inside the next one (Eq. 72)."""
    if not isinstance(config.model, LevelsConfig) or config.model.level_variant != "nested":
        return groups
    names = [level.name for level in config.levels if level.width is not None]
    slower = dict(pairwise(names))
    return [{**group, "slower": slower.get(group["name"])} for group in groups]


def level_members(config: JobConfig) -> dict[str, dict[str, torch.Size]]:
    """Names and shapes of the parameters of each level, sorted; those in no level are in the level `base`."""
    with torch.device("meta"):
        model = build(config.model)
    assert isinstance(model, LanguageModel)
    level = {id(p): group["name"] for group in parameter_groups(model, config) for p in group["params"]}
    members: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in sorted(model.named_parameters()):
        members.setdefault(level[id(parameter)], {})[name] = parameter.shape
    return members


def _groups(level: LevelConfig, parameters: dict[str, nn.Parameter], config: JobConfig) -> list[dict[str, Any]]:
    """The groups of one level: vectors and tables apart from matrices, because ZeRO makes one tensor of a group."""
    training, optimizers = config.training, config.optimizers
    rate = level.learning_rate or training.learning_rate
    settings = {
        "name": level.name,
        "period": level.period,
        "unit": level.unit,
        "tokens_per_step": training.batch_tokens,
        "optimizer": level.optimizer,
        **({"betas": tuple(training.betas)} | optimizers.settings(level.optimizer)),
    }
    split: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decayed = parameter.dim() >= 2 and not name.startswith("embedding")
        split.setdefault((is_matrix(name, parameter), decayed), []).append(parameter)
    groups = []
    for (matrix, decayed), params in sorted(split.items(), key=lambda item: item[0]):
        peak = rate if matrix or level.optimizer not in MATRIX_RULES else training.adamw_learning_rate or rate
        decay = training.weight_decay if decayed else 0.0
        groups.append(
            {"params": params, "matrix": matrix, "weight_decay": decay, "lr": peak, "peak_lr": peak, **settings}
        )
    return groups

"""Which parameter moves in which level: the parameter groups of `nestling.optim.Levels`.

The Continuum Memory System's levels come with the model; other levels name parameters by pattern; the rest is the level
`base`, which moves at every step. Matrices decay, vectors and the embedding do not.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nestling.config import ConfigError, JobConfig, LevelConfig
from nestling.models.skeleton import LanguageModel


def parameter_groups(model: LanguageModel, config: JobConfig) -> list[dict[str, Any]]:
    """Parameter groups for `Levels`, every parameter in exactly one.

    Raises:
        ConfigError: a level's patterns match no parameter that is left.
    """
    left = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in left.items()}
    members: list[tuple[LevelConfig, dict[str, nn.Parameter]]] = []
    cms = iter(model.level_parameters())
    for level in config.levels:
        if level.width is not None:
            chosen = [names[id(parameter)] for parameter in next(cms, [])]
        else:
            chosen = [name for name in left if any(fnmatchcase(name, pattern) for pattern in level.parameters)]
            if not chosen:
                raise ConfigError(
                    f"level {level.name}: no parameter (that is not in another level) matches {level.parameters}; "
                    f"parameters are named like {', '.join(list(left)[:4])}"
                )
        members.append((level, {name: left.pop(name) for name in chosen}))
    members.append((LevelConfig(name="base"), left))
    return [group for level, parameters in members for group in _decay_split(level, parameters, config)]


def _decay_split(level: LevelConfig, parameters: dict[str, nn.Parameter], config: JobConfig) -> list[dict[str, Any]]:
    training = config.training
    rate = level.learning_rate or training.learning_rate
    settings = {
        "name": level.name,
        "period": level.period,
        "unit": level.unit,
        "tokens_per_step": training.batch_tokens,
        "optimizer": level.optimizer,
        "lr": rate,
        "peak_lr": rate,
        "betas": tuple(training.betas),
    }
    decayed = [p for name, p in parameters.items() if p.dim() >= 2 and not name.startswith("embedding")]
    kept = [p for name, p in parameters.items() if p.dim() < 2 or name.startswith("embedding")]
    split = ((decayed, training.weight_decay), (kept, 0.0))
    return [{"params": params, "weight_decay": decay, **settings} for params, decay in split if params]

"""Models of equal size for a comparison: as many parameters as HOPE has, by construction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from nestling.models import MODEL_CONFIGS, SkeletonConfig
from nestling.models.parameters import match_parameters

Model = Mapping[str, Any]


def beside(name: str, hope: Model, vocab_size: int) -> Model:
    """The model `name` with the layers, heads and, within 1 %, the parameters of `hope`; HOPE is itself."""
    if name == hope["name"]:
        return hope
    model: Model = json.loads(_matched(name, json.dumps(dict(hope)), vocab_size))
    return model


@cache
def _matched(name: str, hope: str, vocab_size: int) -> str:
    """`beside`, on JSON so that it can be kept: counting takes a second."""
    target = json.loads(hope) | {"vocab_size": vocab_size}
    shape = {key: target[key] for key in ("vocab_size", "width", "layers", "heads")}
    matched = asdict(match_parameters(_config(shape | {"name": name}), _config(target), tolerance=0.01))
    del matched["vocab_size"]
    return json.dumps(matched)


def _config(model: Model) -> SkeletonConfig:
    return MODEL_CONFIGS[model["name"]](**model)

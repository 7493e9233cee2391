"""From a configuration to a model: names are looked up here and nowhere else."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from nestling.models.config import (
    MODEL_CONFIGS,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    HopeAttentionConfig,
    HopeConfig,
    LinearAttentionConfig,
    LstmConfig,
    Mamba2Config,
    SkeletonConfig,
    TitansConfig,
    TransformerConfig,
)
from nestling.models.delta_net import delta_net, gated_delta_net, linear_attention
from nestling.models.hope import hope
from nestling.models.hope_attention import hope_attention
from nestling.models.lstm import lstm
from nestling.models.mamba2 import mamba2
from nestling.models.skeleton import LanguageModel
from nestling.models.titans import titans
from nestling.models.transformer import transformer

#: What makes a model of each configuration class.
BUILDERS: dict[type[SkeletonConfig], Callable[[Any], LanguageModel]] = {
    HopeConfig: hope,
    HopeAttentionConfig: hope_attention,
    TransformerConfig: transformer,
    DeltaNetConfig: delta_net,
    GatedDeltaNetConfig: gated_delta_net,
    LinearAttentionConfig: linear_attention,
    Mamba2Config: mamba2,
    LstmConfig: lstm,
    TitansConfig: titans,
}


def make(config: SkeletonConfig | Mapping[str, Any]) -> LanguageModel:
    if not isinstance(config, SkeletonConfig):
        config = _from_mapping(config)
    if config.vocab_size is None:
        raise ValueError("model.vocab_size: got None, needs the number of tokens to build a model")
    if type(config) not in BUILDERS:
        raise ValueError(f"config: got a {type(config).__name__}, needs one of {', '.join(MODEL_CONFIGS)}")
    return BUILDERS[type(config)](config).to(getattr(torch, config.dtype))


def _from_mapping(mapping: Mapping[str, Any]) -> SkeletonConfig:
    values = dict(mapping)
    name = values.get("name")
    if name not in MODEL_CONFIGS:
        raise ValueError(f"model.name: got {name!r}, needs one of {', '.join(MODEL_CONFIGS)}")
    known = [field.name for field in fields(MODEL_CONFIGS[name])]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f"model.{key}: {name} has no such field; did you mean model.{nearest[0]}?")
    return MODEL_CONFIGS[name](**values)

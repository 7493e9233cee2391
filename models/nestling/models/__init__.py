"""Language models that keep learning, and their baselines, on one skeleton.

`build(config)` makes any of them. A model maps tokens (B, T) and an optional state to logits (B, T, V) and the state
that a stream carries from call to call; `model(a ++ b)` equals `model(a)` then `model(b, state)` at any split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nestling.models.config import (
    MODEL_CONFIGS,
    HopeAttentionConfig,
    HopeConfig,
    SkeletonConfig,
    TransformerConfig,
)

if TYPE_CHECKING:
    from nestling.models.skeleton import LanguageModel

__all__ = ["MODEL_CONFIGS", "HopeAttentionConfig", "HopeConfig", "SkeletonConfig", "TransformerConfig", "build"]


def build(config: SkeletonConfig | Mapping[str, Any]) -> LanguageModel:
    """Make a model from its configuration, or from a mapping such as the `model` section of a job file.

    Args:
        config: one of the dataclasses of `MODEL_CONFIGS`, or a mapping with `name` and any of that dataclass's fields;
            `name`, `vocab_size`, `width`, `layers` and `heads` are enough.

    Raises:
        ValueError: an unknown model or field (the nearest known one is named), or a value out of range.
    """
    from nestling.models.factory import make  # torch is only needed here; configurations load without it

    return make(config)

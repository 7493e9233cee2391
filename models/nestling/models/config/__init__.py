"""Configurations of the models, one dataclass a model, documented field by field.

A configuration is checked when it is made: what is wrong, what is needed and how to fix it stand in the message.
`vocab_size` is usually left to the tokenizer, `level_widths` to the job's list of levels.
"""

from nestling.models.config.attention import AttentionConfig, HopeAttentionConfig, TransformerConfig
from nestling.models.config.continuum import ContinuumConfig
from nestling.models.config.hope import HopeConfig
from nestling.models.config.levels import LevelsConfig
from nestling.models.config.recurrent import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    LinearAttentionConfig,
    LstmConfig,
    Mamba2Config,
)
from nestling.models.config.skeleton import SkeletonConfig
from nestling.models.config.titans import TitansConfig

__all__ = [
    "MODEL_CONFIGS",
    "AttentionConfig",
    "ContinuumConfig",
    "DeltaNetConfig",
    "GatedDeltaNetConfig",
    "HopeAttentionConfig",
    "HopeConfig",
    "LevelsConfig",
    "LinearAttentionConfig",
    "LstmConfig",
    "Mamba2Config",
    "SkeletonConfig",
    "TitansConfig",
    "TransformerConfig",
]

#: The configuration class of each model, by its name.
MODEL_CONFIGS: dict[str, type[SkeletonConfig]] = {
    "hope": HopeConfig,
    "hope_attention": HopeAttentionConfig,
    "transformer": TransformerConfig,
    "delta_net": DeltaNetConfig,
    "gated_delta_net": GatedDeltaNetConfig,
    "linear_attention": LinearAttentionConfig,
    "mamba2": Mamba2Config,
    "lstm": LstmConfig,
    "titans": TitansConfig,
}

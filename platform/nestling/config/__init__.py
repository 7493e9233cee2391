"""Job configurations: dataclasses for every section, job files in YAML, `key=value` overrides.

`load` turns a job file into a checked `JobConfig`; anything wrong is a `ConfigError` with a complete message, raised
before Ray or torch are imported.
"""

from nestling.config.build import ConfigError
from nestling.config.data import DataConfig, MixConfig
from nestling.config.load import from_yaml, load, pick, to_mapping, to_yaml
from nestling.config.schema import JobConfig, LevelConfig, RunConfig, TrackingConfig
from nestling.config.training import EvaluationConfig, TrainingConfig

__all__ = [
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "JobConfig",
    "LevelConfig",
    "MixConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainingConfig",
    "from_yaml",
    "load",
    "pick",
    "to_mapping",
    "to_yaml",
]

"""The sections of a job, one dataclass a section, documented field by field.

A section checks its own ranges when it is made, `JobConfig` checks what only holds between sections, so that a job that
exists is a job that can start. Messages name the full key, what was given, what is needed and, where it helps, the
nearest value that works. Choices are `Literal` types: the loader refuses anything else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from nestling.config.checks import need, need_different, need_name, positive, whole
from nestling.config.data import DataConfig
from nestling.config.optimizers import Optimizer, OptimizersConfig
from nestling.config.stream import StreamConfig
from nestling.config.training import CheckpointConfig, EvaluationConfig, TrainingConfig
from nestling.models.config import (
    AttentionConfig,
    ContinuumConfig,
    HopeAttentionConfig,
    HopeConfig,
    LevelsConfig,
    SkeletonConfig,
)


def _need_nesting(levels: list[LevelConfig]) -> None:
    for fast, slow in pairwise(levels):
        if fast.unit != slow.unit or slow.period % fast.period:
            needs = (
                "the same unit in all" if fast.unit != slow.unit else "each period to be a multiple of the one before"
            )
            raise ValueError(
                f"levels: got {fast.name} every {fast.period} {fast.unit}, then {slow.name} every {slow.period} "
                f"{slow.unit}; model.level_variant=nested needs {needs}"
            )


def _need_layers(levels: list[LevelConfig], count: int) -> None:
    """Checks that each of a model's `count` layers is in one level at most."""
    taken: dict[int, int] = {}
    for place, level in enumerate(levels):
        for layer in level.layers:
            where = f"levels.{place}.layers: got {list(level.layers)}"
            if not 0 <= layer < count:
                raise ValueError(f"{where}, needs layers from 0 to {count - 1} (model.layers={count})")
            if layer in taken:
                raise ValueError(
                    f"{where}, but layer {layer} is in levels.{taken[layer]}.layers already; needs each layer once"
                )
            taken[layer] = place


def need_memory(key: str, model: SkeletonConfig) -> None:
    """Checks that a model leaves more of a text than a cache of its tokens; `key` is what asks for it."""
    if isinstance(model, AttentionConfig):
        raise ValueError(
            f"{key}: was given, but model.name={model.name} has no memory, only a cache that grows with the text; "
            "needs a recurrent model, such as hope or titans"
        )


@dataclass
class RunConfig:
    """Name and place of a run."""

    #: Name of the run; its folder is `<dir>/<name>-<run id>`.
    name: str = "run"
    #: Folder where runs are kept and found; by default NESTLING_RUNS of the environment, else `runs`.
    dir: str = field(default_factory=lambda: os.environ.get("NESTLING_RUNS") or "runs")

    def __post_init__(self) -> None:
        need_name("run.name", self.name)
        if self.name == "latest":
            raise ValueError("run.name: 'latest' stands for the newest run; choose another name")
        if not self.dir.strip():
            raise ValueError("run.dir: got an empty text, needs a folder, for example run.dir=runs")


@dataclass
class TrackingConfig:
    """Where MLflow records the run."""

    #: MLflow tracking URI; None: MLFLOW_TRACKING_URI of the environment, else `mlflow.db` (sqlite) in `run.dir`.
    uri: str | None = None
    #: MLflow experiment.
    experiment: str = "nestling"


@dataclass
class LevelConfig:
    """One level: parameters that move together, every `period` steps or tokens."""

    #: Hidden width of the level's MLP in each block of the Continuum Memory System.
    width: int | None = None
    #: Steps or tokens from one update to the next.
    period: int = 1
    #: Unit of `period`: optimizer steps, or tokens read.
    unit: Literal["steps", "tokens"] = "steps"
    #: Optimizer of the level; `optimizers` holds their settings.
    optimizer: Optimizer = "adamw"
    #: Peak learning rate; None: training.learning_rate.
    learning_rate: float | None = None
    #: Instead of a width: fnmatch patterns over the model's parameter names, such as "blocks.*.mixer.*".
    parameters: list[str] = field(default_factory=list)
    #: Name in metrics and reports; None: level1, level2, ... by its place in the list.
    name: str | None = None
    #: Instead of both, for hope_attention with model.mlp_width: the layers, from 0, whose MLPs are in the level.
    layers: list[int] = field(default_factory=list)

    def check(self, where: str) -> None:
        """Raises ValueError if the level at `where` (such as "levels.0") cannot be built."""
        need(where, self, "at least 1", whole, "width", "period")
        need(where, self, "a finite value above 0", positive, "learning_rate")
        if self.name is not None:
            need_name(f"{where}.name", self.name)
        if self.name == "base":
            raise ValueError(f"{where}.name: got base, which is what is in no level; give the level another name")
        given = [name for name in ("width", "layers", "parameters") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"{where}: got {' and '.join(given) or 'none'} of width, layers and parameters, needs one of them: "
                "`width: 192` for a level of the Continuum Memory System, `layers: [0, 1]` for whole layers' MLPs, or "
                '`parameters: ["blocks.*"]` for a level of other parameters'
            )


@dataclass
class JobConfig:
    """A whole job. Making one names its levels and hands their widths to the model (`model.level_widths`)."""

    #: Seed of the initialisation and of the order of the data.
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    #: The configuration class that `nestling.models.config.MODEL_CONFIGS` holds under `model.name`.
    model: SkeletonConfig = field(default_factory=HopeConfig)
    #: Levels, fastest first; parameters outside every level move at every step.
    levels: list[LevelConfig] = field(default_factory=list)
    #: Whether the Continuum Memory System's levels also move inside a text, and how.
    continuum: ContinuumConfig = field(default_factory=ContinuumConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    #: How `nestling stream` reads, and what, if not `data.source`; `nestling train` does without.
    stream: StreamConfig = field(default_factory=StreamConfig)
    optimizers: OptimizersConfig = field(default_factory=OptimizersConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, needs a whole number from 0 to {2**32 - 1}")
        if self.model.dtype != "float32":
            raise ValueError(
                f"model.dtype: got {self.model.dtype}; training keeps its weights in float32: leave model.dtype out "
                "and choose the arithmetic with training.precision=bfloat16"
            )
        self._check_levels()
        self._check_batch()
        self._hand_over_levels()
        self._check_continuum()
        self._check_policies()
        if self.model.vocab_size is not None:
            self.stream.check_replay(self.data.sequence_length, self.model.vocab_size)
        self._check_carried_state()

    def _check_levels(self) -> None:
        for place, level in enumerate(self.levels):
            level.check(f"levels.{place}")
            level.name = level.name or f"level{place + 1}"
        need_different("levels", "level", [level.name for level in self.levels])
        if isinstance(self.model, LevelsConfig) and self.model.level_variant == "nested":
            _need_nesting([level for level in self.levels if level.width is not None])

    def _hand_over_levels(self) -> None:
        """Tell the model which levels of the Continuum Memory System it has."""
        widths = [level.width for level in self.levels if level.width is not None]
        layers = [level.layers for level in self.levels if level.layers]
        whole = isinstance(self.model, HopeAttentionConfig) and self.model.mlp_width is not None
        if whole and widths:
            raise ValueError(
                f"levels: got widths {widths}, but a block with model.mlp_width has one MLP and no chain of levels; "
                "give the levels `layers: [0, 1]`, or leave out model.mlp_width"
            )
        if layers and not whole:
            raise ValueError(
                f"levels: got layers {layers}, which needs model.name=hope_attention and model.mlp_width; others take "
                '`parameters: ["blocks.0.*"]`'
            )
        _need_layers(self.levels, self.model.layers)
        if isinstance(self.model, LevelsConfig):
            self.model.level_widths = widths
        if isinstance(self.model, HopeAttentionConfig):
            self.model = replace(self.model, level_layers=layers)

    def _check_continuum(self) -> None:
        drive, training = self.continuum.drive, self.training
        if drive == "schedule":
            return
        if not isinstance(self.model, LevelsConfig):
            raise ValueError(
                f"continuum.drive: got {drive}, which needs a model with a Continuum Memory System (hope or "
                f"hope_attention); model.name is {self.model.name}"
            )
        levels = [str(level.name) for level in self.levels if level.width is not None or level.layers]
        self.continuum.check(levels, self.model.level_variant == "nested")
        if training.zero_stage == 3:
            raise ValueError(
                f"training.zero_stage: got 3, which cuts up the weights that continuum.drive={drive} moves; "
                "needs 0, 1 or 2"
            )
        if training.activation_checkpointing:
            raise ValueError(
                f"training.activation_checkpointing: got true, but with continuum.drive={drive} the weights that made "
                "an activation are gone when it would be computed again; needs false"
            )
        rules = {training.optimizer, *(level.optimizer for level in self.levels)}
        if drive == "meta" and "delta_gradient_descent" in rules:
            raise ValueError(
                "delta_gradient_descent: needs layers whose weights stay while a text is read, and "
                "continuum.drive=meta moves them; choose another optimizer, or continuum.drive=schedule or stream"
            )

    def _check_policies(self) -> None:
        """Checks which levels the sources of a stream may write."""
        known = [*(str(level.name) for level in self.levels), "base"]
        chain = [str(level.name) for level in self.levels if level.width is not None]
        nested = isinstance(self.model, LevelsConfig) and self.model.level_variant == "nested"
        for place, part in enumerate(self.stream.sources or ()):
            where, given = f"stream.sources.{place}.levels", part.levels
            if given is None:
                continue
            for name in given:
                if name not in known:
                    raise ValueError(f"{where}: there is no level {name!r}; there are {', '.join(known)}")
            if nested and 0 < len(set(given) & set(chain)) < len(chain):
                raise ValueError(
                    f"{where}: got {given}, but with model.level_variant=nested a level is reset to what slower ones "
                    f"have learnt; needs all of {', '.join(chain)}, or none of them"
                )

    def _check_carried_state(self) -> None:
        if not self.stream.carry_state:
            return
        need_memory("stream.carry_state", self.model)
        if self.continuum.drive == "meta":
            raise ValueError(
                "stream.carry_state: got true, but continuum.drive=meta trains what levels move from at the beginning "
                "of every sequence; choose continuum.drive=schedule or stream"
            )

    def _check_batch(self) -> None:
        training, length = self.training, self.data.sequence_length
        unit = length * training.workers * (training.micro_batch or 1)
        if training.batch_tokens % unit == 0:
            return
        micro = f" x training.micro_batch={training.micro_batch}" if training.micro_batch else ""
        below = training.batch_tokens // unit * unit
        works = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"training.batch_tokens: got {training.batch_tokens}, needs a multiple of {unit} "
            f"(data.sequence_length={length} x training.workers={training.workers}{micro}), "
            f"so that every worker gets whole sequences; nearest: {works}"
        )

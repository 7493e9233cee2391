"""The sections of a job, one dataclass a section, documented field by field.

A section checks its own ranges when it is made, `JobConfig` checks what only holds between sections, so that a job that
exists is a job that can start. Messages name the full key, what was given, what is needed and, where it helps, the
nearest value that works. Choices are `Literal` types: the loader refuses anything else.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from nestling.config.optimizers import Optimizer, OptimizersConfig
from nestling.models.config import ContinuumConfig, HopeAttentionConfig, HopeConfig, LevelsConfig, SkeletonConfig


def _need(where: str, config: object, needs: str, holds: Callable[[float], bool], *names: str) -> None:
    """Checks the named fields of a section; None stands for "filled in later" and passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{where}.{name}: got {value}, needs {needs}")


def _need_name(where: str, value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError(
            f"{where}: got {value!r}, needs letters, digits, '_', '-' and '.' only, and a letter or digit first"
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


def _need_different(where: str, what: str, names: list[str | None]) -> None:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(
                f"{where}.{place}.name: {name!r} is the name of {where}.{names.index(name)} too; "
                f"give each {what} a name of its own"
            )


def _whole(value: float) -> bool:
    return value >= 1


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _fraction(value: float) -> bool:
    return 0 <= value <= 1


@dataclass
class RunConfig:
    """Name and place of a run."""

    #: Name of the run; its folder is `<dir>/<name>-<run id>`.
    name: str = "run"
    #: Folder where runs are kept and found; by default NESTLING_RUNS of the environment, else `runs`.
    dir: str = field(default_factory=lambda: os.environ.get("NESTLING_RUNS") or "runs")

    def __post_init__(self) -> None:
        _need_name("run.name", self.name)
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
class MixConfig:
    """One source of a mix."""

    #: As `data.source`.
    source: str
    #: Its share of the training sequences and of the evaluation, relative to the other weights.
    weight: float = 1.0
    #: Column of JSONL and Parquet files that holds the text; None: data.column.
    column: str | None = None
    #: Name in metrics and messages; None: made from the source.
    name: str | None = None

    def check(self, where: str) -> None:
        """Raises ValueError if the source at `where` (such as "data.mix.0") cannot be mixed in; fills in its name."""
        _need(where, self, "a finite value above 0", _positive, "weight")
        if self.name is None:
            self.name = _name_of(self.source)
        _need_name(f"{where}.name", self.name)


def _name_of(source: str) -> str:
    """The last word of a source: `english` of embedded:english, `wiki` of /texts/wiki.jsonl.gz and of wiki/*.txt."""
    words = re.split(r"[:/]+", re.sub(r"\?.*=.*", "", source))
    plain = [word for word in words if word and not re.search(r"[*?\[]", word)]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", plain[-1].split(".")[0] if plain else "").strip("-_")
    return name or "text"


@dataclass
class DataConfig:
    """What the model reads."""

    #: `embedded:<domain>` (text that comes with Python), or text, JSONL and Parquet files by path, folder, glob or URI.
    source: str = "embedded:english"
    #: Column of JSONL and Parquet files that holds the text.
    column: str = "text"
    #: Several sources by weight, in the place of `source`.
    mix: list[MixConfig] | None = None
    #: Tokens of one training sequence.
    sequence_length: int = 256
    #: `bytes`, or the path of a `tokenizer.json`.
    tokenizer: str = "bytes"
    #: Token that separates documents; None: the tokenizer's end-of-text token.
    separator: str | None = None
    #: Share of the documents held out from training, in per cent.
    heldout_percent: float = 10.0

    def __post_init__(self) -> None:
        _need("data", self, "at least 1", _whole, "sequence_length")
        _need("data", self, "a value above 0 and below 100", lambda value: 0 < value < 100, "heldout_percent")
        if self.mix is not None:
            self._check_mix(self.mix)

    def _check_mix(self, mix: list[MixConfig]) -> None:
        if not mix:
            raise ValueError(
                "data.mix: got an empty list, needs at least one source, for example [{source: embedded:english}]; "
                "or leave it out and set data.source"
            )
        for place, part in enumerate(mix):
            part.check(f"data.mix.{place}")
        _need_different("data.mix", "source", [part.name for part in mix])


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
        _need(where, self, "at least 1", _whole, "width", "period")
        _need(where, self, "a finite value above 0", _positive, "learning_rate")
        if self.name is not None:
            _need_name(f"{where}.name", self.name)
        given = [name for name in ("width", "layers", "parameters") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"{where}: got {' and '.join(given) or 'none'} of width, layers and parameters, needs one of them: "
                "`width: 192` for a level of the Continuum Memory System, `layers: [0, 1]` for whole layers' MLPs, or "
                '`parameters: ["blocks.*"]` for a level of other parameters'
            )


@dataclass
class TrainingConfig:
    """The training loop: how long, on what, with which optimizer settings."""

    #: Optimizer steps.
    steps: int = 1000
    #: Tokens of one optimizer step, over all workers.
    batch_tokens: int = 4096
    #: Sequences that a worker runs at once, the rest by gradient accumulation; None: all of its share.
    micro_batch: int | None = None
    #: Ray Train workers.
    workers: int = 1
    #: Where workers run; auto: a GPU for each worker if there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: DeepSpeed ZeRO stage, 0 to 3: what is sharded over the workers.
    zero_stage: int = 0
    #: Optimizer of the parameters outside every level; `optimizers` holds the settings.
    optimizer: Optimizer = "adamw"
    #: Peak learning rate.
    learning_rate: float = 3e-3
    #: Peak learning rate of the embedding, the head and the vectors where m3 or muon moves the matrices: they move by
    #: AdamW. None: the level's own.
    adamw_learning_rate: float | None = None
    #: Decoupled weight decay.
    weight_decay: float = 0.1
    #: AdamW's averaging factors of the gradient and of its square.
    betas: tuple[float, float] = (0.9, 0.98)
    #: Largest norm of the gradient; 0: no clipping.
    clip: float = 1.0
    #: Learning rate after the warm-up: cosine, linear, or wsd (constant, then a linear decay of `decay_steps`).
    schedule: Literal["cosine", "wsd", "linear"] = "cosine"
    #: Steps of the linear warm-up.
    warmup_steps: int = 20
    #: Steps of the decay of wsd; None: a fifth of `steps`.
    decay_steps: int | None = None
    #: Learning rate at the end, as a fraction of the peak.
    final_learning_rate: float = 0.1
    #: Arithmetic of the forward and backward passes; states, gates and master weights stay in float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    #: Recompute a block's activations in the backward pass to save memory.
    activation_checkpointing: bool = False
    #: Steps from one logged record to the next.
    log_every: int = 1
    #: Steps from one held-out evaluation to the next; 0: only at the end.
    evaluate_every: int = 200
    #: Steps from one checkpoint to the next; 0: only at the end, and when the run is interrupted.
    checkpoint_every: int = 200
    #: Failures of workers after which training goes on from the last checkpoint before it gives up.
    max_failures: int = 3
    #: A loss or gradient norm so many standard deviations above those of the last 128 steps is a spike: like one that
    #: is not finite, it is not trained on. 0: no step is skipped as a spike. (A gradient norm also has to be ten times
    #: the usual one; what is less is left to `clip`.)
    spike_sigmas: float = 6.0
    #: Steps skipped in a row after which `on_divergence` is done.
    max_skipped: int = 5
    #: rollback: go on from the last checkpoint, past the batches since; stop: end the run with a report.
    on_divergence: Literal["rollback", "stop"] = "rollback"

    def __post_init__(self) -> None:
        sizes = ("steps", "batch_tokens", "micro_batch", "workers", "log_every", "max_skipped")
        _need("training", self, "at least 1", _whole, *sizes)
        _need("training", self, "at least 1 (or null)", _whole, "decay_steps")
        counts = ("warmup_steps", "evaluate_every", "checkpoint_every", "max_failures")
        _need("training", self, "at least 0", lambda value: value >= 0, *counts)
        _need("training", self, "0, 1, 2 or 3", lambda value: 0 <= value <= 3, "zero_stage")
        _need("training", self, "a finite value above 0", _positive, "learning_rate", "adamw_learning_rate")
        _need("training", self, "a finite value of at least 0", _not_negative, "weight_decay", "clip", "spike_sigmas")
        _need("training", self, "a fraction from 0 to 1", _fraction, "final_learning_rate")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas: got {list(self.betas)}, needs two values from 0 to below 1")


@dataclass
class CheckpointConfig:
    """Where checkpoints are written and which of them are kept."""

    #: Folder, or URI of a file system that pyarrow knows (`s3://bucket/prefix`): a folder for each run is made in it.
    #: None: `checkpoints` in the run's folder.
    dir: str | None = None
    #: Newest checkpoints that are kept.
    keep: int = 2
    #: Checkpoints with the lowest held-out loss that are kept beside them; only steps with an evaluation take part.
    keep_best: int = 1

    def __post_init__(self) -> None:
        _need("checkpoint", self, "at least 1", _whole, "keep")
        _need("checkpoint", self, "at least 0", lambda value: value >= 0, "keep_best")
        if self.dir is not None and not self.dir.strip():
            raise ValueError("checkpoint.dir: got an empty text, needs a folder or a URI such as s3://bucket/runs")


@dataclass
class EvaluationConfig:
    """How much held-out text an evaluation reads."""

    #: Tokens of an evaluation during training.
    tokens: int = 16384
    #: Most tokens of the evaluation at the end.
    final_tokens: int = 262144

    def __post_init__(self) -> None:
        _need("evaluation", self, "at least 1", _whole, "tokens", "final_tokens")


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

    def _check_levels(self) -> None:
        for place, level in enumerate(self.levels):
            level.check(f"levels.{place}")
            level.name = level.name or f"level{place + 1}"
        _need_different("levels", "level", [level.name for level in self.levels])
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
        model = self.model if isinstance(self.model, LevelsConfig) else None
        levels = [level for level in self.levels if model and (level.width is not None or level.layers)]
        self.continuum.check(len(levels), model is not None and model.level_variant == "nested")
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

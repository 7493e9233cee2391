"""The `training`, `checkpoint` and `evaluation` sections of a job: the loop, what is kept of it, how it is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nestling.config.checks import fraction, need, not_negative, positive, whole
from nestling.config.optimizers import Optimizer


@dataclass
class TrainingConfig:
    """The training loop: how long, on what, with which optimizer settings."""

    #: Optimizer steps; null: as many as a stream gives, with training.schedule=constant.
    steps: int | None = 1000
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
    #: Learning rate after the warm-up: cosine, linear, constant, or wsd (constant, then a linear decay of
    #: `decay_steps`).
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
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
        sizes = ("batch_tokens", "micro_batch", "workers", "log_every", "max_skipped")
        need("training", self, "at least 1", whole, *sizes)
        need("training", self, "at least 1 (or null)", whole, "steps", "decay_steps")
        counts = ("warmup_steps", "evaluate_every", "checkpoint_every", "max_failures")
        need("training", self, "at least 0", lambda value: value >= 0, *counts)
        need("training", self, "0, 1, 2 or 3", lambda value: 0 <= value <= 3, "zero_stage")
        need("training", self, "a finite value above 0", positive, "learning_rate", "adamw_learning_rate")
        need("training", self, "a finite value of at least 0", not_negative, "weight_decay", "clip", "spike_sigmas")
        need("training", self, "a fraction from 0 to 1", fraction, "final_learning_rate")
        if self.steps is None and self.schedule != "constant":
            raise ValueError(
                f"training.steps: got null, but training.schedule={self.schedule} needs to know the last step; give "
                "training.schedule=constant, or a number of steps"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas: got {list(self.betas)}, needs two values from 0 to below 1")

    @property
    def last_step(self) -> float:
        """`steps`, or infinity."""
        return math.inf if self.steps is None else self.steps


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
        need("checkpoint", self, "at least 1", whole, "keep")
        need("checkpoint", self, "at least 0", lambda value: value >= 0, "keep_best")
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
        need("evaluation", self, "at least 1", whole, "tokens", "final_tokens")

"""DeepSpeed around a model and its levels: any ZeRO stage, CPU or GPU, gradient accumulation, clipping, bfloat16.

The few places where DeepSpeed has to be handled with care are here and nowhere else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nestling.config import JobConfig
from nestling.optim import Levels, watch_inputs
from nestling.training.matrices import ShardedMatrices, Stretch
from nestling.training.shares import shares


def engine_settings(config: JobConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a job."""
    training = config.training
    share = training.batch_tokens // (config.data.sequence_length * world_size)
    micro = training.micro_batch or share
    half = training.precision == "bfloat16"
    # DeepSpeed keeps float32 master weights for bfloat16 from stage 1 on, so that is the least that bfloat16 gets.
    stage = max(training.zero_stage, 1) if half else training.zero_stage
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": training.clip if stage else 0.0,
        "bf16": {"enabled": half},
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        # Levels is not on DeepSpeed's list of optimizers that it has tested with ZeRO; our tests do that.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def make_engine(model: nn.Module, groups: list[dict[str, Any]], config: JobConfig, world_size: int) -> Any:
    """Wrap the model; `engine.optimizer` holds the sharded `Levels`."""
    deepspeed = _import_deepspeed(config.training.device == "cuda")
    settings = engine_settings(config, world_size)
    if any(group["optimizer"] == "delta_gradient_descent" for group in groups):
        watch_inputs(model, accumulation=settings["gradient_accumulation_steps"])
    optimizer = Levels(groups, lr=config.training.learning_rate)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    see_whole_matrices(engine, config.optimizers.bucket)
    return engine


def see_whole_matrices(engine: Any, bucket: int) -> None:
    """Let the `Levels` of any DeepSpeed engine, M3 and Muon among them, see whole matrices in ZeRO's flat partitions.

    Args:
        engine: what `deepspeed.initialize` has made; all ranks must call this.
        bucket: see `ShardedMatrices`.
    """
    if not engine.zero_optimization():
        return
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    held: dict[torch.Tensor, list[Stretch]] = {}
    for share in shares(engine):
        stretch = Stretch(shapes[share.name], share.start, share.length, share.offset)
        held.setdefault(share.master, []).append(stretch)
    levels_of(engine).whole = ShardedMatrices(held, bucket)


def levels_of(engine: Any) -> Levels:
    """The `Levels` inside ZeRO's wrapper, if there is one."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, Levels):
        optimizer = optimizer.optimizer
    return optimizer


def set_rate(engine: Any, factor: float) -> None:
    """Set every group's learning rate to `factor` of its peak."""
    for group in engine.optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def optimizer_step(engine: Any, clip: float, refuse: Callable[[float], bool]) -> float | None:
    """Take the optimizer step if a batch is complete; returns the gradient's norm before clipping, None before that.

    `refuse` is asked once a batch with that norm, which is equal on all ranks. If it says yes, nothing moves.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    levels = levels_of(engine)
    if not engine.zero_optimization():
        # Without ZeRO, DeepSpeed clips but does not say by how much.
        norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), clip or math.inf))
        levels.paused = refuse(norm)
        engine.step()
        return norm
    norm = math.inf  # ZeRO drops a gradient that is not finite without asking the optimizer

    def ask(*_: Any) -> None:
        nonlocal norm
        if norm == math.inf:  # ZeRO steps group by group
            norm = float(engine.optimizer._global_grad_norm)
            levels.paused = refuse(norm)

    hook = levels.register_step_pre_hook(ask)
    engine.step()
    hook.remove()
    if norm == math.inf:
        refuse(norm)
    return norm


def full_weights(engine: Any, keep: bool) -> dict[str, torch.Tensor]:
    """Float32 weights by name on the CPU where `keep`, gathered one parameter at a time; all ranks must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if engine.zero_optimization() else parameter
        if keep:
            weights[name] = full.detach().float().cpu().clone()
    return weights


def _import_deepspeed(gpu: bool) -> Any:
    """Import DeepSpeed for this device. It builds a C++ extension for CPU collectives at first use, which takes half a
    minute and a compiler; gloo does the same work without it."""
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if not gpu:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed

"""Learning rate as a function of the step alone, so that a schedule needs no state to resume; on a stream also of the
steps since the last alarm of drift, which the snapshot knows."""

from __future__ import annotations

import math

from nestling.config import TrainingConfig
from nestling.config.stream import StreamConfig


def rate_factor(step: int, training: TrainingConfig) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 1): linear warm-up, then the schedule."""
    if step <= training.warmup_steps:
        return step / training.warmup_steps
    if training.steps is None or training.schedule == "constant":
        return 1.0
    low, start, end = training.final_learning_rate, training.warmup_steps, training.steps
    if training.schedule == "wsd":
        start = max(start, end - (training.decay_steps or -(-end // 5)))
    if step <= start + 1:
        return 1.0
    # Of the decay, before this step: no step up to the end has a rate of zero. Beyond it, the rate stays.
    progress = min((step - 1 - start) / max(end - start, 1), 1.0)
    if training.schedule == "cosine":
        return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2
    return low + (1 - low) * (1 - progress)


def rewarming(since: float, stream: StreamConfig) -> float:
    """Factor on the learning rate in the step `since` so many (from 1) after an alarm: re-warming and re-decay.

    A linear rise to `stream.rewarm_factor`, then a cosine back to 1 (Ibrahim et al. 2024, arXiv:2403.08763).
    """
    if since <= stream.rewarm_steps:
        share = since / stream.rewarm_steps
    else:
        progress = min((since - stream.rewarm_steps) / stream.redecay_steps, 1.0)
        share = (1 + math.cos(math.pi * progress)) / 2
    return 1 + (stream.rewarm_factor - 1) * share

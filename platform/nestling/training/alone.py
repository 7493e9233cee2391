"""A group of workers that is one process: what DeepSpeed and torch want to see where there are no others."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def form_group() -> None:
    """Make this process rank 0 of 1, if it is not in a group yet. It should stay so: DeepSpeed remembers the group."""
    if dist.is_initialized():
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

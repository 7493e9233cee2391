"""How the kernels are launched: tiles, warps and precision by shape and dtype."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: Whether Triton interprets its kernels, on any device, in the place of compiling them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def padded(width: int) -> int:
    """The power of two that a tile of this width takes, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def warps(wide: int) -> int:
    """Warps of a program whose tiles are `wide`."""
    return 4 if wide <= 64 else 8


def tile(m: int, n: int, dtype: torch.dtype, backward: bool = False) -> dict[str, Any]:
    """Rows of the weights (m, n) in one program, its warps, and stages of loads that fit its shared memory."""
    wide, short = padded(n), dtype != torch.float32 and not backward
    rows = 64 if wide <= 64 or (short and wide <= 128) else 32
    return {"TILE": min(padded(m), rows), "num_warps": 8, "num_stages": 2 if short else 1}


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """Of products of float32 operands; those of half precision are exact and accumulate in float32."""
    upcast = INTERPRETED and dtype != torch.float32
    return {"PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", "UPCAST": upcast}


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's own GPU, whichever is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

"""Which backend runs a memory operation.

`reference` and `chunked` run everywhere. `triton` runs on CUDA, or on any device where Triton interprets its kernels
(TRITON_INTERPRET=1); `auto` takes it on CUDA where the call's shape allows it and `chunked` otherwise.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from nestling.memory.checks import check_choice

BACKENDS = ("auto", "reference", "chunked", "triton")
#: Widths of keys and values that the kernels hold in one tile.
WIDTHS = range(16, 257)

log = logging.getLogger(__name__)


def chosen(backend: str, tensor: Tensor, obstacle: str | None) -> str:
    """The backend of a call whose inputs are like `tensor`.

    Args:
        backend: what the caller asked for.
        obstacle: why the kernels cannot run this call, whatever the device; None if they can.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    if backend in ("reference", "chunked") or (backend == "auto" and not tensor.is_cuda):
        return "chunked" if backend == "auto" else backend
    obstacle = _no_kernels(tensor) or obstacle
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend: got 'triton', but {obstacle}; 'auto' and 'chunked' run everywhere")
    _say_once(obstacle)
    return "chunked"


def widths_obstacle(**widths: int) -> str | None:
    """Why the kernels cannot take these widths."""
    for name, width in widths.items():
        if width not in WIDTHS:
            return f"{name}={width} is none of the widths {WIDTHS.start} to {WIDTHS.stop - 1} that the kernels take"
    return None


def _no_kernels(tensor: Tensor) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    from nestling.memory.fused.launch import INTERPRETED

    if not tensor.is_cuda and not INTERPRETED:
        return f"the tensors are on {tensor.device.type}, and the kernels need CUDA"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    return None


@cache
def _say_once(obstacle: str) -> None:
    log.warning("memory operations run by backend 'chunked' instead of the fused kernels, because %s", obstacle)

"""Checks of the arguments of the public memory operations: each failure names the argument, what it got and needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, gates and decay for inputs of `dtype`: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(map(repr, choices))}")


def check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, needs an integer of at least 1")


def check_shape(name: str, tensor: Any, expected: tuple[int, ...], meaning: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: got {type(tensor).__name__}, needs a tensor of shape {meaning}")
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, needs {meaning} = {expected}")


def check_same(name: str, tensor: Tensor, like: Tensor, like_name: str, *, dtypes: tuple[torch.dtype, ...]) -> None:
    """Device as `like`, dtype one of `dtypes`."""
    if tensor.device != like.device:
        raise ValueError(f"{name}: got device {tensor.device}, needs {like.device}, the device of {like_name}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise ValueError(f"{name}: got dtype {tensor.dtype}, needs {wanted} (as {like_name} is {like.dtype})")


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, needs one of {', '.join(map(str, DTYPES))}")


def check_no_nan(name: str, tensor: Tensor) -> None:
    if not torch.compiler.is_compiling() and bool(torch.isnan(tensor).any()):
        raise ValueError(f"{name}: got NaN, needs numbers; look at what produced it")

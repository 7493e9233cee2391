"""What a training engine holds, in a form that does not depend on how it is sharded.

Saved as stretches of named tensors (see `shares.py`), any ZeRO stage and any number of workers can take up what any
other has left.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.checkpoint import BUCKET, WEIGHT, Piece, Pieces
from nestling.training.engine import levels_of
from nestling.training.shares import Share, masters, shares


def engine_pieces(engine: Any) -> list[Piece]:
    """This rank's stretches of all weights and optimizer state, as they lie in memory: nothing is copied.

    The ranks' pieces together are every tensor exactly once. Names are `weight/<parameter>` and `<state>/<parameter>`.
    """
    state = levels_of(engine).state
    rank, world = engine.global_rank, engine.world_size
    pieces = []
    for share in shares(engine):
        mine = share if engine.zero_optimization() else _slice(share, rank, world)
        if not mine.length:
            continue
        tensors = {"weight": mine.master} | _tensors(state.get(mine.master, {}), mine.master)
        pieces += [Piece(f"{kind}/{mine.name}", mine.start, mine.of(tensor)) for kind, tensor in tensors.items()]
    return pieces


def optimizer_scalars(engine: Any) -> dict[str, dict[str, Any]]:
    """Counters and flags of the optimizer state by parameter; they are equal on all ranks."""
    state = levels_of(engine).state
    return {
        name: {key: value for key, value in state[master].items() if not torch.is_tensor(value)}
        for name, master in masters(engine).items()
        if master in state
    }


@torch.no_grad()
def load_engine(engine: Any, pieces: Pieces, scalars: Mapping[str, Mapping[str, Any]]) -> None:
    """Put saved weights and optimizer state into a live engine; all ranks must call it.

    Raises:
        CheckpointError: a stretch that this rank needs is not there.
    """
    levels = levels_of(engine)
    levels.state.clear()
    for name, master in masters(engine).items():
        # Parameters of one flat partition have moved together, but one that had no gradient may have counted less.
        for key, value in scalars.get(name, {}).items():
            entry = levels.state[master]
            entry[key] = max(entry.get(key, value), value)
    kinds = sorted({name.partition("/")[0] for name in pieces.sizes} - {"weight"})
    for share in shares(engine):
        if not share.length:
            continue
        _read(pieces, WEIGHT + share.name, share.start, share.of(share.master))
        for kind in kinds:
            if f"{kind}/{share.name}" in pieces.sizes:
                entry = levels.state[share.master]
                if kind not in entry:
                    entry[kind] = torch.zeros_like(share.master)
                _read(pieces, f"{kind}/{share.name}", share.start, share.of(entry[kind]))
    _refresh_weights(engine)


def _read(pieces: Pieces, name: str, start: int, target: Tensor) -> None:
    """Fill `target` from element `start` on, a bucket at a time."""
    for part in target.split(BUCKET // target.element_size()):
        part.copy_(pieces.read(name, start, len(part)))
        start += len(part)


def _slice(share: Share, rank: int, world: int) -> Share:
    """A rank's part of a share that all ranks have."""
    start, end = share.length * rank // world, share.length * (rank + 1) // world
    return Share(share.name, start, end - start, start, share.master)


def _tensors(state: Mapping[str, Any], master: Tensor) -> dict[str, Tensor]:
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    for key, value in tensors.items():
        if value.shape != master.shape:
            raise ValueError(f"optimizer state {key!r} has the shape {tuple(value.shape)}, needs that of its parameter")
    return tensors


def _refresh_weights(engine: Any) -> None:
    """Make the weights that the model computes with follow the float32 masters."""
    if not engine.zero_optimization():
        return
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for number in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def random_state() -> dict[str, Any]:
    """The state of every random number generator of this process, as JSON can hold it."""
    numpy_state: Any = np.random.get_state(legacy=False)
    state = {
        "python": random.getstate(),
        "numpy": numpy_state | {"state": numpy_state["state"] | {"key": numpy_state["state"]["key"].tolist()}},
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(dict(state["numpy"]) | {"state": dict(state["numpy"]["state"]) | {"key": key}})
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

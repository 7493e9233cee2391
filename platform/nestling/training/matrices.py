"""Whole matrices for optimizer rules under ZeRO, which leaves each rank with flat shards that cut matrices anywhere.

Each matrix has one rank that works on it: the pieces of a momentum are sent there, the function is applied, and the
result's pieces are sent back. Momenta stay sharded, the work is divided over the ranks, and what a rank gathers at once
is bounded by a bucket. Who works on what is planned once, from a table that all ranks share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nestling.optim.matrices import MatrixFunction


@dataclass(frozen=True)
class Stretch:
    """Elements [start, start + length) of a flattened parameter of `shape`, kept from `offset` on in a flat shard."""

    shape: tuple[int, ...]
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class _Matrix:
    """A matrix, the rank that works on it, and each rank's piece of it: where it begins in the matrix and the shard."""

    rows: int
    columns: int
    pieces: tuple[Stretch, ...]
    worker: int = 0

    @property
    def size(self) -> int:
        return self.rows * self.columns


#: For each rank the matrices that it works on at once.
_Round = list[list[_Matrix]]
#: For each rank a list of pieces, sent to it or received from it.
_Pieces = list[list[Tensor]]


class ShardedMatrices:
    """A `nestling.optim.matrices.Whole` over flat shards. All ranks must make it, and call it, together.

    Args:
        held: for each flat shard, in the same order on all ranks, this rank's stretch of each parameter in it, those
            of length 0 included.
        bucket: elements of matrices that a rank gathers at once, over all tensors of a call; a larger matrix is
            gathered by itself. What a function makes of them comes on top.

    Attributes:
        gathered: most elements that this rank has gathered at once so far.
    """

    def __init__(self, held: Mapping[Tensor, Sequence[Stretch]], bucket: int) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.bucket, self.gathered = bucket, 0
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, [list(stretches) for stretches in held.values()])
        self._shapes = {flat: [stretch.shape for stretch in stretches] for flat, stretches in held.items()}
        self._matrices = {flat: _plan([rank[i] for rank in everyone]) for i, flat in enumerate(held)}
        self._rounds: dict[tuple[Tensor, int], list[_Round]] = {}

    def is_matrix(self, parameter: Tensor) -> bool:
        kinds = {len(shape) >= 2 for shape in self._shapes[parameter]}
        if len(kinds) > 1:
            raise ValueError(
                f"parameter group: got the shapes {self._shapes[parameter]}, needs matrices only or vectors only under "
                "ZeRO, where a group is one tensor; split it as nestling.optim.matrix_groups does"
            )
        return True in kinds

    def __call__(self, parameter: Tensor, function: MatrixFunction, *tensors: Tensor) -> Tensor:
        key, result = (parameter, len(tensors)), torch.zeros_like(parameter)
        if key not in self._rounds:
            self._rounds[key] = self._pack(self._matrices[parameter], len(tensors))
        for matrices in self._rounds[key]:
            whole = self._collect(matrices, tensors)
            self._give_back(matrices, _apply(function, whole), result)
        return result

    def _pack(self, matrices: Sequence[_Matrix], count: int) -> list[_Round]:
        """Rounds in which no rank gathers more than a bucket of matrices of `count` tensors."""
        batches: list[_Round] = [[] for _ in range(self.world)]
        for matrix in matrices:
            mine = batches[matrix.worker]
            if not mine or count * (sum(other.size for other in mine[-1]) + matrix.size) > self.bucket:
                mine.append([])
            mine[-1].append(matrix)
        rounds = range(max(map(len, batches)))
        return [[mine[i] if i < len(mine) else [] for mine in batches] for i in rounds]

    def _collect(self, matrices: _Round, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """This rank's matrices of a round, one of each tensor."""
        mine = matrices[self.rank]
        self.gathered = max(self.gathered, len(tensors) * sum(matrix.size for matrix in mine))
        sent = [[_cut(tensor, m.pieces[self.rank]) for m in theirs for tensor in tensors] for theirs in matrices]
        sizes = [[m.pieces[rank].length for m in mine for _ in tensors] for rank in range(self.world)]
        pieces = self._exchange(matrices, sent, sizes, tensors[0])
        whole = []
        for number, matrix in enumerate(mine):
            held = sorted((matrix.pieces[rank].start, rank) for rank in range(self.world) if matrix.pieces[rank].length)
            first = number * len(tensors)
            whole.append(
                tuple(
                    torch.cat([pieces[rank][first + place] for _, rank in held]).view(matrix.rows, matrix.columns)
                    for place in range(len(tensors))
                )
            )
        return whole

    def _give_back(self, matrices: _Round, made: Sequence[Tensor], result: Tensor) -> None:
        """Put the pieces of what has been made of the matrices into the shards that they belong to."""
        mine = list(zip(matrices[self.rank], made, strict=True))
        sent = [
            [tensor.reshape(-1).narrow(0, m.pieces[rank].start, m.pieces[rank].length) for m, tensor in mine]
            for rank in range(self.world)
        ]
        sizes = [[m.pieces[self.rank].length for m in theirs] for theirs in matrices]
        for theirs, pieces in zip(matrices, self._exchange(matrices, sent, sizes, result), strict=True):
            for matrix, piece in zip(theirs, pieces, strict=True):
                _cut(result, matrix.pieces[self.rank]).copy_(piece)

    def _exchange(self, matrices: _Round, sent: _Pieces, sizes: list[list[int]], like: Tensor) -> _Pieces:
        """Send every rank its pieces; returns those received from each, of the given sizes."""
        if all(m.pieces[m.worker].length == m.size for theirs in matrices for m in theirs):
            nothing = like.new_empty(0)
            return [pieces if rank == self.rank else [nothing] * len(sizes[rank]) for rank, pieces in enumerate(sent)]
        received = like.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(
            received,
            torch.cat([tensor for pieces in sent for tensor in pieces] or [like.new_empty(0)]),
            [sum(lengths) for lengths in sizes],
            [sum(tensor.numel() for tensor in pieces) for pieces in sent],
        )
        pieces = iter(received.split([length for lengths in sizes for length in lengths]))
        return [[next(pieces) for _ in lengths] for lengths in sizes]


def _plan(stretches: Sequence[Sequence[Stretch]]) -> list[_Matrix]:
    """The matrices of a flat shard, from each rank's stretches of its parameters; dimensions before the last two count
    single matrices. A matrix goes to a rank that holds much of it, and among those to the one with the least work."""
    matrices = []
    for held in zip(*stretches, strict=True):
        shape = held[0].shape
        rows, columns = shape[-2:] if len(shape) >= 2 else (1, math.prod(shape))
        size = rows * columns
        matrices += [
            _Matrix(rows, columns, tuple(_within(each, begin, size) for each in held))
            for begin in range(0, math.prod(shape), size)
        ]
    work = [0] * len(stretches)
    planned = []
    for matrix in sorted(matrices, key=lambda m: -m.size * min(m.rows, m.columns)):
        lengths = [piece.length for piece in matrix.pieces]
        able = [rank for rank, length in enumerate(lengths) if 2 * length >= max(lengths)]
        worker = min(able, key=lambda rank: (work[rank], -lengths[rank]))
        work[worker] += matrix.size * min(matrix.rows, matrix.columns)
        planned.append(replace(matrix, worker=worker))
    return planned


def _within(stretch: Stretch, begin: int, size: int) -> Stretch:
    """The part of a stretch that lies in the matrix of elements [begin, begin + size), counted from `begin`."""
    start = min(max(stretch.start, begin), begin + size)
    length = max(min(stretch.start + stretch.length, begin + size) - start, 0)
    return Stretch(stretch.shape, start - begin, length, stretch.offset + start - stretch.start if length else 0)


def _cut(tensor: Tensor, piece: Stretch) -> Tensor:
    return tensor.view(-1).narrow(0, piece.offset, piece.length)


def _apply(function: MatrixFunction, whole: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The function of each matrix; those of the same shape go together."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, tensors in enumerate(whole):
        places.setdefault(tuple(tensors[0].shape), []).append(place)
    made: dict[int, Tensor] = {}
    for same in places.values():
        stacked = function(*(torch.stack(tensors) for tensors in zip(*(whole[place] for place in same), strict=True)))
        made |= zip(same, stacked.unbind(), strict=True)
    return [made[place] for place in range(len(whole))]

"""Named flat tensors in pieces: how a checkpoint is cut so that any world size reads what any other wrote.

A tensor is flattened and each rank writes the stretches of it that lie in its own memory, all in one safetensors file,
each under the key `name@start`. Nobody gathers a whole tensor: bytes go to the file straight from where they lie, or
through one bucket where memory is strided or on a device. Reading finds the pieces that a stretch touches and copies
those parts alone. The price of writing before the bytes are complete: no compression and no order but the dtype's.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nestling.checkpoint.errors import CheckpointError

#: Name of a parameter's float32 weights among the tensors of a checkpoint.
WEIGHT = "weight/"

BUCKET = 64 * 2**20
"""Bytes of memory that writing may take beside the tensors themselves."""

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(data)) of the flattened tensor `name`.

    Attributes:
        name: the tensor's name, the same on every rank.
        start: place of the first element in the flattened tensor.
        data: (elements,); on any device, strided or not.
    """

    name: str
    start: int
    data: Tensor

    @property
    def key(self) -> str:
        """The name of the piece in its file."""
        return f"{self.name}@{self.start}"


def write_pieces(path: Path, pieces: Sequence[Piece], bucket_bytes: int = BUCKET) -> None:
    """Write a safetensors file of the pieces, with at most `bucket_bytes` of memory on top of theirs.

    Raises:
        ValueError: a piece is not flat, has a dtype that safetensors does not know, or is there twice.
        OSError: the file cannot be written.
    """
    # Wide elements first, as the library's own writer has it: each piece begins at a multiple of its element size.
    ordered = sorted(pieces, key=lambda piece: (-piece.data.element_size(), piece.key))
    entries: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for piece in ordered:
        if piece.data.dim() != 1:
            raise ValueError(f"{piece.name}: a piece is a flat tensor, this one is {tuple(piece.data.shape)}")
        if piece.key in entries:
            raise ValueError(f"{piece.name}: two pieces start at element {piece.start}; a file holds each stretch once")
        entries[piece.key] = piece.data.dtype, piece.data.shape
    write_tensors(path, entries, (piece.data for piece in ordered), bucket_bytes)


def write_tensors(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, torch.Size]],
    tensors: Iterable[Tensor],
    bucket_bytes: int = BUCKET,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of tensors that are taken one after another, in the order of their `entries`.

    `notes` are texts for the file's header, the format's `__metadata__`.
    """
    header = _header(entries, notes)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            for part in _parts(tensor.detach().flatten(), bucket_bytes):
                file.write(part.view(torch.uint8).numpy().data)


def _header(entries: Mapping[str, tuple[torch.dtype, torch.Size]], notes: Mapping[str, str] | None) -> bytes:
    """The JSON in front of the data: dtype, shape and place of every tensor, padded to eight bytes."""
    described: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    position = 0
    for key, (dtype, shape) in entries.items():
        if dtype not in _CODES:
            raise ValueError(
                f"{key}: is {dtype}, which a file of tensors cannot hold, only {', '.join(_CODES.values())}"
            )
        end = position + shape.numel() * dtype.itemsize
        described[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(described, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _parts(data: Tensor, bucket_bytes: int) -> Iterator[Tensor]:
    """The tensor as contiguous tensors in the processor's memory: itself, or one bucket filled again and again."""
    if data.device.type == "cpu" and data.is_contiguous():
        yield data
        return
    length = min(len(data), max(bucket_bytes // data.element_size(), 1))
    bucket = torch.empty(length, dtype=data.dtype)
    for start in range(0, len(data), length):
        part = data[start : start + length]
        yield bucket[: len(part)].copy_(part)


@dataclass(frozen=True)
class _Stored:
    """A piece in a file."""

    start: int
    end: int
    file: Any
    key: str


class Pieces:
    """Reads stretches of named tensors out of the shard files of one checkpoint.

    Args:
        paths: all shard files; their headers are read here, their data when it is asked for.

    Attributes:
        sizes: elements of each tensor: the end of its last piece.
        dtypes: the dtype of each tensor.

    Raises:
        CheckpointError: a file is no shard, or two of them differ in a tensor's dtype.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._stored: dict[str, list[_Stored]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in paths:
            for name, stored, dtype in _open_shard(path):
                if self.dtypes.setdefault(name, dtype) != dtype:
                    raise CheckpointError(f"{path}: {name} is {dtype} here and {self.dtypes[name]} in another shard")
                self._stored.setdefault(name, []).append(stored)
        for pieces in self._stored.values():
            pieces.sort(key=lambda stored: (stored.start, stored.end))
        self.sizes = {name: max(stored.end for stored in pieces) for name, pieces in self._stored.items()}

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements [start, start + length) of a flattened tensor; None reads to its end.

        Returns:
            (length,) in the processor's memory, the reader's own to change.

        Raises:
            CheckpointError: the checkpoint does not hold the whole stretch, or a file fails while it is read.
        """
        if name not in self._stored:
            raise CheckpointError(f"the checkpoint holds no tensor {name!r}")
        end = self.sizes[name] if length is None else start + length
        if not 0 <= start <= end <= self.sizes[name]:
            raise CheckpointError(f"{name}: elements {start} to {end} were asked for; it has {self.sizes[name]}")
        result = torch.empty(end - start, dtype=self.dtypes[name])
        pieces = self._stored[name]
        position = start
        # Without overlaps at most one piece before this one reaches into the stretch: the one that starts left of it.
        first = max(bisect_right(pieces, start, key=lambda stored: stored.start) - 1, 0)
        for stored in pieces[first:]:
            if position == end or stored.start > position:
                break
            stop = min(stored.end, end)
            if stop > position:
                part = stored.file.get_slice(stored.key)[position - stored.start : stop - stored.start]
                result[position - start : stop - start] = part
                position = stop
        if position < end:
            raise CheckpointError(f"{name}: no shard of the checkpoint holds its element {position}")
        return result


def _open_shard(path: Path) -> Iterator[tuple[str, _Stored, torch.dtype]]:
    """The pieces of one file."""
    try:
        file = safe_open(path, framework="pt")
        for key in file.keys():
            name, mark, start = key.rpartition("@")
            entry = file.get_slice(key)
            (length,) = entry.get_shape()
            if not mark or not start.isdecimal():
                raise ValueError(f"{key!r} is not the key of a piece")
            yield name, _Stored(int(start), int(start) + length, file, key), _DTYPES[entry.get_dtype()]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a readable shard of a checkpoint: {error}") from error

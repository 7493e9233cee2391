"""Tensors cut into pieces: any cut gives back any stretch, in files that safetensors itself reads."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from nestling.checkpoint import CheckpointError, Piece, Pieces, write_pieces


def write_cut(folder: Path, name: str, tensor: Tensor, cuts: list[int]) -> list[Path]:
    """Write a tensor to one file a piece, cut at these elements."""
    paths = []
    edges = [0, *sorted(cuts), len(tensor)]
    for index, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        paths.append(folder / f"{index}.safetensors")
        write_pieces(paths[-1], [Piece(name, start, tensor[start:end])])
    return paths


DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_every_dtype_lies_as_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(24).reshape(2, 12).to(dtype)
    pieces = [
        Piece("whole", 0, values[0]),
        Piece("strided", 5, values.view(-1)[::5]),
        Piece("odd", 0, torch.ones(3, dtype=torch.uint8)),
        Piece("nothing", 0, values[0, :0]),
    ]
    write_pieces(tmp_path / "x", pieces, bucket_bytes=7)
    data = (tmp_path / "x").read_bytes()
    for entry in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).values():
        start, end = entry["data_offsets"]
        assert not entry["shape"][0] or start % ((end - start) // entry["shape"][0]) == 0  # aligned
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == {"whole@0", "strided@5", "odd@0", "nothing@0"}
    reader = Pieces([tmp_path / "x"])
    for piece in pieces:
        for read in (loaded[piece.key], reader.read(piece.name, piece.start, len(piece.data))):
            assert read.dtype == piece.data.dtype
            assert torch.equal(read.view(torch.uint8), piece.data.contiguous().view(torch.uint8))
    assert reader.sizes == {"whole": 12, "strided": 10, "odd": 3, "nothing": 0} and reader.dtypes["strided"] == dtype


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=5), edges=st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted)
)
def test_any_stretch_of_any_cut_is_read(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], edges: list[int]
) -> None:
    tensor = torch.randn(40).bfloat16()
    reader = Pieces(write_cut(tmp_path_factory.mktemp("cut"), "weight", tensor, cuts))
    start, end = edges
    assert torch.equal(reader.read("weight", start, end - start), tensor[start:end])
    assert torch.equal(reader.read("weight", start), tensor[start:])


def test_what_is_read_can_be_changed(tmp_path: Path) -> None:
    reader = Pieces(write_cut(tmp_path, "weight", torch.zeros(4), []))
    reader.read("weight").fill_(1)
    assert reader.read("weight").sum() == 0


@pytest.mark.parametrize(
    ("name", "start", "length", "reason"),
    [
        ("weight", 0, None, "no shard of the checkpoint holds its element 3"),
        ("weight", 4, 2, "no shard of the checkpoint holds its element 4"),
        ("weight", 8, 5, "elements 8 to 13 were asked for; it has 10"),
        ("weight", -1, 2, "elements -1 to 1 were asked for"),
        ("bias", 0, None, "holds no tensor 'bias'"),
    ],
)
def test_a_stretch_that_is_not_there_is_refused(
    tmp_path: Path, name: str, start: int, length: int | None, reason: str
) -> None:
    paths = write_cut(tmp_path, "weight", torch.randn(10), [3, 6])
    with pytest.raises(CheckpointError, match=reason):
        Pieces([paths[0], paths[2]]).read(name, start, length)


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        (Piece("a", 0, torch.zeros(2, 2)), r"a piece is a flat tensor, this one is \(2, 2\)"),
        (
            Piece("a", 0, torch.zeros(2, dtype=torch.complex64)),
            "is torch.complex64, which a file of tensors cannot hold",
        ),
        (Piece("b", 1, torch.zeros(2)), "b: two pieces start at element 1"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, piece: Piece, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        write_pieces(tmp_path / "x", [Piece("b", 1, torch.zeros(1)), piece])


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    shard, mark = tmp_path / "rank-00000.safetensors", tmp_path / "mark"
    for bomb in (pickle.dumps(Bomb(mark)), None):
        if bomb:
            shard.write_bytes(bomb)
        else:
            torch.save(Bomb(mark), shard)
        with pytest.raises(CheckpointError, match="rank-00000.safetensors is not a readable shard"):
            Pieces([shard])
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb works


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_pieces(tmp_path / "0", [Piece("a", 0, torch.zeros(2))])
    write_pieces(tmp_path / "1", [Piece("a", 2, torch.zeros(2).half())])
    with pytest.raises(CheckpointError, match="1: a is torch.float16 here and torch.float32 in another shard"):
        Pieces([tmp_path / "0", tmp_path / "1"])


PEAK = """
import re, sys
from pathlib import Path
import torch
from nestling.checkpoint import Piece, write_pieces

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

data = torch.ones(64 * 2**20, dtype=torch.uint8).view(torch.bfloat16)
data = {"contiguous": data, "strided": data[::2], "copied": data}[sys.argv[1]]
write_pieces(Path(sys.argv[2]), [Piece("warm-up", 0, data[:8])])
Path("/proc/self/clear_refs").write_text("5")
before = peak()
if sys.argv[1] == "copied":  # what a gathered or serialized copy costs: the measurement must see it
    data = data.clone()
write_pieces(Path(sys.argv[2]), [Piece("weight", 0, data)], bucket_bytes=4 * 2**20)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("memory", "low", "high"),
    [("contiguous", 0, 2), ("strided", 2, 6), ("copied", 60, 70)],
    ids=lambda value: str(value),
)
def test_writing_takes_one_bucket_of_memory(tmp_path: Path, memory: str, low: int, high: int) -> None:
    """Mebibytes on top of a tensor of 64 (strided: 32), with a bucket of 4."""
    run = subprocess.run([sys.executable, "-c", PEAK, memory, tmp_path / "x"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert low <= int(run.stdout) / 2**20 <= high

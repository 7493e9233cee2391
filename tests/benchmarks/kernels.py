"""How fast each backend of the memory operations is here: `python -m tests.benchmarks.kernels [--json FILE]`.

Every backend is first compared with the token loop in float64, and is timed only if it agrees. On a GPU the shapes are
those of models that people train, in bfloat16, and each call is timed with a cold L2 cache; on a CPU there is one
small shape in float32, on one thread. MFU is the share of the rate that a large matrix product reaches here; operations
are counted as chunks of 64 need them (forward 6 D^2 + 8 C D + C^2 a token and head, backward 14 D^2 + 22 C D + 2 C^2;
`self_modifying_scan` 18 D N a token, head and memory, and three times that backward), bytes as what must be moved at
least. `gated_delta` is flash-linear-attention's gated delta rule at the same shape, another rule of the same cost,
where that library is installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory import MEMORIES, MemoryState, delta_scan, self_modifying_scan
from nestling.memory.state import SCALAR_MEMORIES

C = 64
#: (batch, tokens, heads, width of a head) on a GPU, and on a CPU.
SHAPES = {
    "cuda": [(8, 4096, 16, 128), (8, 4096, 32, 64), (1, 32768, 16, 128), (1, 2048, 16, 128)],
    "cpu": [(1, 2048, 4, 64)],
}
#: Relative error (root mean square) up to which a backend counts as right.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Line:
    """One measurement: milliseconds (median, 20th and 80th percentile), rates a second, memory in MiB at the peak."""

    operation: str
    shape: str
    backend: str
    passes: str
    ms: float
    ms_20: float
    ms_80: float
    tokens: float
    mfu: float
    gbytes: float | None
    peak: float | None


class Operation(ABC):
    """What is timed: tensors of one shape, and a scalar function of them for each backend."""

    name = ""
    leaves: dict[str, Tensor]

    def __init__(self, shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        batch, tokens, heads, width = shape
        self._draw = torch.Generator(device).manual_seed(0)
        self.make(batch, heads, tokens, width)

    @abstractmethod
    def make(self, batch: int, heads: int, tokens: int, width: int) -> None:
        """Fill `self.leaves`, name by name."""

    @abstractmethod
    def call(self, backend: str, leaves: dict[str, Tensor]) -> Tensor:
        """The outputs of one pass."""

    @abstractmethod
    def flops(self, backward: bool) -> float:
        """Operations of one pass, with the backward pass or without."""

    def bytes(self, backward: bool) -> float | None:
        return None

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self._draw, device=self.device) * scale

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._draw, device=self.device)

    @property
    def token_heads(self) -> int:
        batch, tokens, heads, _ = self.shape
        return batch * tokens * heads


class DeltaScan(Operation):
    name = "delta_scan"

    def make(self, batch: int, heads: int, tokens: int, width: int) -> None:
        streams = (batch, heads, tokens, width)
        self.leaves = {
            "keys": F.normalize(self.normal(*streams), dim=-1).to(self.dtype),
            "local_grads": self.normal(*streams).to(self.dtype),
            "log_alpha": -0.05 * self.uniform(*streams[:3]),
            "eta": 0.5 * self.uniform(*streams[:3]),
            "queries": F.normalize(self.normal(*streams), dim=-1).to(self.dtype),
            "initial": self.normal(batch, heads, width, width, scale=width**-0.5),
        }

    def call(self, backend: str, leaves: dict[str, Tensor]) -> Tensor:
        if backend == "gated_delta":
            return self._gated_delta(leaves)
        streams = (leaves[name] for name in ("keys", "local_grads", "log_alpha", "eta", "queries", "initial"))
        return delta_scan(*streams, backend=backend)[0]

    def flops(self, backward: bool) -> float:
        d = self.shape[-1]
        return self.token_heads * (6 * d**2 + 8 * C * d + C**2 + backward * (14 * d**2 + 22 * C * d + 2 * C**2))

    def bytes(self, backward: bool) -> float:
        d = self.shape[-1]
        half = self.dtype.itemsize / 2
        return self.token_heads * half * (8 * d + 8 + 2 * d**2 / C + backward * (14 * d + 16 + 2 * d**2 / C))

    @staticmethod
    def _gated_delta(leaves: dict[str, Tensor]) -> Tensor:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        q, k, v = (leaves[name].transpose(1, 2) for name in ("queries", "keys", "local_grads"))
        g, beta = (leaves[name].transpose(1, 2) for name in ("log_alpha", "eta"))
        return chunk_gated_delta_rule(q, k, v, g, beta.to(q.dtype), scale=1.0)[0]


class SelfModifyingScan(Operation):
    name = "self_modifying_scan"

    def make(self, batch: int, heads: int, tokens: int, width: int) -> None:
        streams = (batch, heads, tokens, width)
        self.leaves = {
            "x": self.normal(*streams).to(self.dtype),
            "queries": F.normalize(self.normal(*streams), dim=-1).to(self.dtype),
        }
        for name in MEMORIES:
            out = 1 if name in SCALAR_MEMORIES else width
            self.leaves[f"{name}.w1"] = self.normal(batch, heads, out, width, scale=0.5 * width**-0.5)
            self.leaves[f"{name}.w2"] = self.normal(batch, heads, width, width, scale=width**-0.5)

    def call(self, backend: str, leaves: dict[str, Tensor]) -> Tensor:
        weights = {name: (leaves[f"{name}.w1"], leaves[f"{name}.w2"]) for name in MEMORIES}
        # Towards zero the memories would die out over so many tokens.
        rule: dict[str, Any] = {"chunk_size": C, "eta_max": 0.1, "decay_to": "initial", "backend": backend}
        return self_modifying_scan(leaves["x"], leaves["queries"], MemoryState.initial(weights), **rule)[0]

    def flops(self, backward: bool) -> float:
        return self.token_heads * len(MEMORIES) * 18 * self.shape[-1] ** 2 * (4 if backward else 1)


def backends(operation: Operation) -> Iterator[tuple[str, Call]]:
    """Name and function of every backend that there is on this machine."""
    names = ["chunked"]
    if operation.name == "delta_scan" and operation.device == "cuda":
        names += ["triton"] + ["gated_delta"] * (find_spec("fla") is not None)
    for name in names:
        yield name, partial(operation.call, name)
    if operation.device == "cuda":
        yield "compiled chunked", torch.compile(partial(operation.call, "chunked"))


def check(kind: type[Operation], backend: str, device: str, dtype: torch.dtype, width: int) -> None:
    """Raises AssertionError unless outputs and gradients are those of the token loop."""
    small = kind((1, 150, 2, width), device, dtype)

    def results(name: str, dtype: torch.dtype | None) -> list[Tensor]:
        leaves = {key: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for key, leaf in small.leaves.items()}
        outputs = small.call(name, leaves)
        return [outputs, *torch.autograd.grad(outputs.square().sum(), list(leaves.values()))]

    found, expected = results(backend, None), results("reference", torch.float64)
    for mine, right, name in zip(found, expected, ["outputs", *small.leaves], strict=True):
        error = ((mine.double() - right).norm() / right.norm()).item()
        assert error <= TOLERANCES[dtype], f"{kind.name} by {backend}, {name}: off by {error:.1e} of its norm"


def milliseconds(step: Callable[[], Any], device: str) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if device == "cuda":
        from triton.testing import do_bench

        median, low, high = do_bench(step, quantiles=[0.5, 0.2, 0.8])
        return median, low, high
    times = []
    step()
    for _ in range(5):
        start = time.process_time()
        step()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times), sorted(times)[1], sorted(times)[3]


def facts_of(device: str, dtype: str) -> dict[str, str]:
    """What the numbers depend on; on a CPU one thread is used from now on."""
    if device == "cpu":
        torch.set_num_threads(1)
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, one thread"
    return {"device": chip, "torch": torch.__version__, "dtype": dtype}


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, device)[0] * 1e3


def measure(operation: Operation, rate: float) -> Iterator[Line]:
    leaves = {name: leaf.requires_grad_() for name, leaf in operation.leaves.items()}
    batch, tokens, heads, width = operation.shape
    for name, call in backends(operation):

        def forward(call: Call = call) -> None:
            with torch.no_grad():
                call(leaves)

        def both(call: Call = call) -> None:
            outputs = call(leaves)
            torch.autograd.grad(outputs, list(leaves.values()), torch.ones_like(outputs), allow_unused=True)

        for passes, step, backward in (("forward", forward, False), ("forward+backward", both, True)):
            if operation.device == "cuda":
                step()
                torch.cuda.reset_peak_memory_stats()
            ms, low, high = milliseconds(step, operation.device)
            peak = torch.cuda.max_memory_allocated() / 2**20 if operation.device == "cuda" else None
            moved = operation.bytes(backward)
            yield Line(
                *(operation.name, f"B={batch} T={tokens} H={heads} D={width}", name, passes, ms, low, high),
                tokens=batch * tokens / ms * 1e3,
                mfu=operation.flops(backward) / ms * 1e3 / rate,
                gbytes=None if moved is None else moved / ms / 1e6,
                peak=peak,
            )


def table(lines: list[Line]) -> str:
    head = f"{'backend':<18}{'passes':<18}{'ms':>10}{'tokens/s':>14}{'MFU':>8}{'GB/s':>8}{'peak MiB':>10}"
    said, before = [], None
    for line in lines:
        if (line.operation, line.shape) != before:
            before = line.operation, line.shape
            said += ["", f"{line.operation}, {line.shape}", head]
        gbytes = "" if line.gbytes is None else f"{line.gbytes:.0f}"
        peak = "" if line.peak is None else f"{line.peak:.0f}"
        said.append(
            f"{line.backend:<18}{line.passes:<18}{line.ms:>10.3f}{line.tokens:>14,.0f}{line.mfu:>8.1%}{gbytes:>8}{peak:>10}"
        )
    return "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    facts, rate = facts_of(device, str(dtype).removeprefix("torch.")), matrix_rate(device, dtype)
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    lines: list[Line] = []
    for kind in (DeltaScan, SelfModifyingScan):
        for width in sorted({shape[-1] for shape in SHAPES[device]}):
            for name in ["chunked"] + ["triton"] * (device == "cuda" and kind is DeltaScan):
                check(kind, name, device, dtype, width)
        for shape in SHAPES[device]:
            lines += measure(kind(shape, device, dtype), rate)
    print(table(lines))
    if options.json:
        options.json.write_text(json.dumps(facts | {"lines": [asdict(line) for line in lines]}, indent=2) + "\n")


if __name__ == "__main__":
    main()

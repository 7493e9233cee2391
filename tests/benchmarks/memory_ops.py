"""How fast the memory operations are: `python tests/benchmarks/memory_ops.py [--json FILE] [--reference-tokens 2048]`.

Forward and backward pass of `self_modifying_scan` and `delta_scan` at B=2, H=4, D=N=64, chunk 64, float32, one thread.
Measures the ratio of the token loop (`reference`, once: it is slow and keeps every token's state) to `chunked` at the
same number of tokens, and how the time of `chunked` grows from 2,048 to 32,768 tokens (the slope in log-log axes, 1 is
linear). Times are CPU seconds of this process, medians of the repeats, so that neighbours on a shared machine count
less; the two backends alternate in one run. Targets: a ratio of at least 25, a slope of at most 1.05.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from nestling.memory import MEMORIES, MemoryState, delta_scan, self_modifying_scan
from nestling.memory.state import SCALAR_MEMORIES

BATCH, HEADS, WIDTH, CHUNK = 2, 4, 64, 64
LENGTHS = (2048, 4096, 8192, 16384, 32768)
Step = Callable[[], None]


def self_modifying_step(tokens: int, backend: str) -> Step:
    """One forward and backward pass; gradients of the inputs and of all ten weights.

    The memories decay towards their initial weights, as in the models: towards zero they would die out over this many
    tokens, and the arithmetic of denormal numbers, several times slower, would be what is measured.
    """
    torch.manual_seed(0)
    x = torch.randn(BATCH, HEADS, tokens, WIDTH, requires_grad=True)
    queries = F.normalize(torch.randn(BATCH, HEADS, tokens, WIDTH), dim=-1).requires_grad_()
    weights = {}
    for name in MEMORIES:
        out = 1 if name in SCALAR_MEMORIES else WIDTH
        w1 = torch.randn(BATCH, HEADS, out, WIDTH) * 0.5 * WIDTH**-0.5
        w2 = torch.randn(BATCH, HEADS, WIDTH, WIDTH) * WIDTH**-0.5
        weights[name] = (w1.requires_grad_(), w2.requires_grad_())
    state = MemoryState.initial(weights)
    leaves = [x, queries, *(layer for layers in weights.values() for layer in layers)]

    def step() -> None:
        outputs, _ = self_modifying_scan(
            x, queries, state, chunk_size=CHUNK, eta_max=0.1, decay_to="initial", backend=backend
        )
        torch.autograd.grad(outputs.sum(), leaves)

    return step


def delta_step(tokens: int, backend: str) -> Step:
    torch.manual_seed(0)
    keys, queries = (F.normalize(torch.randn(BATCH, HEADS, tokens, WIDTH), dim=-1) for _ in range(2))
    leaves = [
        keys.requires_grad_(),
        torch.randn(BATCH, HEADS, tokens, WIDTH, requires_grad=True),
        (-0.05 * torch.rand(BATCH, HEADS, tokens)).requires_grad_(),
        (0.5 * torch.rand(BATCH, HEADS, tokens)).requires_grad_(),
        queries.requires_grad_(),
        torch.randn(BATCH, HEADS, WIDTH, WIDTH, requires_grad=True),
    ]

    def step() -> None:
        outputs, _ = delta_scan(*leaves, backend=backend)
        torch.autograd.grad(outputs.sum(), leaves)

    return step


def cpu_seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def slope(seconds: dict[int, float]) -> float:
    """Least squares of log seconds on log tokens."""
    return statistics.linear_regression([math.log(t) for t in seconds], [math.log(s) for s in seconds.values()]).slope


def measure(make: Callable[[int, str], Step], repeats: int, reference_tokens: int) -> dict:
    """Lengths take turns within a repeat: a neighbour's busy minute hits all of them."""
    make(256, "chunked")()
    steps = {tokens: make(tokens, "chunked") for tokens in LENGTHS}
    times: dict[int, list[float]] = {tokens: [] for tokens in LENGTHS}
    for _ in range(repeats):
        for tokens, step in steps.items():
            times[tokens].append(cpu_seconds(step))
    chunked = {tokens: statistics.median(values) for tokens, values in times.items()}

    chunked_step = make(reference_tokens, "chunked")
    before = [cpu_seconds(chunked_step) for _ in range(repeats)]
    reference = cpu_seconds(make(reference_tokens, "reference"))
    after = [cpu_seconds(chunked_step) for _ in range(repeats)]
    return {
        "chunked_seconds": chunked,
        "slope": slope(chunked),
        "reference_tokens": reference_tokens,
        "reference_seconds": reference,
        "ratio": reference / statistics.median(before + after),
    }


def chip() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference-tokens", type=int, default=2048, help="the token loop keeps about 5 MB a token")
    options = parser.parse_args()

    torch.set_num_threads(1)
    print(f"{chip()}, one thread; torch {torch.__version__}, Python {platform.python_version()}")
    print(f"forward + backward, B={BATCH} H={HEADS} D=N={WIDTH} chunk {CHUNK} float32, CPU seconds")
    results = {}
    for name, make in (("delta_scan", delta_step), ("self_modifying_scan", self_modifying_step)):
        result = results[name] = measure(make, options.repeats, options.reference_tokens)
        print(f"\n{name}\n{'tokens':>8} {'chunked':>9} {'a token':>10}")
        for tokens, seconds in result["chunked_seconds"].items():
            print(f"{tokens:>8} {seconds:>8.3f}s {1e6 * seconds / tokens:>8.1f}us")
        print(f"slope {result['slope']:.3f}; at {result['reference_tokens']} tokens the reference takes ", end="")
        print(f"{result['reference_seconds']:.2f}s, {result['ratio']:.1f} times as long")
    if options.json:
        facts = {"chip": chip(), "torch": torch.__version__, "python": platform.python_version()}
        options.json.write_text(json.dumps(facts | results, indent=2) + "\n")


if __name__ == "__main__":
    main()

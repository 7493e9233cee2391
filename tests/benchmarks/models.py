"""How fast a training step of HOPE is beside our Transformer's: `python -m tests.benchmarks.models [--json FILE]`.

Both have the same number of parameters, the same batch, and learn the next token: forward pass, cross-entropy and
backward pass, without the optimizer. On a GPU the shapes are those of 340 million and 1.3 billion parameters in
bfloat16, with activation checkpointing; on a CPU there is one small model in float32, on one thread, whose step is also
measured over a long sequence. MFU is the share of the rate that a large matrix product reaches here; counted are 6
operations a token and parameter, 6 T a token and unit of width in causal attention, and for HOPE's memories four times
18 D N a token, head and memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tests.benchmarks.kernels import facts_of, matrix_rate, milliseconds

from nestling.memory import MEMORIES
from nestling.models import HopeConfig, SkeletonConfig, TransformerConfig, build
from nestling.models.parameters import match_parameters, parameter_count


@dataclass(frozen=True)
class Size:
    """A HOPE, and the batches (sequences, tokens) that it learns."""

    name: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    level_widths: tuple[int, ...]
    batches: tuple[tuple[int, int], ...]


SIZES = {
    "cuda": (
        Size("340M", 32000, 1024, 24, 16, (1024, 1024, 1024), ((8, 4096),)),
        Size("1.3B", 32000, 2048, 24, 16, (2048, 2048, 2048), ((8, 4096),)),
    ),
    "cpu": (Size("4 layers of 256", 4096, 256, 4, 4, (384, 384), ((1, 2048), (1, 16384))),),
}


@dataclass(frozen=True)
class Line:
    """One measurement: a step's milliseconds, tokens and their rate, memory in MiB at the peak."""

    size: str
    model: str
    parameters: int
    batch: int
    tokens: int
    ms: float
    rate: float
    mfu: float
    peak: float | None


def models(size: Size, dtype: str) -> Iterator[SkeletonConfig]:
    common: dict[str, Any] = {"vocab_size": size.vocab_size, "layers": size.layers, "heads": size.heads, "dtype": dtype}
    hope = HopeConfig(**common, width=size.width, level_widths=list(size.level_widths))
    yield hope
    yield match_parameters(TransformerConfig(**common, width=size.width), hope)


def flops(config: SkeletonConfig, parameters: int, batch: int, tokens: int) -> float:
    """Operations of a step."""
    if isinstance(config, HopeConfig):
        head = config.width // config.heads
        mixing = 4 * 18 * head * (config.memory_width or head) * config.heads * len(MEMORIES)
    else:
        mixing = 6 * tokens * config.width
    return batch * tokens * (6 * parameters + config.layers * mixing)


def measure(size: Size, device: str, dtype: str, peak_rate: float) -> Iterator[Line]:
    for config in models(size, dtype):
        torch.manual_seed(0)
        model = build(config).to(device)
        model.activation_checkpointing = device == "cuda"
        parameters = parameter_count(config)
        for batch, tokens in size.batches:
            text = torch.randint(size.vocab_size, (batch, tokens + 1), device=device)

            def step(text: torch.Tensor = text, model: Any = model) -> None:
                logits, _ = model(text[:, :-1])
                F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten()).backward()
                model.zero_grad()

            if device == "cuda":
                step()
                torch.cuda.reset_peak_memory_stats()
            ms = milliseconds(step, device)[0]
            peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
            mfu = flops(config, parameters, batch, tokens) / ms * 1e3 / peak_rate
            yield Line(size.name, config.name, parameters, batch, tokens, ms, batch * tokens / ms * 1e3, mfu, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    facts, rate = facts_of(device, dtype), matrix_rate(device, getattr(torch, dtype))
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    print(
        f"{'size':<17}{'model':<13}{'parameters':>14}{'batch':>10}{'ms':>11}{'tokens/s':>12}{'MFU':>8}{'peak MiB':>10}"
    )
    lines = []
    for size in SIZES[device]:
        for line in measure(size, device, dtype, rate):
            lines.append(line)
            peak = "" if line.peak is None else f"{line.peak:.0f}"
            print(f"{line.size:<17}{line.model:<13}{line.parameters:>14,}{f'{line.batch} x {line.tokens}':>10}", end="")
            print(f"{line.ms:>11.1f}{line.rate:>12,.0f}{line.mfu:>8.1%}{peak:>10}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(facts | {"lines": [asdict(line) for line in lines]}, indent=2) + "\n")


if __name__ == "__main__":
    main()

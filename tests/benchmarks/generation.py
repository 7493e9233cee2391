"""Time a token and size of the state while a model writes a long text, in stretches: constant for a recurrent model.

    python tests/benchmarks/generation.py [--tokens 16384] [--json FILE]

The quickstart's HOPE and a Transformer of the same width, random weights (seed 0), one thread. The Transformer's cache
grows; it writes a quarter as many tokens, which is enough to see it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from nestling.config import load
from nestling.memory import MemoryState
from nestling.models import build

STRETCHES = 8


def tensors(state: Any) -> list[torch.Tensor]:
    """Every tensor of a state."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, MemoryState):
        state = [state.weights, state.snapshots]
    parts = state.values() if isinstance(state, dict) else state
    return [tensor for part in parts for tensor in tensors(part)]


@torch.inference_mode()
def write(name: str, tokens: int) -> list[dict[str, float]]:
    """One row a stretch: tokens written by its end, milliseconds a token in it, bytes of state at its end."""
    torch.manual_seed(0)
    config = load("jobs/quickstart.yaml", [f"model.name={name}", "model.vocab_size=257"])
    model = build(config.model).eval()
    token, state, rows = torch.zeros(1, 1, dtype=torch.int64), None, []
    for stretch in range(STRETCHES):
        began = time.perf_counter()
        for _ in range(tokens // STRETCHES):
            logits, state = model(token, state)
            token = logits[:, -1:].argmax(-1)
        milliseconds = 1000 * (time.perf_counter() - began) / (tokens // STRETCHES)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(state))
        rows.append({"tokens": (stretch + 1) * tokens // STRETCHES, "ms_per_token": milliseconds, "state_bytes": size})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {"hope": write("hope", arguments.tokens), "transformer": write("transformer", arguments.tokens // 4)}
    for name, rows in results.items():
        print(f"{name}\n{'tokens':>8} {'ms a token':>12} {'state bytes':>12}")
        for row in rows:
            print(f"{row['tokens']:>8} {row['ms_per_token']:>12.3f} {row['state_bytes']:>12,}")
    if arguments.json:
        facts = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

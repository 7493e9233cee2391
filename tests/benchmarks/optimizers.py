"""Cost of an optimizer's step against AdamW's, on the same models, with the part of the Newton-Schulz iteration.

    python tests/benchmarks/optimizers.py [--repeats 5] [--models small,medium] [--json FILE]

Steps alone, on fixed random gradients, in float32 on one thread: medians over repeats of the CPU seconds of ten steps
(a period of M3's slow momentum), the optimizers taking turns. All move the same groups: matrices by their rule, tables
and vectors by AdamW where the rule is for matrices only. A forward and backward pass of 512 tokens stands beside them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.models import build
from nestling.optim import M3, DeepMomentum, DeltaMomentum, Levels, Muon, matrix_groups, orthogonal

STEPS = 10
#: Width and layers of a Transformer over bytes.
MODELS = {"small": (128, 2), "medium": (512, 4)}
OPTIMIZERS: dict[str, Callable[..., Levels]] = {
    "adamw": Levels,
    "muon": Muon,
    "m3": M3,
    "delta_momentum": DeltaMomentum,
    "deep_momentum": DeepMomentum,
}


class Stopwatch:
    """Adds up the CPU seconds of the calls of a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        began = time.process_time()
        result = self.function(*arguments, **keywords)
        self.seconds += time.process_time() - began
        return result


def measure(width: int, layers: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of CPU a step of every optimizer, its ratio to AdamW's, and its Newton-Schulz part."""
    torch.manual_seed(0)
    model = build({"name": "transformer", "vocab_size": 257, "width": width, "layers": layers, "heads": width // 64})
    watch = orthogonal.newton_schulz = Stopwatch(orthogonal.newton_schulz)
    tokens, passes = torch.randint(257, (1, 512)), []
    made = {name: make(matrix_groups(model), lr=1e-6) for name, make in OPTIMIZERS.items()}
    steps: dict[str, list[float]] = {name: [] for name in made}
    iterations: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(repeats):
        began = time.process_time()
        model(tokens)[0].square().mean().backward()
        passes.append(time.process_time() - began)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        for name, optimizer in made.items():
            watch.seconds, began = 0.0, time.process_time()
            for _ in range(STEPS):
                optimizer.step()
            steps[name].append((time.process_time() - began) / STEPS)
            iterations[name].append(watch.seconds / STEPS)
    orthogonal.newton_schulz = watch.function
    adamw = statistics.median(steps["adamw"])
    rows = {
        name: {
            "ms_per_step": 1000 * statistics.median(steps[name]),
            "newton_schulz_ms": 1000 * statistics.median(iterations[name]),
            "over_adamw": statistics.median(steps[name]) / adamw,
        }
        for name in made
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "forward_backward_ms": 1000 * statistics.median(passes), "optimizers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(*MODELS[name], arguments.repeats) for name in arguments.models.split(",")}
    for name, result in results.items():
        print(
            f"{name}: {result['parameters']:,} parameters, forward and backward {result['forward_backward_ms']:.1f} ms"
        )
        print(f"{'optimizer':>16} {'ms a step':>12} {'of it Newton-Schulz':>20} {'over AdamW':>12}")
        for optimizer, row in result["optimizers"].items():
            milliseconds = f"{row['ms_per_step']:>12.2f} {row['newton_schulz_ms']:>20.2f}"
            print(f"{optimizer:>16} {milliseconds} {row['over_adamw']:>12.2f}")
    if arguments.json:
        facts = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        facts |= {"repeats": arguments.repeats}
        arguments.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

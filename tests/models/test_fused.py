"""The Triton kernels of the memory operations against the token loop in float64, outputs and every gradient.

On a GPU the kernels are compiled; without one Triton's interpreter runs the same code, which shows neither races nor
what a layout costs. Errors are root mean squares relative to those of the right result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestling.memory import MEMORIES, MemoryState, delta_scan, self_modifying_scan
from nestling.memory.state import SCALAR_MEMORIES

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

torch.set_num_threads(1)
#: Relative errors; the interpreter cuts float32 to bfloat16 where a GPU rounds.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 2e-2}
Results = dict[str, Tensor]


def arguments(
    tokens: int, n: int, m: int, *, seed: int = 0, batch: int = 1, heads: int = 1, dtype: torch.dtype = torch.float32,
    based: bool = False,
) -> Results:  # fmt: skip
    """Inputs that a model has: keys and queries of length one, steps below 0.95, gates of 0.9 to 1."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    keys, queries = (normal(batch, heads, tokens, n) for _ in range(2))
    tensors = {
        "keys": F.normalize(keys, dim=-1).to(dtype),
        "local_grads": normal(batch, heads, tokens, m).to(dtype),
        "log_alpha": -0.1 * torch.rand(batch, heads, tokens, generator=draw),
        "eta": 0.95 * torch.rand(batch, heads, tokens, generator=draw),
        "queries": F.normalize(queries, dim=-1).to(dtype),
        "initial": normal(batch, heads, m, n),
    }
    if based:
        tensors["base"] = normal(batch, heads, m, n)
    return {name: tensor.to(DEVICE).requires_grad_() for name, tensor in tensors.items()}


def run(given: Results, backend: str, dtype: torch.dtype | None = None, **switches: Any) -> Results:
    """Outputs, final weights and the gradient of every input, all of them asked of both results."""
    given = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in given.items()}
    outputs, final = delta_scan(**given, backend=backend, **switches)
    draw = torch.Generator().manual_seed(99)
    asked = [torch.randn(result.shape, generator=draw).to(result.device) for result in (outputs, final)]
    asked[0] = asked[0].to(torch.bfloat16)  # what every dtype can give, so that all are asked the same
    loss = (outputs * asked[0].to(outputs.dtype)).sum() + (final * asked[1].to(final.dtype)).sum()
    found = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    grads = {f"gradient of {name}": grad for name, grad in zip(given, found, strict=True) if grad is not None}
    return {"outputs": outputs.detach(), "final": final.detach(), **grads}


def assert_near(found: Results, expected: Results, tolerance: float) -> None:
    for name, right in expected.items():
        if name not in found:
            assert not right.any(), name
            continue
        error, size = (found[name].double() - right).norm(), right.norm()
        assert error <= tolerance * size + 1e-6, f"{name}: off by {error / size:.1e} of its norm"


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 999),
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "tokens": st.sampled_from([1, 15, 64, 65, 100, 130]),
        "n": st.sampled_from([16, 20, 32, 64, 130]),
        "m": st.sampled_from([16, 20, 32, 70]),
        "dtype": st.sampled_from(list(TOLERANCES)),
        "based": st.booleans(),
    }
)
switches = st.fixed_dictionaries({"erase": st.booleans(), "read": st.sampled_from(["before", "after", "boundary"])})


@settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(cases, switches)
def test_delta_kernels_equal_the_token_loop(case: dict, switches: dict) -> None:
    # A single token's gates have one number for a gradient, in which half precision may cancel.
    assume(case["tokens"] > 60 or case["dtype"] == torch.float32)
    given = arguments(**case)
    expected = run(given, "reference", torch.float64, **switches)
    assert_near(run(given, "triton", **switches), expected, TOLERANCES[case["dtype"]])


@pytest.mark.parametrize("eta", [0.0, 0.95])
def test_delta_kernels_at_their_limits(eta: float) -> None:
    """Equal keys, the hardest system to solve, open gates, and every third one shut."""
    given = arguments(100, 32, 16)
    for gates in (0.0, float("-inf")):
        log_alpha = torch.zeros_like(given["log_alpha"])
        log_alpha[..., 1::3] = gates
        keys = given["keys"].detach()[:, :, :1].expand_as(given["keys"])
        hard = given | {"keys": keys, "log_alpha": log_alpha, "eta": torch.full_like(given["eta"], eta)}
        expected = run(hard, "reference", torch.float64)
        if gates != 0:  # -inf has no gradient, and the token loop's is not a number
            expected["gradient of log_alpha"] = expected["gradient of log_alpha"].nan_to_num()
        assert_near(run(hard, "triton"), expected, 1e-5)


def test_delta_kernels_carry_their_state() -> None:
    """Two calls are one, and tokens that neither keep nor write nothing change nothing."""
    given = {name: t.detach() for name, t in arguments(90, 16, 16, heads=2).items()}
    streams = [name for name in given if name != "initial"]
    whole, final = delta_scan(**given, backend="triton")
    first, middle = delta_scan(**given | {name: given[name][:, :, :40] for name in streams}, backend="triton")
    rest = {name: given[name][:, :, 40:] for name in streams}
    second, end = delta_scan(**rest, initial=middle, backend="triton")
    torch.testing.assert_close(torch.cat([first, second], dim=2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, final, rtol=1e-5, atol=1e-5)
    still = {"log_alpha": torch.zeros_like(given["eta"]), "eta": torch.zeros_like(given["eta"])}
    assert torch.equal(delta_scan(**given | still, backend="triton")[1], given["initial"])


def test_delta_kernels_are_deterministic() -> None:
    given = arguments(130, 32, 70, batch=2)
    one, two = run(given, "triton"), run(given, "triton")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_delta_kernels_are_a_torch_operator() -> None:
    from nestling.memory.fused.delta import _backward, _scan

    given = arguments(20, 16, 16)
    tensors = [given[name] for name in ("keys", "local_grads", "log_alpha", "eta", "queries", "initial")]
    torch.library.opcheck(_scan, (*tensors, True, "before", True))
    torch.library.opcheck(_scan, (*tensors, False, "none", True))
    keys, local_grads, _, eta, queries, _ = (tensor.detach() for tensor in tensors)
    outputs, final, *kept = _scan(*(tensor.detach() for tensor in tensors), True, "after", True)
    torch.library.opcheck(_backward, (keys, local_grads, eta, queries, *kept, outputs, final, True, "after"))

    def square(*tensors: Tensor) -> Tensor:
        outputs, final = delta_scan(*tensors, backend="triton")
        return outputs.square().sum() + final.square().sum()

    compiled = torch.compile(square, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(square(*tensors), tensors)
    for mine, right in zip(torch.autograd.grad(compiled(*tensors), tensors), plain, strict=True):
        torch.testing.assert_close(mine, right)


def test_where_the_kernels_cannot_run() -> None:
    narrow = arguments(4, 8, 16)
    with pytest.raises(ValueError, match="backend: got 'triton', but n=8 is none of the widths 16 to 256"):
        delta_scan(**narrow, backend="triton")
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, not torch.float64"):
        delta_scan(**{name: t.double() for name, t in arguments(4, 16, 16).items()}, backend="triton")
    with pytest.raises(ValueError, match="backend: got 'fast', needs one of 'auto', 'reference', 'chunked', 'triton'"):
        delta_scan(**narrow, backend="fast")


# --- self_modifying_scan ----------------------------------------------------------------------------------------------


def memories(
    tokens: int,
    width: int,
    hidden: int,
    *,
    seed: int = 0,
    batch: int = 1,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Results:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw) * scale

    tensors = {
        "x": normal(batch, heads, tokens, width).to(dtype),
        "queries": F.normalize(normal(batch, heads, tokens, width), dim=-1).to(dtype),
    }
    for name in MEMORIES:
        out = 1 if name in SCALAR_MEMORIES else width
        tensors[f"{name}.w1"] = normal(batch, heads, out, hidden, scale=0.5 * hidden**-0.5)
        tensors[f"{name}.w2"] = normal(batch, heads, hidden, width, scale=width**-0.5)
    tensors |= {"eta_max": torch.full((heads,), 0.4), "eta_bias": normal(heads, scale=0.3)}
    tensors["alpha_bias"] = 3 + normal(heads, scale=0.3)
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def run_memories(given: Results, backend: str, dtype: torch.dtype | None = None, cut: int = 0, **rule: Any) -> Results:
    """Outputs, weights, snapshots and every gradient of one call, or of two."""
    given = {name: t.to(dtype or t.dtype).requires_grad_() for name, t in given.items()}
    state = MemoryState.initial({name: (given[f"{name}.w1"], given[f"{name}.w2"]) for name in MEMORIES})
    gates, outputs = {name: given[name] for name in ("eta_max", "eta_bias", "alpha_bias")}, []
    for part in (slice(cut), slice(cut, None)):
        streams = given["x"][:, :, part], given["queries"][:, :, part]
        output, state = self_modifying_scan(*streams, state, **gates, **rule, backend=backend)
        outputs.append(output)
    results = {"outputs": torch.cat(outputs, dim=2)}
    for part, layers in (("weight", state.weights), ("snapshot", state.snapshots)):
        results |= {f"{part} {name}.w{i + 1}": layer for name in MEMORIES for i, layer in enumerate(layers[name])}
    draw = torch.Generator().manual_seed(99)
    asked = [torch.randn(result.shape, generator=draw).to(result.device) for result in results.values()]
    loss = torch.stack([(mine.double() * one).sum() for mine, one in zip(results.values(), asked, strict=True)]).sum()
    found = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    grads = {f"gradient of {name}": grad for name, grad in zip(given, found, strict=True) if grad is not None}
    return {name: result.detach() for name, result in results.items()} | grads


rules = st.fixed_dictionaries(
    {
        "chunk_size": st.sampled_from([8, 16, 64, 100]),
        "projection_chunk_size": st.sampled_from([None, 16, 24]),
        "objective": st.sampled_from(["l2", "dot"]),
        "erase": st.sampled_from(["all", "first", "last", "none"]),
        "step_size": st.sampled_from(["proximal", "direct"]),
        "read": st.sampled_from(["before", "after", "boundary"]),
        "decay_to": st.sampled_from(["zero", "initial"]),
        "write": st.sampled_from(["all", "last"]),
    }
)


@pytest.mark.slow
@settings(
    max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(rules, st.sampled_from([(16, 16), (20, 32), (32, 18)]), st.integers(0, 99))
def test_memory_kernels_equal_the_token_loop(rule: dict, shape: tuple[int, int], seed: int) -> None:
    """Also in two calls, of which the second goes on within a chunk."""
    given = memories(30, *shape, seed=seed)
    expected = run_memories(given, "reference", torch.float64, **rule)
    assume(
        all(bool(right.isfinite().all()) and right.norm() < 1e4 for right in expected.values())
    )  # some rules diverge
    assert_near(run_memories(given, "triton", cut=seed % 30, **rule), expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_kernels_over_groups_of_blocks(dtype: torch.dtype) -> None:
    """Rows and heads apart, blocks of which the backward pass makes some again, the model's own rule."""
    given = memories(56, 16, 16, batch=1 if dtype == torch.float32 else 2, heads=2, dtype=dtype)
    rule = dict(chunk_size=16, erase="last", write="last", decay_to="initial")
    expected = run_memories(given, "reference", torch.float64, **rule)
    assert_near(run_memories(given, "triton", **rule), expected, {torch.float32: 1e-4}.get(dtype, 5e-2))


@pytest.mark.slow
def test_memory_kernels_are_a_torch_operator() -> None:
    given = memories(20, 16, 16)
    tensors = [tensor.requires_grad_() for tensor in given.values()]

    def square(*tensors: Tensor) -> Tensor:
        named = dict(zip(given, tensors, strict=True))
        state = MemoryState.initial({name: (named[f"{name}.w1"], named[f"{name}.w2"]) for name in MEMORIES})
        rule = {name: named[name] for name in ("eta_max", "eta_bias", "alpha_bias")}
        outputs, _ = self_modifying_scan(named["x"], named["queries"], state, chunk_size=8, **rule, backend="triton")
        return outputs.square().sum()

    compiled = torch.compile(square, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(square(*tensors), tensors)
    for mine, right in zip(torch.autograd.grad(compiled(*tensors), tensors), plain, strict=True):
        torch.testing.assert_close(mine, right)


def test_where_the_memory_kernels_cannot_run() -> None:
    given = memories(4, 16, 16)
    state = MemoryState.initial({name: (given[f"{name}.w1"], given[f"{name}.w2"]) for name in MEMORIES})
    with pytest.raises(ValueError, match="backend: got 'triton', but the kernels have no momentum"):
        self_modifying_scan(given["x"], given["queries"], state, momentum=0.5, backend="triton")
    with pytest.raises(ValueError, match="backend: got 'triton', but the kernels write all five memories"):
        self_modifying_scan(given["x"], given["queries"], state, adaptive=["memory"], backend="triton")


COMPILE = """
import json, re, subprocess, sys
from pathlib import Path
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nestling.memory.fused import delta_kernels as kernels
from nestling.memory.fused.launch import tile

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHORT = ("keys", "local_grads", "queries", "outputs", "states", "grad_outputs", "grad_local")
*_, ptxas = sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))  # the newest
found = {}
for dtype, width in (("bf16", 128), ("fp32", 64)):
    switches = {"M": width, "N": width, "NP": width, "ERASE": True, "READ": "before", "KEEP": True, "SHUT": -100.0}
    switches |= {"PRECISION": "tf32x3" if dtype == "fp32" else "tf32", "UPCAST": False}
    for kernel in (kernels.prepare, kernels.forward, kernels.backward):
        shape = tile(width, width, DTYPES[dtype], backward=kernel is kernels.backward)
        constants = {name: value for name, value in (switches | shape).items() if name in kernel.arg_names}
        wide = {"total": "*fp64"} | dict.fromkeys(SHORT, "*" + dtype)
        kinds = {name: wide.get(name, "*fp32") for name in kernel.arg_names}
        kinds |= {"T": "i32"} | dict.fromkeys(constants, "constexpr")
        options = {"num_warps": 4} if kernel is kernels.prepare else shape
        options = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
        source = ASTSource(kernel, kinds, constants)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        file = Path(sys.argv[1], "kernel.ptx")
        file.write_text(built.asm["ptx"])
        command = [ptxas, "-v", "--gpu-name", "sm_90a", file, "-o", file.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found[f"{kernel.__name__}, {dtype}, width {width}"] = {
            "tensor cores": len(re.findall("wgmma.mma|mma.sync", built.asm["ptx"])),
            "registers": int(re.search(r"Used (\\d+) registers", said)[1]),
            "spilt bytes": int(re.search(r"(\\d+) bytes spill stores", said)[1]),
            "shared bytes": built.metadata.shared,
        }
print(json.dumps(found))
"""
#: Bytes that a thread may spill from its registers: what it is now, too much, and for a GPU to be brought down on.
SPILLS = {"bf16": 4096, "fp32": 12288}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_delta_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Ahead of time, without a GPU: products on tensor cores, tiles that fit, spills within limits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for name, kernel in json.loads(done.stdout.splitlines()[-1]).items():
        assert kernel["tensor cores"] > 0, name
        limit = SPILLS["bf16" if "bf16" in name else "fp32"]
        assert kernel["shared bytes"] <= 227 * 1024 and kernel["spilt bytes"] <= limit, (name, kernel)

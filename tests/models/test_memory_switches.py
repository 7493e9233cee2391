"""The switches of the memories: which are written, a memory for queries, matrices instead of networks, momentum.

Every case runs through the same four questions, in float64: does the chunked form equal the token loop, gradients
included; does any split of the tokens give the same; is it causal; do rows stay apart. The loop itself is held against
the equations, whose inner gradients come from autograd.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory import MEMORIES, MemoryState, self_modifying_scan
from nestling.memory.state import SCALAR_MEMORIES

torch.set_num_threads(1)
TOKENS, WIDTH, HIDDEN = 22, 4, 3
GATES = ("eta_max", "eta_bias", "alpha_bias")
STATIC_PROJECTIONS = ("memory",)
DIRECT = {"read": "after", "step_size": "direct", "decay_to": "initial"}
BOUNDARY = {"read": "boundary", "objective": "dot", "erase": "none"}
LAST = {"erase": "last", "write": "last", "decay_to": "initial"}
#: What is asked of the operation: matrices or not, "query" or not, and its keywords.
CASES: dict[str, dict[str, Any]] = {
    "one memory written": {"adaptive": STATIC_PROJECTIONS, "chunk_size": 4, "projection_chunk_size": 8},
    "one memory, last layers": {"adaptive": STATIC_PROJECTIONS, "chunk_size": 5, **LAST},
    "key and eta static": {"adaptive": ("value", "alpha", "memory"), "chunk_size": 8, "projection_chunk_size": 4},
    "value and alpha static": {"adaptive": ("key", "eta", "memory"), "chunk_size": 5, **DIRECT},
    "projections only": {"adaptive": ("alpha", "key", "value", "eta"), "chunk_size": 4, "projection_chunk_size": 8},
    "gates only": {"adaptive": ("eta",), "chunk_size": 7, **DIRECT},
    "nothing written": {"adaptive": (), "chunk_size": 4},
    "query": {"query": True, "chunk_size": 5, "projection_chunk_size": 7},
    "query, after": {"query": True, "chunk_size": 8, "projection_chunk_size": 4, **DIRECT},
    "query, boundary": {"query": True, "chunk_size": 4, "projection_chunk_size": 8, **BOUNDARY},
    "query static": {"query": True, "adaptive": MEMORIES, "chunk_size": 4, **LAST},
    "query written, memory static": {"query": True, "adaptive": ("query", "alpha"), "chunk_size": 5},
    "only query and memory": {"query": True, "adaptive": ("query", "memory"), "chunk_size": 7, **LAST},
    "momentum": {"momentum": True, "chunk_size": 8, "projection_chunk_size": 4},
    "momentum, after": {"momentum": True, "query": True, "chunk_size": 5, "projection_chunk_size": 7, **DIRECT},
    "momentum, boundary": {"momentum": True, "chunk_size": 4, "projection_chunk_size": 8, **BOUNDARY},
    "momentum, last layers": {"momentum": True, "adaptive": ("key", "memory"), "chunk_size": 8, **LAST},
    "momentum, one number": {"momentum": 0.9, "adaptive": ("value", "eta"), "chunk_size": 5},
    "matrix, momentum": {"matrix": True, "query": True, "momentum": True, "chunk_size": 5, "projection_chunk_size": 7},
    "matrix, momentum, after": {
        "matrix": True,
        "momentum": True,
        "chunk_size": 8,
        "projection_chunk_size": 4,
        **DIRECT,
    },
    "matrix": {"matrix": True, "chunk_size": 5, "projection_chunk_size": 7},
    "matrix, after": {"matrix": True, "query": True, "chunk_size": 8, "projection_chunk_size": 4, **DIRECT},
    "matrix, boundary": {"matrix": True, "chunk_size": 4, "projection_chunk_size": 8, **BOUNDARY},
    "matrix, one written": {"matrix": True, "adaptive": STATIC_PROJECTIONS, "chunk_size": 4, **LAST},
    "matrix, gates static": {"matrix": True, "query": True, "adaptive": ("key", "value", "query"), "chunk_size": 5},
}
Results = dict[str, Tensor]
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


def arguments(
    matrix: bool = False, query: bool = False, momentum: Any = None, seed: int = 0, tokens: int = TOKENS, **_: Any
) -> Results:
    """x, queries, the layers of each memory ("key.0", ...) and the gate parameters, two rows of two heads."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) * scale

    tensors = {"x": normal(2, 2, tokens, WIDTH), "queries": F.normalize(normal(2, 2, tokens, WIDTH), dim=-1)}
    for name in (*MEMORIES, *(["query"] if query else [])):
        out = 1 if name in SCALAR_MEMORIES else WIDTH
        tensors[f"{name}.0"] = normal(2, 2, out, WIDTH if matrix else HIDDEN, scale=0.4)
        if not matrix:
            tensors[f"{name}.1"] = normal(2, 2, HIDDEN, WIDTH)
    tensors["eta_max"] = torch.full((2,), 0.4, dtype=torch.float64)
    tensors["eta_bias"], tensors["alpha_bias"] = normal(2, scale=0.3), 3 + normal(2, scale=0.3)
    if matrix:  # the projections of a fresh matrix are what it holds: keep keys and values long enough to have a length
        for name in ("key", "value", *(["query"] if query else [])):
            tensors[f"{name}.0"] = tensors[f"{name}.0"] + torch.eye(WIDTH, dtype=torch.float64)
    if momentum is True:
        tensors["momentum"] = torch.tensor([0.9, 0.6], dtype=torch.float64)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def initial(tensors: Results) -> MemoryState:
    names = dict.fromkeys(name.split(".")[0] for name in tensors if "." in name)
    layers = {name: tuple(tensors[part] for part in (f"{name}.0", f"{name}.1") if part in tensors) for name in names}
    return MemoryState.initial(layers)


def calls(tensors: Results, cuts: Iterable[int] = (), **switches: Any) -> tuple[Tensor, MemoryState]:
    """Outputs and state of one call, or of several that cut the tokens at `cuts`."""
    switches = {name: value for name, value in switches.items() if name not in ("matrix", "query")}
    switches |= {name: tensors[name] for name in (*GATES, "momentum") if name in tensors}
    state, outputs, edges = initial(tensors), [], [0, *cuts, tensors["x"].shape[2]]
    for low, high in zip(edges, edges[1:], strict=False):
        x, queries = tensors["x"][:, :, low:high], tensors["queries"][:, :, low:high]
        output, state = self_modifying_scan(x, queries, state, **switches)
        outputs.append(output)
    assert state.position == tensors["x"].shape[2]
    return torch.cat(outputs, dim=2), state


def layers_of(state: MemoryState) -> Results:
    parts = {"weight": state.weights, "snapshot": state.snapshots, "momentum": state.momentum}
    return {
        f"{part} {name}.{i}": layer
        for part, weights in parts.items()
        for name, layers in weights.items()
        for i, layer in enumerate(layers)
    }


def run(tensors: Results, cuts: Iterable[int] = (), **switches: Any) -> Results:
    """Outputs, everything in the state, and the gradients of every input of a loss that looks at all of it."""
    outputs, state = calls(tensors, cuts, **switches)
    results = {"outputs": outputs} | layers_of(state)
    draw = torch.Generator().manual_seed(99)
    loss = torch.stack(
        [(t * torch.randn(t.shape, generator=draw, dtype=t.dtype)).sum() for t in results.values()]
    ).sum()
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    pairs = zip(tensors.items(), found, strict=True)
    return results | {f"gradient of {n}": torch.zeros_like(t) if grad is None else grad for (n, t), grad in pairs}


def assert_same(results: Results, expected: Results) -> None:
    assert results.keys() == expected.keys()
    for name, right in expected.items():
        error, size = (results[name] - right).norm(), right.norm()
        assert error <= 1e-10 * size + 1e-14, f"{name}: off by {error:.1e}, its norm is {size:.1e}"


# --- the chunked form equals the loop, at any split, causally, row by row ---------------------------------------------


@cases
def test_chunked_equals_the_token_loop(case: dict) -> None:
    tensors = arguments(**case)
    expected = run(tensors, backend="reference", **case)
    assert_same(run(tensors, backend="chunked", **case), expected)
    assert_same(run(tensors, backend="chunked", blocks_per_state=3, **case), expected)


@cases
def test_any_split_gives_the_same(case: dict) -> None:
    tensors = arguments(**case, seed=1)
    cuts = sorted(torch.randint(0, TOKENS, (3,), generator=torch.Generator().manual_seed(len(str(case)))).tolist())
    whole = run(tensors, **case)
    assert_same(run(tensors, cuts, **case), whole)
    outputs, state = calls(tensors, cuts, backend="reference", **case)
    assert_same({"outputs": outputs} | layers_of(state), {n: t for n, t in whole.items() if "gradient" not in n})


@cases
def test_causal_and_rows_apart(case: dict) -> None:
    tensors = {name: tensor.detach() for name, tensor in arguments(**case).items()}
    before, state = calls(tensors, **case)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["x"][0, :, 13:] += 1
    changed["queries"][0, :, 13:] = changed["queries"][0, :, 13:].flip(-1)
    after, other = calls(changed, **case)
    assert torch.equal(before[:, :, :13], after[:, :, :13]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, :, 13:], after[0, :, 13:])
    for name, layer in layers_of(state).items():
        assert torch.equal(layer[1], layers_of(other)[name][1]), name


# --- the loop against the equations -----------------------------------------------------------------------------------


def inner_gradients(layers: tuple[Tensor, ...], frozen: tuple[Tensor, ...], skip: bool, k: Tensor, v: Tensor) -> Any:
    """Gradients of 1/2 |M(k) - M(v / |v|)|^2 at the frozen layers, the target a constant."""

    def memory(layers: tuple[Tensor, ...], z: Tensor) -> Tensor:
        if len(layers) == 1:
            return layers[0] @ z
        return layers[0] @ F.silu(layers[1] @ z) + (z if skip else 0)

    target = memory(frozen, v / v.norm())
    return torch.func.grad(lambda layers: 0.5 * (memory(layers, k) - target).square().sum())(frozen)


WRITTEN = [name for name in CASES if not {"read", "write"} & CASES[name].keys()]


@pytest.mark.parametrize("case", [CASES[name] for name in WRITTEN], ids=WRITTEN)
def test_the_loop_follows_the_equations(case: dict) -> None:
    tensors = {name: tensor.detach() for name, tensor in arguments(**case, tokens=9).items()}
    outputs, state = calls(tensors, backend="reference", **case)
    current = {name: tuple(layer[0, 0] for layer in layers) for name, layers in initial(tensors).weights.items()}
    frozen, adaptive = dict(current), case.get("adaptive", tuple(current))
    momentum = {name: tuple(map(torch.zeros_like, layers)) for name, layers in current.items()}
    mu = tensors["momentum"][0] if "momentum" in tensors else case.get("momentum", 0.0)
    sizes = case["chunk_size"], case.get("projection_chunk_size", case["chunk_size"])

    def read(name: str, layers: tuple[Tensor, ...], z: Tensor) -> Tensor:
        if len(layers) == 1:
            return layers[0] @ z
        return layers[0] @ F.silu(layers[1] @ z) + (0 if name in SCALAR_MEMORIES else z)

    for t in range(9):
        x, q = tensors["x"][0, 0, t], tensors["queries"][0, 0, t]
        k, v = (read(name, frozen[name], x) for name in ("key", "value"))
        k = k / k.norm()
        if "query" in frozen:
            q = read("query", frozen["query"], q)
            q = q / q.norm()
        eta = tensors["eta_max"][0] * torch.sigmoid(read("eta", frozen["eta"], x) + tensors["eta_bias"][0])
        alpha = torch.sigmoid(read("alpha", frozen["alpha"], x) + tensors["alpha_bias"][0])
        torch.testing.assert_close(outputs[0, 0, t], read("memory", current["memory"], q), rtol=1e-10, atol=1e-12)
        for name in adaptive:
            grads = inner_gradients(current[name], frozen[name], name not in SCALAR_MEMORIES, k, v)
            inputs = (k,) if len(grads) == 1 else (F.silu(frozen[name][1] @ k), k)
            momentum[name] = tuple(mu * s + grad for s, grad in zip(momentum[name], grads, strict=True))
            new = []
            for layer, s, z in zip(current[name], momentum[name], inputs, strict=True):
                step = eta / (1 + eta * (z @ z))
                new.append(layer @ (alpha * torch.eye(len(z)).to(z) - step * torch.outer(z, z)) - step * s)
            current[name] = tuple(new)
            if (t + 1) % sizes[name != "memory"] == 0:
                frozen[name] = current[name]
    for name, layers in current.items():
        for layer, right in zip(state.weights[name], layers, strict=True):
            torch.testing.assert_close(layer[0, 0], right, rtol=1e-10, atol=1e-12)


# --- what each switch promises ----------------------------------------------------------------------------------------


@backends
@cases
def test_what_is_not_adaptive_keeps_its_weights(case: dict, backend: str) -> None:
    tensors = arguments(**case)
    _, state = calls(tensors, backend=backend, **case)
    adaptive = case.get("adaptive", tuple(state.weights))
    for name, layers in state.weights.items():
        moved = [not torch.equal(now, first) for now, first in zip(layers, state.base[name], strict=True)]
        last_only = case.get("write") == "last" and len(layers) == 2
        assert moved == [name in adaptive, name in adaptive and not last_only][: len(layers)], name


@backends
def test_a_written_memory_needs_the_others_only_as_functions(backend: str) -> None:
    """Static projections inside are static projections outside: the queries memory against a queries argument."""
    tensors = arguments(query=True)
    adaptive = ("key", "value", "eta", "alpha", "memory")
    inside, _ = calls(tensors, adaptive=adaptive, chunk_size=5, backend=backend)
    w1, w2, z = tensors["query.0"], tensors["query.1"], tensors["queries"]
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith("query.")}
    outside["queries"] = F.normalize(z + F.silu(z @ w2.mT) @ w1.mT, dim=-1)
    right, _ = calls(outside, chunk_size=5, backend=backend)
    torch.testing.assert_close(inside, right, rtol=1e-12, atol=1e-14)


@backends
def test_no_momentum_is_a_momentum_of_zero(backend: str) -> None:
    tensors = {name: tensor.detach() for name, tensor in arguments().items()}
    plain, state = calls(tensors, chunk_size=5, backend=backend)
    outputs, _ = calls(tensors | {"momentum": torch.zeros(2, dtype=torch.float64)}, chunk_size=5, backend=backend)
    torch.testing.assert_close(outputs, plain, rtol=1e-12, atol=1e-14)
    assert not state.momentum


@backends
def test_momentum_starts_at_zero_and_is_kept_in_float32(backend: str) -> None:
    tensors = {name: tensor.detach().bfloat16() for name, tensor in arguments().items()}
    given = tensors["x"], tensors["queries"]
    fresh = initial(tensors)
    zero = MemoryState(fresh.weights, fresh.snapshots, fresh.base, 0, fresh.map(torch.zeros_like).weights)
    (one, state), (other, _) = (
        self_modifying_scan(*given, start, momentum=0.5, backend=backend) for start in (fresh, zero)
    )
    assert torch.equal(one, other)
    assert {layer.dtype for layers in state.momentum.values() for layer in layers} == {torch.float32}


def test_detached_states_keep_their_momentum() -> None:
    _, state = calls(arguments(momentum=True), chunk_size=5)
    cut = state.detach()
    assert layers_of(cut).keys() == layers_of(state).keys() and "momentum memory.1" in layers_of(cut)
    for name, layer in layers_of(cut).items():
        assert not layer.requires_grad and torch.equal(layer, layers_of(state)[name])


def test_momentum_over_more_tokens_than_a_block() -> None:
    case = {"momentum": True, "chunk_size": 100, "projection_chunk_size": 70, "decay_to": "initial"}
    tensors = arguments(**case, tokens=110)
    assert_same(run(tensors, backend="chunked", **case), run(tensors, backend="reference", **case))


def test_the_names_may_come_in_any_order() -> None:
    tensors = arguments(query=True)
    one, _ = calls(tensors, adaptive=["query", "memory", "eta"], chunk_size=5)
    other, _ = calls(tensors, adaptive={"eta", "memory", "query"}, chunk_size=5)
    assert torch.equal(one, other)


def test_the_one_layer_of_a_matrix_memory_is_its_first_and_its_last() -> None:
    tensors = arguments(matrix=True)
    usual, none = (calls(tensors, chunk_size=5, erase=erase)[0] for erase in ("all", "none"))
    for switches in ({"erase": "first"}, {"erase": "last"}, {"write": "last"}):
        assert torch.equal(calls(tensors, chunk_size=5, **switches)[0], usual)
    assert not torch.equal(usual, none)


def zeros(depth: int, **changes: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, ...]]:
    """Weights of width 3 and hidden width 4 for two heads."""
    outs = {name: 1 if name in SCALAR_MEMORIES else 3 for name in MEMORIES}
    if depth == 1:
        return {name: (torch.zeros(1, 2, out, 3),) for name, out in outs.items()} | changes
    return {name: (torch.zeros(1, 2, out, 4), torch.zeros(1, 2, 4, 3)) for name, out in outs.items()} | changes


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (zeros(2, key=(torch.zeros(1, 2, 3, 3),)), r"weights\['value'\]: got 2 layers beside 1 of 'key', needs a pair"),
        (zeros(1, eta=(torch.zeros(1, 2, 3, 3),)), r"weights\['eta'\]\[0\]: got shape .*, needs \(B, H, out, D\) = "),
        (zeros(1, query=(torch.zeros(1, 2, 1, 3),)), r"weights\['query'\]\[0\]: got shape \(1, 2, 1, 3\), needs"),
        (zeros(1, key=(torch.zeros(1, 2, 4, 3),)), r"weights\['key'\]\[0\]: got shape \(1, 2, 4, 3\), needs"),
        (zeros(2, queries=(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3))), "needs .* and 'query' if a memory"),
        (zeros(2, key=()), r"weights\['key'\]: got 0 layers"),
    ],
)  # fmt: skip
def test_errors_of_weights(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryState.initial(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptive": "memory"}, "adaptive: got 'memory', needs a collection of names among key, value, eta"),
        ({"momentum": 1.0}, r"momentum: got 1.0, needs values in \[0, 1\)"),
        ({"momentum": torch.tensor([0.5, -0.1])}, r"momentum: got tensor.*, needs values in \[0, 1\)"),
        ({"momentum": torch.zeros(3)}, r"momentum: got shape \(3,\), needs a number or \(H,\) = \(2,\)"),
        ({"momentum": float("nan")}, "momentum: got NaN"),
        ({"adaptive": ("query",)}, r"adaptive: got \('query',\), needs a collection of names among"),
    ],
)  # fmt: skip
def test_errors_of_switches(change: dict, message: str) -> None:
    x, state = torch.zeros(1, 2, 5, 3), MemoryState.initial(zeros(2))
    with pytest.raises(ValueError, match=message):
        self_modifying_scan(x, x, state, **change)


def test_the_parts_of_a_state_are_of_one_kind() -> None:
    x, state = torch.zeros(1, 2, 5, 3), MemoryState.initial(zeros(1))
    more = MemoryState.initial(zeros(1, query=(torch.zeros(1, 2, 3, 3),)))
    with pytest.raises(ValueError, match=r"state\.base: got the names .*'query'\], needs \['key'"):
        self_modifying_scan(x, x, MemoryState(state.weights, state.snapshots, more.base))
    for momentum, message in (
        ({"keys": ()}, r"state\.momentum\['keys'\]: got 0 layers, needs at most as many as weights"),
        (
            {"key": (torch.zeros(1, 2, 3, 4),)},
            r"state\.momentum\['key'\]\[0\]: got shape \(1, 2, 3, 4\), needs the layer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            self_modifying_scan(x, x, MemoryState(state.weights, state.snapshots, state.base, 0, momentum))

"""The contract of the memory operations: backends equal the token loop, and the loop equals the paper's equations.

Comparisons are in float64 over shapes and switches that hypothesis draws: outputs, the state that goes on, and the
gradient of every tensor that goes in. Step sizes stay where the recurrence itself is stable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestling.memory import MEMORIES, MemoryState, delta_scan, self_modifying_scan
from nestling.memory.state import SCALAR_MEMORIES

torch.set_num_threads(1)
TOLERANCE = 1e-10
Results = dict[str, Tensor]


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def assert_same(results: Results, expected: Results, tolerance: float = TOLERANCE) -> None:
    """Relative to each tensor's norm; the tiny absolute part is for gradients that are zero in exact arithmetic."""
    assert results.keys() == expected.keys()
    for name, right in expected.items():
        assert results[name].shape == right.shape, name
        error, size = (results[name] - right).norm(), right.norm()
        assert error <= tolerance * size + 1e-14, f"{name}: off by {error:.1e}, its norm is {size:.1e}"


def gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> Results:
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {f"gradient of {name}": torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}


def spans(tokens: int, cuts: Iterable[int]) -> list[slice]:
    """Calls that cut `tokens` at `cuts` (any order, taken modulo the length; equal cuts make an empty call)."""
    edges = [0, *sorted(cut % (tokens + 1) for cut in cuts), tokens]
    return [slice(low, high) for low, high in zip(edges, edges[1:], strict=False)]


# --- delta_scan -------------------------------------------------------------------------------------------------------


def delta_arguments(seed: int, batch: int, heads: int, tokens: int, n: int, m: int, based: bool) -> dict[str, Tensor]:
    """Keys of about unit length, gates in (0.74, 1), steps in (0, 0.5)."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "keys": normal(draw, batch, heads, tokens, n, scale=n**-0.5),
        "local_grads": normal(draw, batch, heads, tokens, m),
        "log_alpha": -0.3 * torch.rand(batch, heads, tokens, generator=draw, dtype=torch.float64),
        "eta": 0.5 * torch.rand(batch, heads, tokens, generator=draw, dtype=torch.float64),
        "queries": normal(draw, batch, heads, tokens, n),
        "initial": normal(draw, batch, heads, m, n),
    }
    if based:
        tensors["base"] = normal(draw, batch, heads, m, n)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def run_delta(arguments: dict[str, Tensor], cuts: Iterable[int] = (), **switches: Any) -> Results:
    """Outputs, final weights and every gradient of one call, or of several that hand the weights on."""
    rest = {name: tensor for name, tensor in arguments.items() if name in ("base",)}
    weights, outputs = arguments["initial"], []
    for span in spans(arguments["keys"].shape[2], cuts):
        streams = {name: tensor[:, :, span] for name, tensor in arguments.items() if name not in ("initial", "base")}
        output, weights = delta_scan(**streams, initial=weights, **rest, **switches)
        outputs.append(output)
    joined = torch.cat(outputs, dim=2)
    draw = torch.Generator().manual_seed(99)
    loss = (joined * normal(draw, *joined.shape)).sum() + (weights * normal(draw, *weights.shape)).sum()
    return {"outputs": joined, "final": weights, **gradients(loss, arguments)}


delta_cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 999),
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "tokens": st.one_of(st.integers(0, 40), st.sampled_from([64, 65, 130])),
        "n": st.integers(1, 7),
        "m": st.integers(1, 7),
        "based": st.booleans(),
    }
)
delta_switches = st.fixed_dictionaries(
    {"erase": st.booleans(), "read": st.sampled_from(["before", "after", "boundary"])}
)


@examples(40)
@given(delta_cases, delta_switches, st.sampled_from([None, 1, 2, 3]))
def test_delta_chunked_equals_the_token_loop(case: dict, switches: dict, blocks_per_state: int | None) -> None:
    arguments = delta_arguments(**case)
    expected = run_delta(arguments, backend="reference", **switches)
    assert_same(run_delta(arguments, backend="chunked", blocks_per_state=blocks_per_state, **switches), expected)
    if case["tokens"] == 0:
        assert torch.equal(expected["final"], arguments["initial"])


@examples(15)
@given(delta_cases, st.booleans(), st.sampled_from(["before", "after"]), st.lists(st.integers(0, 999), max_size=3))
def test_delta_any_split_gives_the_same(case: dict, erase: bool, read: str, cuts: list[int]) -> None:
    arguments = delta_arguments(**case)
    whole = run_delta(arguments, erase=erase, read=read)
    assert_same(run_delta(arguments, cuts, erase=erase, read=read), whole)


@pytest.mark.parametrize("log_gate", [float("-inf"), -800.0, -45.0, 0.0])
def test_delta_gates_may_be_shut_or_open(log_gate: float) -> None:
    arguments = delta_arguments(seed=1, batch=1, heads=1, tokens=30, n=4, m=3, based=True)
    gates = arguments["log_alpha"].detach().clone()
    gates[..., ::3] = log_gate
    arguments["log_alpha"] = gates.requires_grad_()
    assert_same(run_delta(arguments, backend="chunked"), run_delta(arguments, backend="reference"))


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_delta_gradcheck(backend: str, based: bool) -> None:
    arguments = delta_arguments(seed=2, batch=1, heads=1, tokens=5, n=3, m=2, based=based)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return delta_scan(**dict(zip(arguments, tensors, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(function, tuple(arguments.values()))


def test_delta_step_is_the_written_formula() -> None:
    arguments = {name: t.detach() for name, t in delta_arguments(5, 1, 1, 1, n=4, m=3, based=True).items()}
    outputs, final = delta_scan(**arguments)
    z, delta, q = (arguments[name][0, 0, 0] for name in ("keys", "local_grads", "queries"))
    alpha, eta = arguments["log_alpha"].exp().item(), arguments["eta"].item()
    before, base = arguments["initial"][0, 0], arguments["base"][0, 0]
    after = base + alpha * (before - base) - eta * torch.outer(before @ z, z) - eta * torch.outer(delta, z)
    assert_same({"outputs": outputs[0, 0, 0], "final": final[0, 0]}, {"outputs": before @ q, "final": after})


# --- self_modifying_scan ----------------------------------------------------------------------------------------------


def memory_arguments(
    seed: int, batch: int, heads: int, tokens: int, width: int, hidden: int, eta_max: float = 0.4
) -> dict[str, Tensor]:
    """x, queries, the ten weight tensors ("key.w1", ...) and the three gate parameters as tensors (H,)."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "x": normal(draw, batch, heads, tokens, width),
        "queries": F.normalize(normal(draw, batch, heads, tokens, width), dim=-1),
    }
    for name in MEMORIES:
        out = 1 if name in SCALAR_MEMORIES else width
        tensors[f"{name}.w1"] = normal(draw, batch, heads, out, hidden, scale=0.5 * hidden**-0.5)
        tensors[f"{name}.w2"] = normal(draw, batch, heads, hidden, width)
    tensors["eta_max"] = torch.full((heads,), eta_max, dtype=torch.float64)
    tensors["eta_bias"] = normal(draw, heads, scale=0.3)
    tensors["alpha_bias"] = 3 + normal(draw, heads, scale=0.3)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def memory_weights(arguments: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (arguments[f"{name}.w1"], arguments[f"{name}.w2"]) for name in MEMORIES}


def scan_calls(
    arguments: Mapping[str, Tensor], cuts: Iterable[int] = (), **switches: Any
) -> tuple[Tensor, MemoryState]:
    state, outputs = MemoryState.initial(memory_weights(arguments)), []
    gates = {name: arguments[name] for name in ("eta_max", "eta_bias", "alpha_bias")}
    for span in spans(arguments["x"].shape[2], cuts):
        x, queries = arguments["x"][:, :, span], arguments["queries"][:, :, span]
        output, state = self_modifying_scan(x, queries, state, **gates, **switches)
        outputs.append(output)
    return torch.cat(outputs, dim=2), state


def run_memory(arguments: dict[str, Tensor], cuts: Iterable[int] = (), **switches: Any) -> Results:
    """Outputs, weights, snapshots and every gradient; the loss looks at all of the results."""
    outputs, state = scan_calls(arguments, cuts, **switches)
    assert state.position == arguments["x"].shape[2]
    results = {"outputs": outputs}
    for part, layers in (("weight", state.weights), ("snapshot", state.snapshots)):
        for name in MEMORIES:
            results[f"{part} {name}.w1"], results[f"{part} {name}.w2"] = layers[name]
    draw = torch.Generator().manual_seed(99)
    loss = torch.stack([(t * normal(draw, *t.shape)).sum() for t in results.values()]).sum()
    return results | gradients(loss, arguments)


memory_cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 999),
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 2),
        "tokens": st.integers(0, 22),
        "width": st.integers(2, 6),
        "hidden": st.integers(1, 6),
    }
)
memory_switches = st.fixed_dictionaries(
    {
        "chunk_size": st.sampled_from([1, 3, 4, 8, 100]),
        "projection_chunk_size": st.sampled_from([None, 1, 4, 5, 16]),
        "objective": st.sampled_from(["l2", "dot"]),
        "erase": st.sampled_from(["all", "first", "last", "none"]),
        "step_size": st.sampled_from(["proximal", "direct"]),
        "read": st.sampled_from(["before", "after", "boundary"]),
        "decay_to": st.sampled_from(["zero", "initial"]),
        "write": st.sampled_from(["all", "last"]),
    }
)


@examples(50)
@given(memory_cases, memory_switches, st.sampled_from([None, 1, 2, 3]))
def test_chunked_equals_the_token_loop(case: dict, switches: dict, blocks_per_state: int | None) -> None:
    arguments = memory_arguments(**case)
    expected = run_memory(arguments, backend="reference", **switches)
    assume(all(bool(right.isfinite().all()) for right in expected.values()))  # plain gradient descent may diverge
    assert_same(run_memory(arguments, backend="chunked", blocks_per_state=blocks_per_state, **switches), expected)
    if case["tokens"] == 0:
        assert all(torch.equal(expected[f"weight {n}.w2"], arguments[f"{n}.w2"]) for n in MEMORIES)


@pytest.mark.parametrize(
    "switches",
    [
        dict(chunk_size=100, projection_chunk_size=70, decay_to="initial"),
        dict(chunk_size=64, read="after", step_size="direct", blocks_per_state=2),
    ],
    ids=str,
)
def test_chunked_equals_the_token_loop_over_many_tokens(switches: dict) -> None:
    """Chunks longer than a block, several blocks a call."""
    arguments = memory_arguments(seed=3, batch=1, heads=1, tokens=135, width=3, hidden=2)
    expected = run_memory(arguments, backend="reference", **switches)
    assert_same(run_memory(arguments, backend="chunked", **switches), expected)


@examples(20)
@given(
    memory_cases,
    memory_switches,
    st.lists(st.integers(0, 999), min_size=1, max_size=3),
    st.sampled_from(["chunked", "chunked", "reference"]),
)
def test_any_split_of_the_tokens_gives_the_same(case: dict, switches: dict, cuts: list[int], backend: str) -> None:
    arguments = memory_arguments(**case)
    whole = run_memory(arguments, backend=backend, **switches)
    assert_same(run_memory(arguments, cuts, backend=backend, **switches), whole)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_numbers_serve_as_gate_parameters(backend: str) -> None:
    arguments = memory_arguments(seed=4, batch=2, heads=2, tokens=9, width=3, hidden=4)
    numbers = dict(eta_max=0.4, eta_bias=-0.2, alpha_bias=2.5)
    tensors = {name: torch.full((2,), value, dtype=torch.float64) for name, value in numbers.items()}
    state = MemoryState.initial(memory_weights(arguments))
    call = [arguments["x"], arguments["queries"], state]
    one, _ = self_modifying_scan(*call, chunk_size=4, backend=backend, **numbers)
    other, _ = self_modifying_scan(*call, chunk_size=4, backend=backend, **tensors)
    assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("switches", [dict(), dict(step_size="direct", read="after", decay_to="initial")], ids=str)
def test_gradcheck(backend: str, switches: dict) -> None:
    arguments = memory_arguments(seed=5, batch=1, heads=1, tokens=4, width=2, hidden=2)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(arguments, tensors, strict=True))
        outputs, state = scan_calls(given, chunk_size=2, projection_chunk_size=3, backend=backend, **switches)
        return (outputs, *(layer for name in MEMORIES for layer in state.weights[name]))

    assert torch.autograd.gradcheck(function, tuple(arguments.values()))


# --- the reference against the equations, with inner gradients from autograd ------------------------------------------


def written_by_autograd(
    layers: tuple[Tensor, Tensor], frozen: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor], k: Tensor, v: Tensor,
    alpha: Tensor, eta: Tensor, skip: bool, switches: Mapping[str, str],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One memory (no batch axes) after one token: its inner loss is differentiated, not the formula of its gradient."""

    def memory(w1: Tensor, w2: Tensor, z: Tensor) -> Tensor:
        inner = w1 @ F.silu(w2 @ z)
        return z + inner if skip else inner

    target = memory(*frozen, v / v.norm())

    def loss(w1: Tensor, w2: Tensor) -> Tensor:
        if switches["objective"] == "dot":
            return -(memory(w1, w2, k) @ target)
        return 0.5 * (memory(w1, w2, k) - target).square().sum()

    # The target is a constant for the inner gradient: the closure holds it, and only w1, w2 are differentiated.
    grad1, grad2 = torch.func.grad(loss, argnums=(0, 1))(*frozen)
    h, eye = F.silu(frozen[1] @ k), torch.eye(k.numel(), dtype=k.dtype)
    proximal = switches["step_size"] == "proximal"
    eta1, eta2 = (eta / (1 + eta * (z @ z)) if proximal else eta for z in (h, k))
    key1 = h if proximal else h / h.norm()
    grad1 = grad1 if proximal else grad1 / h.norm()
    decay1 = alpha * torch.eye(h.numel(), dtype=h.dtype) - eta1 * torch.outer(key1, key1) * (
        switches["erase"] in ("all", "last")
    )
    decay2 = alpha * eye - eta2 * torch.outer(k, k) * (switches["erase"] in ("all", "first"))
    new1, new2 = layers[0] @ decay1 - eta1 * grad1, layers[1] @ decay2 - eta2 * grad2
    if switches["decay_to"] == "initial":
        new1, new2 = new1 + (1 - alpha) * base[0], new2 + (1 - alpha) * base[1]
    return new1, new2 if switches["write"] == "all" else layers[1]


@examples(15)
@given(st.integers(0, 999), memory_switches)
def test_the_reference_follows_the_equations(seed: int, switches: dict) -> None:
    """Four tokens of one row, with chunks of 1 and of 3 among the cases: Eq. 83-93 from scratch."""
    switches = switches | {"chunk_size": 1 + seed % 3, "projection_chunk_size": 1 + seed // 3 % 3}
    tokens = 4
    arguments = {name: t.detach() for name, t in memory_arguments(seed, 1, 1, tokens, width=3, hidden=4).items()}
    outputs, state = scan_calls(arguments, backend="reference", **switches)

    base = {name: tuple(layer[0, 0] for layer in layers) for name, layers in memory_weights(arguments).items()}
    current, frozen, expected = dict(base), dict(base), []
    for t in range(tokens):
        x, query = arguments["x"][0, 0, t], arguments["queries"][0, 0, t]
        read = {name: frozen[name][0] @ F.silu(frozen[name][1] @ x) for name in MEMORIES}
        k, v = x + read["key"], x + read["value"]
        k = k / k.norm()
        eta = arguments["eta_max"] * torch.sigmoid(read["eta"] + arguments["eta_bias"])
        alpha = torch.sigmoid(read["alpha"] + arguments["alpha_bias"])
        before = current["memory"]
        current = {
            name: written_by_autograd(
                current[name], frozen[name], base[name], k, v, alpha, eta, name not in SCALAR_MEMORIES, switches
            )
            for name in MEMORIES
        }
        w1, w2 = {"before": before, "after": current["memory"], "boundary": frozen["memory"]}[switches["read"]]
        expected.append(query + w1 @ F.silu(w2 @ query))
        for name in MEMORIES:
            size = switches["chunk_size" if name == "memory" else "projection_chunk_size"]
            frozen[name] = current[name] if (t + 1) % size == 0 else frozen[name]
    right = {"outputs": torch.stack(expected)} | {f"{n}.w{i + 1}": current[n][i] for n in MEMORIES for i in (0, 1)}
    found = {f"{n}.w{i + 1}": state.weights[n][i][0, 0] for n in MEMORIES for i in (0, 1)}
    assert_same({"outputs": outputs[0, 0]} | found, right)


# --- rows apart, nothing in place, gradients through the writes -------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_rows_never_touch_each_other(backend: str) -> None:
    tokens = 13
    arguments = memory_arguments(seed=6, batch=2, heads=2, tokens=tokens, width=4, hidden=3)
    outputs, state = scan_calls(arguments, chunk_size=5, projection_chunk_size=4, backend=backend)
    perturbed = {}
    for name, tensor in arguments.items():
        perturbed[name] = tensor.detach().clone()
        if tensor.dim() == 4:
            perturbed[name][0] = perturbed[name][0].flip(-1) * 1.7
    others, other_state = scan_calls(perturbed, chunk_size=5, projection_chunk_size=4, backend=backend)
    assert not torch.equal(outputs[0], others[0])
    assert torch.equal(outputs[1], others[1])
    for name in MEMORIES:
        for layer, other in zip(state.weights[name], other_state.weights[name], strict=True):
            assert torch.equal(layer[1], other[1])
    found = gradients(outputs[1].square().sum(), {n: t for n, t in arguments.items() if t.dim() == 4})
    for name, grad in found.items():
        assert grad[0].abs().max() == 0 and grad[1].abs().max() > 0, name


def test_delta_rows_never_touch_each_other() -> None:
    arguments = delta_arguments(seed=6, batch=2, heads=2, tokens=70, n=4, m=3, based=True)
    outputs, final = delta_scan(**arguments)
    perturbed = {name: torch.stack([tensor[0] * 1.1, tensor[1]]).detach() for name, tensor in arguments.items()}
    others, other_final = delta_scan(**perturbed)
    assert not torch.equal(outputs[0], others[0])
    assert torch.equal(outputs[1], others[1]) and torch.equal(final[1], other_final[1])
    for name, grad in gradients(outputs[1].square().sum(), arguments).items():
        assert grad[0].abs().max() == 0, name


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_nothing_is_modified_in_place(backend: str) -> None:
    """Neither what is given nor what was returned changes in a later call or in the backward passes."""
    arguments = memory_arguments(seed=7, batch=1, heads=2, tokens=11, width=3, hidden=4)
    copies = {name: tensor.detach().clone() for name, tensor in arguments.items()}
    gates = {name: arguments[name] for name in ("eta_max", "eta_bias", "alpha_bias")}
    call = dict(chunk_size=4, decay_to="initial", backend=backend, **gates)
    first, state = self_modifying_scan(
        arguments["x"], arguments["queries"], MemoryState.initial(memory_weights(arguments)), **call
    )
    returned = [first, *(layer for part in (state.weights, state.snapshots) for n in MEMORIES for layer in part[n])]
    returned_copies = [t.detach().clone() for t in returned]
    second, _ = self_modifying_scan(arguments["x"], arguments["queries"], state, **call)
    (first.sum() + second.sum()).backward()
    assert all(torch.equal(tensor, copies[name]) and tensor._version == 0 for name, tensor in arguments.items())
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(returned, returned_copies, strict=True))

    delta = delta_arguments(seed=7, batch=1, heads=1, tokens=70, n=3, m=3, based=True)
    copies = {name: tensor.detach().clone() for name, tensor in delta.items()}
    outputs, final = delta_scan(**delta, backend=backend)
    (outputs.sum() + final.sum()).backward()
    assert all(torch.equal(tensor, copies[name]) and tensor._version == 0 for name, tensor in delta.items())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("read", ["before", "after", "boundary"])
def test_the_outer_gradient_reaches_all_ten_weights_through_the_writes(backend: str, read: str) -> None:
    """The loss sees only the third chunk: `memory` could be reached by a read alone, the other four only by writes."""

    def weight_gradients(eta_max: float) -> Results:
        arguments = memory_arguments(seed=8, batch=2, heads=2, tokens=24, width=4, hidden=3, eta_max=eta_max)
        outputs, _ = scan_calls(arguments, chunk_size=8, read=read, backend=backend)
        weights = {f"{n}.{layer}": arguments[f"{n}.{layer}"] for n in MEMORIES for layer in ("w1", "w2")}
        return gradients(outputs[:, :, 16:].square().sum(), weights)

    for name, grad in weight_gradients(eta_max=0.4).items():
        assert (grad.flatten(2).norm(dim=-1) > 1e-6).all(), name
    unwritten = weight_gradients(eta_max=0.0)
    for name in ("key", "value", "eta"):
        assert not unwritten[f"gradient of {name}.w1"].any() and not unwritten[f"gradient of {name}.w2"].any()


# --- memory of the backward pass --------------------------------------------------------------------------------------


def saved_bytes(function: Callable[[], Any]) -> int:
    """What autograd keeps for the backward pass, every storage once."""
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)  # keeps the address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


def saved_by_memory(tokens: int, **switches: Any) -> int:
    arguments = memory_arguments(seed=9, batch=1, heads=1, tokens=tokens, width=8, hidden=8)
    return saved_bytes(lambda: scan_calls(arguments, **switches))


def test_memory_of_the_backward_pass_grows_with_the_number_of_chunks() -> None:
    one_state = 2 * 5 * 2 * 8 * 8 * 8  # weights and snapshots of five memories of two 8 x 8 layers, 8 bytes a number
    token = 2 * 8 * 8  # x and queries
    for chunk in (16, 32):
        few, many = (
            saved_by_memory(tokens, chunk_size=chunk, blocks_per_state=1, backend="chunked") for tokens in (128, 256)
        )
        per_chunk = (many - few) / (128 // chunk)
        assert per_chunk <= one_state + 2 * chunk * token, "one state and the inputs, a chunk"
        assert per_chunk < chunk * one_state / 8, "nothing like a state a token"
    sparse, all_states = (
        saved_by_memory(512, chunk_size=16, blocks_per_state=every, backend="chunked") for every in (8, 1)
    )
    inputs = 512 * token
    assert sparse - inputs < (all_states - inputs) / 4, "keeps a state every eight blocks"


def test_delta_memory_of_the_backward_pass() -> None:
    def saved(tokens: int, **switches: Any) -> int:
        arguments = delta_arguments(seed=9, batch=1, heads=1, tokens=tokens, n=32, m=32, based=False)
        return saved_bytes(lambda: delta_scan(**arguments, **switches))

    one_state, token = 32 * 32 * 8, (3 * 32 + 2) * 8
    assert saved(1024, blocks_per_state=1) - saved(512, blocks_per_state=1) <= 512 * token + 8 * one_state * 1.1
    assert saved(1024, blocks_per_state=4) <= 1024 * token + 4 * one_state * 1.5


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_half_precision_inputs_keep_float32_states(dtype: torch.dtype, tolerance: float, backend: str) -> None:
    """The same rounded inputs in float32 give the same numbers up to the rounding of the outputs."""
    arguments = {n: t.detach().to(dtype) for n, t in memory_arguments(10, 2, 2, 40, width=8, hidden=8).items()}
    outputs, state = scan_calls(arguments, chunk_size=16, backend=backend)
    right, right_state = scan_calls({n: t.float() for n, t in arguments.items()}, chunk_size=16, backend=backend)
    assert outputs.dtype is dtype and right.dtype is torch.float32
    assert torch.equal(outputs, right.to(dtype))
    exact, _ = scan_calls({n: t.double() for n, t in arguments.items()}, chunk_size=16, backend="reference")
    assert (outputs - exact).norm() <= tolerance * exact.norm()
    for name in MEMORIES:
        for layer, right_layer in zip(state.weights[name], right_state.weights[name], strict=True):
            assert layer.dtype is torch.float32 and torch.equal(layer, right_layer)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_delta_half_precision(dtype: torch.dtype, backend: str) -> None:
    arguments = {name: t.detach().to(dtype) for name, t in delta_arguments(11, 1, 2, 20, n=4, m=3, based=True).items()}
    gates = {name: arguments[name].float() for name in ("log_alpha", "eta")}
    outputs, final = delta_scan(**(arguments | gates), backend=backend)
    right, right_final = delta_scan(**{name: t.float() for name, t in arguments.items()}, backend=backend)
    assert outputs.dtype is dtype and final.dtype is torch.float32
    assert torch.equal(outputs, right.to(dtype)) and torch.equal(final, right_final)


def test_autocast_does_not_lower_the_precision_of_the_memories() -> None:
    """Not in the forward pass, and not in a backward pass that runs under it."""
    arguments = {n: t.detach().float() for n, t in memory_arguments(12, 1, 1, 20, width=8, hidden=8).items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    right, _ = scan_calls(leaves, chunk_size=8)
    right_gradients = gradients(right.sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = scan_calls(leaves, chunk_size=8)
        found = gradients(outputs.sum(), leaves)
    assert outputs.dtype is torch.float32 and torch.equal(outputs, right)
    assert all(torch.equal(found[name], grad) for name, grad in right_gradients.items())


# --- errors -----------------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(keys=torch.zeros(2, 3)), r"keys: got \(2, 3\), needs a tensor of four axes \(B, H, T, width\)"),
        (dict(keys=None), "keys: got NoneType, needs"),
        (dict(keys=torch.zeros(1, 2, 5, 3, dtype=torch.int64)), "keys: got dtype torch.int64, needs one of"),
        (dict(local_grads=torch.zeros(1, 2, 4, 2)), r"local_grads: got shape \(1, 2, 4, 2\), needs \(B, H, T, m\) = "),
        (dict(local_grads=torch.zeros(1, 2, 5, 2).half()), "local_grads: got dtype torch.float16, needs torch.float32"),
        (dict(queries=torch.zeros(1, 2, 5, 4)), r"queries: got shape \(1, 2, 5, 4\), needs \(B, H, T, n\) = "),
        (dict(queries=torch.zeros(1, 2, 5, 3, device="meta")), "queries: got device meta, needs cpu"),
        (dict(initial=torch.zeros(1, 2, 3, 3)), r"initial: got shape \(1, 2, 3, 3\), needs \(B, H, m, n\) = "),
        (dict(initial=torch.zeros(1, 2, 2, 3).double()), "initial: got dtype torch.float64, needs torch.float32"),
        (dict(base=torch.zeros(1, 2, 3)), r"base: got shape \(1, 2, 3\), needs \(B, H, m, n\) = "),
        (dict(eta=torch.zeros(1, 2, 5, 1)), r"eta: got shape \(1, 2, 5, 1\), needs \(B, H, T\) = \(1, 2, 5\)"),
        (dict(eta=torch.zeros(1, 2, 5).half()), "eta: got dtype torch.float16, needs torch.float32 or torch.float64"),
        (dict(eta=torch.full((1, 2, 5), NAN)), "eta: got NaN, needs numbers"),
        (dict(log_alpha=torch.full((1, 2, 5), NAN)), "log_alpha: got NaN, needs numbers"),
        (dict(log_alpha=torch.zeros(1, 2, 5, device="meta")), "log_alpha: got device meta, needs cpu"),
        (dict(read="later"), "read: got 'later', needs one of 'before', 'after', 'boundary'"),
        (dict(backend="cuda"), "backend: got 'cuda', needs one of 'auto', 'reference', 'chunked'"),
        (dict(blocks_per_state=0), "blocks_per_state: got 0, needs an integer of at least 1"),
    ],
)  # fmt: skip
def test_delta_errors_name_what_was_given_and_what_is_needed(change: dict, message: str) -> None:
    arguments: dict[str, Any] = {
        "keys": torch.zeros(1, 2, 5, 3),
        "local_grads": torch.zeros(1, 2, 5, 2),
        "log_alpha": torch.zeros(1, 2, 5),
        "eta": torch.zeros(1, 2, 5),
        "queries": torch.zeros(1, 2, 5, 3),
        "initial": torch.zeros(1, 2, 2, 3),
    }
    with pytest.raises(ValueError, match=message):
        delta_scan(**(arguments | change))


def zero_weights(**changes: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    weights = {n: (torch.zeros(1, 2, 1 if n in SCALAR_MEMORIES else 3, 4), torch.zeros(1, 2, 4, 3)) for n in MEMORIES}
    return weights | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 5, 3)), r"x: got \(2, 5, 3\), needs a tensor of four axes \(B, H, T, D\)"),
        (dict(x=torch.zeros(1, 2, 5, 3).long()), "x: got dtype torch.int64, needs one of"),
        (dict(queries=torch.zeros(1, 2, 6, 3)), r"queries: got shape \(1, 2, 6, 3\), needs \(B, H, T, D\) = "),
        (dict(queries=torch.zeros(1, 2, 5, 3).double()), "queries: got dtype torch.float64, needs torch.float32"),
        (dict(queries=torch.zeros(1, 2, 5, 3, device="meta")), "queries: got device meta, needs cpu"),
        (dict(state=zero_weights()), r"state: got dict, needs a MemoryState; see MemoryState.initial"),
        (dict(x=torch.zeros(3, 2, 5, 3), queries=torch.zeros(3, 2, 5, 3)), r"state\S*: got shape \(1, 2, 4, 3\), nee"),
        (dict(x=torch.zeros(1, 2, 5, 6), queries=torch.zeros(1, 2, 5, 6)), r"state\S*: got shape \(1, 2, 4, 3\), nee"),
        (dict(x=torch.zeros(1, 2, 5, 3).half(), queries=torch.zeros(1, 2, 5, 3).half(), state=MemoryState.initial(
            {n: (a.double(), b.double()) for n, (a, b) in zero_weights().items()})),
            r"state\S*: got dtype torch.float64, needs torch.float16 or torch.float32"),
        (dict(state=MemoryState.initial({n: (a.to("meta"), b.to("meta")) for n, (a, b) in zero_weights().items()})),
            r"state\S*: got device meta, needs cpu"),
        (dict(chunk_size=0), "chunk_size: got 0, needs an integer of at least 1"),
        (dict(chunk_size=2.5), "chunk_size: got 2.5, needs an integer"),
        (dict(projection_chunk_size=-1), "projection_chunk_size: got -1, needs an integer of at least 1"),
        (dict(blocks_per_state=0), "blocks_per_state: got 0, needs"),
        (dict(eta_max=NAN), "eta_max: got NaN, needs numbers"),
        (dict(eta_bias=torch.full((2,), NAN)), "eta_bias: got NaN, needs numbers"),
        (dict(alpha_bias=torch.tensor([0.0, NAN])), "alpha_bias: got NaN, needs numbers"),
        (dict(alpha_bias=torch.zeros(3)), r"alpha_bias: got shape \(3,\), needs a number or \(H,\) = \(2,\)"),
        (dict(eta_max=torch.zeros(2, device="meta")), "eta_max: got device meta, needs cpu"),
        (dict(eta_max=torch.ones(2).long()), "eta_max: got dtype torch.int64, needs"),
        (dict(objective="l1"), "objective: got 'l1', needs one of 'l2', 'dot'"),
        (dict(erase="w1"), "erase: got 'w1', needs one of 'all', 'first', 'last', 'none'"),
        (dict(step_size="half"), "step_size: got 'half', needs one of 'proximal', 'direct'"),
        (dict(read="later"), "read: got 'later', needs one of 'before', 'after', 'boundary'"),
        (dict(decay_to="one"), "decay_to: got 'one', needs one of 'zero', 'initial'"),
        (dict(write="first"), "write: got 'first', needs one of 'all', 'last'"),
        (dict(backend="cuda"), "backend: got 'cuda', needs one of 'auto', 'reference', 'chunked'"),
    ],
)  # fmt: skip
def test_errors_name_what_was_given_and_what_is_needed(change: dict, message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 2, 5, 3),
        "queries": torch.zeros(1, 2, 5, 3),
        "state": MemoryState.initial(zero_weights()),
    }
    with pytest.raises(ValueError, match=message):
        self_modifying_scan(**(arguments | change))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"key": (torch.zeros(1), torch.zeros(1))}, r"weights: got the names \['key'\], needs \['key', 'value', 'eta'"),
        (zero_weights(key=(torch.zeros(1, 2, 3, 4), torch.zeros(4, 3))), r"weights\['key'\]\[1\]: got shape \(4, 3\)"),
        (zero_weights(eta=(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3))),
            r"weights\['eta'\]\[0\]: got shape \(1, 2, 3, 4\), needs \(B, H, out, N\) = \(1, 2, 1, 4\)"),
        (zero_weights(value=(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3).double())),
            r"weights\['value'\]: got dtype torch.float64, needs torch.float32"),
    ],
)  # fmt: skip
def test_errors_of_initial_weights(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryState.initial(weights)


@pytest.mark.parametrize("operation", ["delta", "self_modifying"])
def test_a_second_derivative_is_refused_not_wrong(operation: str) -> None:
    x = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    if operation == "delta":
        gates = torch.full((1, 2, 5), -0.1, dtype=torch.float64), torch.full((1, 2, 5), 0.1, dtype=torch.float64)
        outputs, _ = delta_scan(x, x, *gates, x, torch.randn(1, 2, 3, 3, dtype=torch.float64))
    else:
        weights = {name: (w1.double(), w2.double()) for name, (w1, w2) in zero_weights().items()}
        outputs, _ = self_modifying_scan(x, x, MemoryState.initial(weights))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(outputs.sum(), x, create_graph=True)


@pytest.mark.parametrize("read", ["before", "after"])
@pytest.mark.parametrize("shut", [-60.0, -35.0])
def test_float32_keeps_its_digits_behind_shut_gates(read: str, shut: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z, delta, q = (torch.randn(1, 1, 64, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    z = z / z.norm(dim=-1, keepdim=True)
    log_alpha = torch.full((1, 1, 64), -0.05, dtype=torch.float64)
    log_alpha[..., :40:2] = shut
    eta, initial = torch.full((1, 1, 64), 0.5, dtype=torch.float64), torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    exact, _ = delta_scan(z, delta, log_alpha, eta, q, initial, read=read, backend="reference")
    single = (t.float() for t in (z, delta, log_alpha, eta, q, initial))
    outputs, _ = delta_scan(*single, read=read, backend="chunked")
    assert (outputs - exact).norm() < 1e-6 * exact.norm()


def test_an_erase_of_the_other_operation_is_refused() -> None:
    x, gate = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="erase: got 'none', needs True or False"):
        delta_scan(x, x, gate, gate, x, torch.zeros(1, 1, 3, 3), erase="none")  # type: ignore[arg-type]


def test_every_part_of_a_state_is_checked() -> None:
    x = torch.zeros(1, 2, 5, 3)
    good, wide = (
        zero_weights(),
        {n: (a.expand(3, -1, -1, -1), b.expand(3, -1, -1, -1)) for n, (a, b) in zero_weights().items()},
    )
    for part in ("snapshots", "base"):
        state = MemoryState(**{"weights": good, "snapshots": good, "base": good, part: wide})
        with pytest.raises(ValueError, match=rf"state\.{part}\['key'\]\[1\]: got shape \(3, 2, 4, 3\), needs"):
            self_modifying_scan(x, x, state)
    with pytest.raises(ValueError, match="state.position: got -1, needs at least 0"):
        self_modifying_scan(x, x, MemoryState(good, good, good, -1))

"""Titans' long-term memory: the backends agree, and the token loop is gradient descent with momentum and decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory import TitansState, titans_scan

torch.set_num_threads(1)
STREAMS = ("keys", "values", "queries", "log_alpha", "theta", "log_mu")


def arguments(tokens: int, batch: int = 2, heads: int = 2, width: int = 4, hidden: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(batch, heads, tokens, generator=draw, dtype=torch.float64)

    vectors = [normal(batch, heads, tokens, width) for _ in range(3)]
    tensors = {
        "keys": F.normalize(vectors[0], dim=-1),
        "values": vectors[1],
        "queries": F.normalize(vectors[2], dim=-1),
        "log_alpha": -0.2 * uniform(),
        "theta": 0.15 * uniform(),
        "log_mu": -0.1 - uniform(),
        "w1": normal(batch, heads, width, hidden) * 0.5 * hidden**-0.5,
        "w2": normal(batch, heads, hidden, width),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def run(tensors: dict[str, Tensor], cuts: tuple[int, ...] = (), **switches: Any) -> dict[str, Tensor]:
    """Outputs, the whole state and every gradient of one call, or of several that hand the state on."""
    state, outputs = TitansState.initial((tensors["w1"], tensors["w2"])), []
    edges = [0, *cuts, tensors["keys"].shape[2]]
    for low, high in zip(edges, edges[1:], strict=False):
        output, state = titans_scan(*(tensors[name][:, :, low:high] for name in STREAMS), state, **switches)
        outputs.append(output)
    assert state.position == edges[-1]
    results = {"outputs": torch.cat(outputs, dim=2)}
    for part in ("weights", "momentum", "snapshot"):
        results |= {f"{part} {i}": tensor for i, tensor in enumerate(getattr(state, part))}
    draw = torch.Generator().manual_seed(99)
    loss = sum((t * torch.randn(t.shape, generator=draw, dtype=torch.float64)).sum() for t in results.values())
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    zeros = (torch.zeros(()) if grad is None else grad for grad in found)
    return results | {f"gradient of {name}": grad for name, grad in zip(tensors, zeros, strict=True)}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, right in expected.items():
        error, size = (got[name] - right).norm(), right.norm()
        assert error <= tolerance * size + 1e-14, f"{name}: off by {error:.1e}, its norm is {size:.1e}"


@pytest.mark.parametrize("decay_to", ["zero", "initial"])
@pytest.mark.parametrize("read", ["before", "after", "boundary"])
@pytest.mark.parametrize(("tokens", "chunk_size"), [(0, 4), (1, 1), (23, 1), (30, 7), (70, 100)])
def test_chunked_equals_the_token_loop(tokens, chunk_size, read, decay_to):
    tensors, switches = arguments(tokens), {"chunk_size": chunk_size, "read": read, "decay_to": decay_to}
    expected = run(tensors, backend="reference", **switches)
    assert_same(run(tensors, backend="chunked", **switches), expected)
    assert_same(run(tensors, backend="chunked", blocks_per_state=3, **switches), expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cuts", [(1, 2), (8, 8, 25), (15, 39)])
def test_any_split_gives_the_same(cuts, backend):
    tensors, switches = arguments(40), {"chunk_size": 8, "decay_to": "initial", "backend": backend}
    assert_same(run(tensors, cuts, **switches), run(tensors, **switches))


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_the_loop_is_the_papers_rule_with_autograds_gradient(chunk_size):
    """TI Eq. 9-14 with the loss written down and differentiated: S = mu S - theta grad, M = (1 - a) M + S."""
    t = {name: tensor.detach() for name, tensor in arguments(17, batch=1, heads=1).items()}
    weights = [t["w1"][0, 0], t["w2"][0, 0]]
    frozen, surprise, read = weights, [torch.zeros_like(w) for w in weights], []

    def memory(layers: list[Tensor], z: Tensor) -> Tensor:
        return z + layers[0] @ F.silu(layers[1] @ z)

    for i in range(17):
        k, v, q = (t[name][0, 0, i] for name in ("keys", "values", "queries"))
        forget, theta, mu = 1 - t["log_alpha"][0, 0, i].exp(), t["theta"][0, 0, i], t["log_mu"][0, 0, i].exp()
        leaves = [w.clone().requires_grad_() for w in frozen]
        grads = torch.autograd.grad(0.5 * (memory(leaves, k) - v).square().sum(), leaves)
        surprise = [mu * s - theta * g for s, g in zip(surprise, grads, strict=True)]
        weights = [(1 - forget) * w + s for w, s in zip(weights, surprise, strict=True)]
        read.append(memory(weights, q))
        if (i + 1) % chunk_size == 0:
            frozen = weights
    state = TitansState.initial((t["w1"], t["w2"]))
    outputs, state = titans_scan(*(t[name] for name in STREAMS), state, chunk_size=chunk_size, backend="reference")
    torch.testing.assert_close(outputs[0, 0], torch.stack(read), rtol=1e-12, atol=1e-12)
    for got, expected, momentum, s in zip(state.weights, weights, state.momentum, surprise, strict=True):
        torch.testing.assert_close(got[0, 0], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(momentum[0, 0], -s, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    tensors = arguments(5, batch=1, heads=1, width=2, hidden=3)

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        *streams, w1, w2 = given
        outputs, state = titans_scan(*streams, TitansState.initial((w1, w2)), chunk_size=3, decay_to="initial")
        return outputs, *state.weights, *state.momentum

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def test_it_learns_pairs():
    """Four pairs, many times over, at a small step: M(k) becomes v, and momentum gets there in fewer tokens."""
    draw = torch.Generator().manual_seed(0)
    pairs = [F.normalize(torch.randn(1, 1, 4, 8, generator=draw), dim=-1) for _ in range(2)]
    keys, values = (pair.repeat(1, 1, 100, 1) for pair in pairs)
    weights = torch.randn(1, 1, 8, 16, generator=draw) / 16, torch.randn(1, 1, 16, 8, generator=draw)
    open_gate, theta = torch.zeros(1, 1, 400), torch.full((1, 1, 400), 0.02)
    errors = []
    for mu in (0.0, 0.8):
        log_mu = torch.full((1, 1, 400), mu).log()
        _, state = titans_scan(keys, values, keys, open_gate, theta, log_mu, TitansState.initial(weights), chunk_size=4)
        nothing = torch.zeros(1, 1, 4)
        recalled, _ = titans_scan(*pairs, pairs[0], nothing, nothing, nothing, state, read="boundary")
        errors.append((recalled - pairs[1]).norm().item() / pairs[1].norm().item())
    assert errors[1] < 0.02 < errors[0] < 0.7


def test_bfloat16_streams_keep_a_float32_state():
    t = {name: tensor.detach() for name, tensor in arguments(40).items()}
    expected, _ = titans_scan(*(t[name] for name in STREAMS), TitansState.initial((t["w1"], t["w2"])), chunk_size=16)
    narrow = [t[name].to(torch.bfloat16 if name in STREAMS[:3] else torch.float32) for name in STREAMS]
    state = TitansState.initial((t["w1"].bfloat16(), t["w2"].bfloat16()))
    outputs, state = titans_scan(*narrow, state, chunk_size=16)
    assert outputs.dtype == torch.bfloat16 and {w.dtype for w in state.weights} == {torch.float32}
    assert (outputs.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(1, 1, 3, 2)}, r"values: got shape \(1, 1, 3, 2\), needs \(B, H, T, D\)"),
        ({"theta": torch.zeros(1, 1, 2)}, r"theta: got shape \(1, 1, 2\), needs \(B, H, T\)"),
        ({"log_mu": torch.full((1, 1, 3), torch.nan)}, "log_mu: got NaN"),
        ({"log_alpha": torch.zeros(1, 1, 3, dtype=torch.bfloat16)}, "log_alpha: got dtype torch.bfloat16"),
        ({"state": None}, "state: got NoneType, needs a TitansState"),
        ({"chunk_size": 0}, "chunk_size: got 0, needs an integer of at least 1"),
        ({"read": "then"}, "read: got 'then', needs one of"),
    ],
)
def test_wrong_arguments_say_what_is_needed(changes, message):
    weights = torch.zeros(1, 1, 4, 5), torch.zeros(1, 1, 5, 4)
    given: dict[str, Any] = {
        **{name: torch.zeros(1, 1, 3, 4) for name in STREAMS[:3]},
        **{name: torch.zeros(1, 1, 3) for name in STREAMS[3:]},
        "state": TitansState.initial(weights),
    }
    with pytest.raises(ValueError, match=message):
        titans_scan(**given | changes)
    with pytest.raises(ValueError, match=r"weights\[0\]: got shape \(1, 1, 5, 4\), needs \(B, H, D, N\)"):
        TitansState.initial((weights[1], weights[1]))

"""Rules of associative memories against the gradients, minima and models that the paper derives them from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory import delta_scan
from nestling.memory.associative import delta, delta_gradient_descent, hebbian, oja, omega
from nestling.models import build
from nestling.models.attention import attend
from nestling.optim.associative import elementwise_memory, matrix_memory, orthogonality_step, preconditioned_momentum
from nestling.optim.rules import adamw, sgd

ROWS, COLUMNS = 3, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


OBJECTIVES = {
    hebbian: lambda M, k, v: -(M @ k) @ v,
    delta: lambda M, k, v: 0.5 * (M @ k - v).square().sum(),
    oja: lambda M, k, v: 0.5 * (-2 * (M @ k) @ v + (M.mT @ v).square().sum()),
}


@pytest.mark.parametrize("rule", OBJECTIVES, ids=lambda rule: rule.__name__)
def test_a_rule_is_a_gradient_step_on_its_objective(rule) -> None:
    """Each of two rows has a memory, a step and a gate of its own."""
    memory, k, v = draw(2, ROWS, COLUMNS), draw(2, COLUMNS, seed=1), draw(2, ROWS, seed=2)
    eta, alpha = torch.tensor([0.3, 0.7]).double(), torch.tensor([0.9, 1.0]).double()
    new = rule(memory, k, v, eta, alpha)
    for i in range(2):
        gradient = torch.func.grad(OBJECTIVES[rule])(memory[i], k[i], v[i])
        close(new[i], alpha[i] * memory[i] - eta[i] * gradient)


def test_omega_learns_from_a_window() -> None:
    memory, keys, values = draw(ROWS, COLUMNS), draw(5, COLUMNS, seed=1), draw(5, ROWS, seed=2)
    gamma, alpha = torch.rand(5, dtype=torch.float64), number(0.9)

    def loss(M: Tensor) -> Tensor:
        return 0.5 * (gamma * (M @ keys.mT - values.mT).square()).sum()

    close(omega(memory, keys, values, gamma, alpha), alpha * memory - torch.func.grad(loss)(memory))
    one = omega(memory, keys[:1], values[:1], gamma[:1], alpha)
    close(one, delta(memory, keys[0], values[0], gamma[0], alpha))


@pytest.mark.parametrize("rule", [hebbian, delta], ids=lambda rule: rule.__name__)
def test_the_scan_takes_these_steps(rule) -> None:
    keys, values, memory = draw(1, 1, 9, COLUMNS), draw(1, 1, 9, ROWS, seed=1), draw(1, 1, ROWS, COLUMNS, seed=2)
    log_alpha, eta = -draw(1, 1, 9, seed=3).square(), draw(1, 1, 9, seed=4).sigmoid()
    _, final = delta_scan(keys, -values, log_alpha, eta, keys, memory, erase=rule is delta)
    for t in range(9):
        memory = rule(memory, keys[:, :, t], values[:, :, t], eta[:, :, t], log_alpha[:, :, t].exp())
    close(final, memory)


@pytest.mark.parametrize(
    ("name", "rule"), [("linear_attention", hebbian), ("delta_net", delta), ("gated_delta_net", delta)]
)
def test_models_learn_by_these_rules(name, rule) -> None:
    """A mixer written out: q, k and v from slow projections, a write for each token, and the read y_t = M_t q_t."""
    torch.manual_seed(0)
    mixer = build({"name": name, "vocab_size": 9, "width": 8, "layers": 1, "heads": 2}).double().blocks[0].mixer
    x = draw(1, 6, 8)
    taps, channels = mixer.conv.weight.shape
    padded = F.pad((x @ mixer.qkv.weight.mT).mT, (taps - 1, 0))
    z = F.silu(F.conv1d(padded, mixer.conv.weight.mT[:, None], groups=channels)).mT
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in z.split((8, 8, channels - 16), dim=-1))
    if rule is delta:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    log_alpha, beta = mixer.gates(x)
    memory, reads = torch.zeros(1, 2, v.shape[-1], 4).double(), []
    for t in range(6):
        kept = log_alpha[:, :, t, None, None].exp() * memory
        memory = rule(kept, k[:, :, t], v[:, :, t], beta[:, :, t], torch.ones(1, 2).double())
        reads.append(mixer.norm((memory @ q[:, :, t, :, None]).squeeze(-1)).flatten(1))
    read, state = mixer(x, None)
    close(state.memory, memory)
    close(read, (torch.stack(reads, dim=1) * F.silu(x @ mixer.gate.weight.mT)) @ mixer.output.weight.mT)


def test_backpropagation_is_a_memory_of_local_errors() -> None:
    """One step of gradient descent on a layer, from autograd, is the Hebbian rule for x and -grad_y L."""
    weights, x, target = draw(ROWS, COLUMNS), draw(COLUMNS, seed=1), draw(ROWS, seed=2)

    def loss(y: Tensor) -> Tensor:
        return F.softplus(y - target).sum()

    gradient = torch.func.grad(lambda W: loss(W @ x))(weights)
    local = torch.func.grad(loss)(weights @ x)
    close(hebbian(weights, x, -local, number(0.2), number(1)), weights - 0.2 * gradient)


@pytest.mark.parametrize("norm", [1.0, 0.2, 5.0])
def test_delta_gradient_descent_is_the_proximal_minimum(norm: float) -> None:
    """Eq. 56 solved as a linear system, and its gradient there, for inputs of any norm."""
    weights, local, eta = draw(ROWS, COLUMNS), draw(ROWS, seed=2), number(0.7)
    x = norm * F.normalize(draw(COLUMNS, seed=1), dim=0)
    new = delta_gradient_descent(weights, x, local, eta)

    def proximal(W: Tensor) -> Tensor:
        return 0.5 * (W @ x + local).square().sum() + (W - weights).square().sum() / (2 * eta)

    close(torch.func.grad(proximal)(new), torch.zeros_like(weights))
    identity = torch.eye(COLUMNS).double()
    right = torch.outer(-local, x) + weights / eta
    close(new, torch.linalg.solve(torch.outer(x, x) + identity / eta, right, left=False))


@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_the_minimum_without_parameters(window: int | None) -> None:
    """Eq. 62-63: at what attention reads, sum_i s(k_i, q) |v_i - M|^2 over the tokens attended to has no gradient."""
    q, k, v = draw(1, 1, 7, COLUMNS), draw(1, 1, 7, COLUMNS, seed=1), draw(1, 1, 7, ROWS, seed=2)
    read = attend(q, k, v, window)[0, 0]
    for t in range(7):
        seen = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        score = (k[0, 0, seen] @ q[0, 0, t] / COLUMNS**0.5).exp()
        memory = read[t].clone().requires_grad_()
        (score * (v[0, 0, seen] - memory).square().sum(-1)).sum().backward()
        close(memory.grad, torch.zeros(ROWS).double())


def test_momentum_is_a_memory_of_gradients() -> None:
    """Eq. 46-47 from its objective; with P = I, what `sgd` does (Eq. 33-34)."""
    m, g, p = draw(ROWS, COLUMNS), draw(ROWS, COLUMNS, seed=1), draw(ROWS, ROWS, seed=2)
    slope = torch.func.grad(lambda m: ((m @ g.mT) * p).sum())(m)
    close(preconditioned_momentum(m, g, p, 0.3, 0.9), 0.9 * m - 0.3 * slope)

    state, group = {}, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.0}
    m, weights = torch.zeros(ROWS, COLUMNS).double(), draw(ROWS, COLUMNS)
    for step in range(4):
        g = draw(ROWS, COLUMNS, seed=step)
        m = preconditioned_momentum(m, g, torch.eye(ROWS).double(), 0.3, 0.9)
        close(sgd(weights, g, state, group, None), m)


def test_newton_schulz_is_gradient_descent_inside() -> None:
    o, g, identity = draw(COLUMNS, ROWS), draw(COLUMNS, ROWS, seed=1), torch.eye(ROWS).double()

    def apart(o: Tensor) -> Tensor:
        return 0.5 * (o.mT @ o - identity).square().sum() + 0.5 * (o - g).square().sum()

    close(orthogonality_step(o, g, 0.1), o - 0.1 * torch.func.grad(apart)(o))
    # Nothing draws it back to g when that is O itself: a quarter step is then cubic, and ends at the polar factor.
    close(orthogonality_step(o, o, 0.25), 1.5 * o - 0.5 * o @ o.mT @ o)
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    o = g / torch.linalg.norm(g)
    for _ in range(40):
        o = orthogonality_step(o, o, 0.25)
    close(o, left @ right)


def test_adam_is_the_best_memory_of_its_objective() -> None:
    """Eq. 100-105: no gradient at the optimum; the two values P that make it momentum and Adam."""
    gradients, value = draw(6, ROWS, COLUMNS), draw(ROWS, COLUMNS, seed=1)
    m = elementwise_memory(gradients, value, ridge=0.4)

    def loss(m: Tensor) -> Tensor:
        return (m * gradients - value).square().sum() + 0.4 * m.square().sum()

    close(torch.func.grad(loss)(m), torch.zeros_like(m))

    square = gradients.square().sum(0)
    close(elementwise_memory(gradients, square, ridge=0.0), gradients.sum(0))
    # Adam with betas so near 1 that its averages are means: the step is that over sqrt(t) for t gradients.
    state, group = {}, {"lr": 1.0, "betas": (1 - 1e-7, 1 - 1e-7), "eps": 0.0, "weight_decay": 0.0}
    for updates, gradient in enumerate(gradients, start=1):
        state["updates"] = updates
        step = adamw(value, gradient, state, group, None)
    expected = -elementwise_memory(gradients, square.sqrt(), ridge=0.0) / 6**0.5
    torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-7)


def test_adagrad_is_the_same_over_whole_vectors() -> None:
    """Eq. 106-111: read through P = H^1/2, the memory that maps each gradient to 1; along the axes, Adam's again."""
    gradients = draw(6, COLUMNS)
    sizes, directions = torch.linalg.eigh(gradients.mT @ gradients + 0.4 * torch.eye(COLUMNS).double())
    root = directions @ torch.diag(sizes.sqrt()) @ directions.mT
    inside = torch.linalg.solve(root, matrix_memory(gradients, ridge=0.4))

    def loss(n: Tensor) -> Tensor:
        return (gradients @ n - 1).square().sum() + 0.4 * n.square().sum()

    close(torch.func.grad(loss)(inside), torch.zeros(COLUMNS).double())
    axes = torch.cat([torch.diag(draw(COLUMNS, seed=seed)) for seed in (1, 2)])
    close(matrix_memory(axes, 0.0), elementwise_memory(axes, axes.square().sum(0).sqrt(), 0.0))

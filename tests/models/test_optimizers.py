"""Optimizers against plain loops over their equations (arXiv:2512.24695), in float64, and their settings."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nestling.models import build
from nestling.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    Levels,
    Muon,
    is_matrix,
    matrix_groups,
    newton_schulz,
    watch_inputs,
)

STEPS = 23
RATE = 0.01
SHAPES = {"wide": (3, 5), "tall": (6, 2), "stack": (2, 3, 4), "vector": (4,)}


def gradients(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, *shape, generator=generator, dtype=torch.float64) * 0.3


def moved(make, shape, grads, **group):
    """Where an optimizer takes a parameter that begins at ones."""
    parameter = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = make([{"params": [parameter], **group}])
    path = []
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        path.append(parameter.detach().clone())
    return torch.stack(path)


def followed(rule, shape, grads):
    """The same for a reference: a generator that takes gradients and weights and gives changes."""
    weights, path = torch.ones(shape, dtype=torch.float64), []
    steps = rule(shape)
    next(steps)
    for grad in grads:
        weights = weights + steps.send((grad, weights))
        path.append(weights)
        next(steps)
    return torch.stack(path)


def orthogonal(matrix, steps=5):
    """Newton-Schulz of one matrix as it is written down, without regard to the smaller side."""
    if matrix.dim() > 2:
        return torch.stack([orthogonal(each, steps) for each in matrix])
    x = matrix / (torch.linalg.norm(matrix) + 1e-7)
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


def m3_reference(shape, betas=(0.9, 0.8, 0.7), alpha=0.6, f=4, eps=1e-3, decay=0.1, mode="ema"):
    """Algorithm 1, with the list of all gradients in the place of a block's buffer."""
    b1, b2, b3 = betas
    m1, m2, v, o2 = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    seen = []
    while True:
        g, weights = yield
        t = len(seen) + 1
        if (t - 1) % f == 0 and t > 1:
            block = sum(seen[-f:])
            m2 = m2 + b3 * block if mode == "literal" else b3 * m2 + (1 - b3) * block / f
            o2 = orthogonal(m2)
        m1 = m1 + b1 * g if mode == "literal" else b1 * m1 + (1 - b1) * g
        o1 = orthogonal(m1)
        square = (o1 if mode == "adamuon" else g) ** 2
        v = v + b2 * square if mode == "literal" else b2 * v + (1 - b2) * square
        second = v if mode == "literal" else v / (1 - b2**t)
        seen.append(g)
        yield -RATE * ((o1 + alpha * o2) / (second.sqrt() + eps) + decay * weights)


def muon_reference(shape, beta=0.9, nesterov=True, decay=0.1):
    m = torch.zeros(shape, dtype=torch.float64)
    while True:
        g, weights = yield
        m = beta * m + (1 - beta) * g
        direction = beta * m + (1 - beta) * g if nesterov else m
        yield -RATE * (0.2 * max(shape[-2:]) ** 0.5 * orthogonal(direction) + decay * weights)


def delta_momentum_reference(shape, alpha=0.8, decay=0.1):
    """Eq. 49, matrix by matrix; a vector's gradient is the key."""
    m = torch.zeros(shape, dtype=torch.float64)

    def one(m, g):
        if g.dim() > 2:
            return torch.stack([one(*pair) for pair in zip(m, g, strict=True)])
        eta = RATE / (1 + RATE * torch.linalg.norm(g) ** 2)
        if g.dim() == 1:
            return alpha * m - eta * (m @ g) * g - RATE * g
        return m @ (alpha * torch.eye(g.shape[1]).double() - eta * g.T @ g) - RATE * g

    while True:
        g, weights = yield
        m = one(m, g)
        yield m - RATE * decay * weights


def deep_momentum_reference(shape, betas=(0.8, 0.9), hidden=3, eps=1e-3, decay=0.1):
    """Eq. 50 by autograd, from the MLP and its inner loss alone."""
    slopes = torch.linspace(-1, 1, hidden).double().view(-1, *[1] * len(shape))
    out, turn = torch.zeros(2, hidden, *shape, dtype=torch.float64)
    v, t = torch.zeros(shape, dtype=torch.float64), 0

    def memory(out, turn, u):
        return (out * torch.sigmoid((slopes + turn) * u)).sum(0)

    while True:
        g, weights = yield
        t += 1
        v = betas[1] * v + (1 - betas[1]) * g**2
        u = g / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        layers = [layer.clone().requires_grad_() for layer in (out, turn)]
        slope = torch.autograd.grad((memory(*layers, u) * u).sum(), layers)
        out, turn = (betas[0] * a - (1 - betas[0]) * b for a, b in zip((out, turn), slope, strict=True))
        yield RATE * (memory(out, turn, u) - decay * weights)


M3_SETTINGS = {"betas": (0.9, 0.8, 0.7), "slow_weight": 0.6, "slow_period": 4, "eps": 1e-3, "weight_decay": 0.1}
RULES = {
    **{
        f"m3 {mode}": (partial(M3, lr=RATE, mode=mode, **M3_SETTINGS), partial(m3_reference, mode=mode))
        for mode in ("ema", "literal", "adamuon")
    },
    "muon": (partial(Muon, lr=RATE, momentum=0.9, weight_decay=0.1), muon_reference),
    "muon plain": (
        partial(Muon, lr=RATE, momentum=0.9, nesterov=False, weight_decay=0.1),
        partial(muon_reference, nesterov=False),
    ),
    "delta": (partial(DeltaMomentum, lr=RATE, momentum=0.8, weight_decay=0.1), delta_momentum_reference),
    "deep": (
        partial(DeepMomentum, lr=RATE, betas=(0.8, 0.9), hidden=3, eps=1e-3, weight_decay=0.1),
        deep_momentum_reference,
    ),
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in RULES for shape in SHAPES if shape != "vector" or name in ("delta", "deep")],
)
def test_every_optimizer_is_its_equations(name, shape):
    make, reference = RULES[name]
    grads = gradients(SHAPES[shape])
    torch.testing.assert_close(
        moved(make, SHAPES[shape], grads), followed(reference, SHAPES[shape], grads), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("shape", ["vector", "wide"])
@pytest.mark.parametrize(
    ("make", "betas"),
    [(partial(M3, lr=RATE, betas=(0.8, 0.9, 0.7)), (0.8, 0.9)), (partial(Muon, lr=RATE), (0.9, 0.95))],
)
def test_what_is_no_matrix_moves_by_adamw(make, betas, shape):
    grads = gradients(SHAPES[shape])
    adamw = moved(partial(torch.optim.AdamW, lr=RATE, betas=betas, weight_decay=0.0), SHAPES[shape], grads)
    torch.testing.assert_close(moved(make, SHAPES[shape], grads, matrix=False), adamw)


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (2, 8, 3)])
def test_newton_schulz_takes_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(matrix, 5))
    assert 0.6 < values.min() and values.max() < 1.25
    product = newton_schulz(matrix, 5) @ matrix.mT  # the directions stay: X M^T is symmetric and positive
    torch.testing.assert_close(product, product.mT)
    assert torch.linalg.eigvalsh(product).min() > -1e-12


def test_the_slow_momentum_waits_for_a_whole_block():
    grads = gradients((3, 5))
    alone = moved(partial(M3, lr=RATE, slow_period=6, slow_weight=0.0), (3, 5), grads)
    both = moved(partial(M3, lr=RATE, slow_period=6, slow_weight=1.0), (3, 5), grads)
    assert torch.equal(alone[:6], both[:6])
    assert not torch.allclose(alone[6], both[6])


def test_literal_steps_are_inverse_to_the_gradients():
    grads = gradients((3, 5))
    make = partial(M3, lr=RATE, mode="literal", eps=1e-12)
    small, large = (moved(make, (3, 5), grads * scale) - 1 for scale in (1.0, 10.0))
    torch.testing.assert_close(small, large * 10, rtol=1e-5, atol=1e-8)


def test_an_m3_level_moves_on_summed_gradients():
    grads = gradients((3, 5))[:20]
    level = moved(partial(Levels, lr=RATE, optimizer="m3", slow_period=2), (3, 5), grads, period=4)
    alone = moved(partial(M3, lr=RATE, slow_period=2), (3, 5), grads.view(5, 4, 3, 5).sum(1))
    torch.testing.assert_close(level[3::4], alone)
    assert torch.equal(level[4], level[6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [M3, Muon, DeltaMomentum, DeepMomentum, DeltaGradientDescent])
def test_a_saved_state_goes_on_to_the_bit(make, dtype):
    model = nn.Linear(4, 3, dtype=dtype)
    watch_inputs(model)
    optimizer = make(model.parameters(), lr=RATE)
    x = torch.randn(30, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))

    def train(model, optimizer, inputs):
        for row in inputs:
            optimizer.zero_grad()
            model(row).square().sum().backward()
            optimizer.step()
        return model.weight.detach().clone()

    train(model, optimizer, x[:15])
    weights, saved = deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())
    end = train(model, optimizer, x[15:])
    model.load_state_dict(weights)
    again = make(model.parameters(), lr=5.0)
    again.load_state_dict(saved)
    assert torch.equal(train(model, again, x[15:]), end)


# Delta Gradient Descent


def delta_step(weight, inputs, deltas, eta, scale=1.0):
    """sum_n eta'_n (s W x_n + delta_n) x_n^T, a loop over n."""
    step = torch.zeros_like(weight)
    for x, delta in zip(inputs, deltas, strict=True):
        step += eta / (1 + eta * x @ x) * torch.outer(scale * weight @ x + delta, x)
    return step


def layer_and_data(tokens=6):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    return layer, torch.randn(tokens, 4).double(), torch.randn(tokens, 3).double()


def test_one_token_is_the_exact_minimum():
    """argmin_W 1/2 |W x - u|^2 + 1/(2 eta) |W - W_t|^2 with u = -grad_y L (Eq. 56), solved as a linear system."""
    layer, (x,), (target,) = layer_and_data(1)
    watch_inputs(layer)
    optimizer = DeltaGradientDescent([{"params": [layer.weight]}, {"params": [layer.bias]}], lr=0.7)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    delta = 2 * (layer(x) - target).detach()
    (layer(x) - target).square().sum().backward()
    optimizer.step()
    u, eye = -delta, torch.eye(4).double()
    exact = torch.linalg.solve(torch.outer(x, x) + eye / 0.7, torch.outer(u, x) + before / 0.7, left=False)
    torch.testing.assert_close(layer.weight.detach(), exact)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.7 * delta)  # plain gradient descent


@pytest.mark.parametrize("mean", [True, False])
def test_a_batch_is_the_mean_or_the_sum_of_its_tokens(mean):
    layer, x, target = layer_and_data()
    watch_inputs(layer, mean=mean)
    optimizer = DeltaGradientDescent(layer.parameters(), lr=0.3)
    before = layer.weight.detach().clone()
    deltas = 2 * (layer(x) - target).detach()
    loss = (layer(x.view(2, 3, 4)).view(6, 3) - target).square().sum(-1)
    (loss.mean() if mean else loss.sum()).backward()
    optimizer.step()
    step = delta_step(before, x, deltas, 0.3)  # deltas of single tokens
    torch.testing.assert_close(layer.weight.detach(), before - (step / 6 if mean else step))


def test_accumulation_and_a_changing_rate():
    """Three passes of a mean loss divided by three are one pass over all; the rate is the one of the backward pass."""
    layer, x, target = layer_and_data()
    other = deepcopy(layer)
    watch_inputs(layer, accumulation=3)
    watch_inputs(other)
    pair = [DeltaGradientDescent(each.parameters(), lr=0.3) for each in (layer, other)]
    for optimizer in pair:
        optimizer.param_groups[0]["lr"] = 0.1
    for rows in range(0, 6, 2):
        ((layer(x[rows : rows + 2]) - target[rows : rows + 2]).square().sum(-1).mean() / 3).backward()
    (other(x) - target).square().sum(-1).mean().backward()
    before = other.weight.detach().clone()
    deltas = 2 * (other(x) - target).detach()
    for optimizer in pair:
        optimizer.step()
    torch.testing.assert_close(layer.weight, other.weight)
    torch.testing.assert_close(other.weight.detach(), before - delta_step(before, x, deltas, 0.1) / 6)


def test_the_gradient_of_the_input_is_untouched():
    layer, x, _ = layer_and_data()
    plain = deepcopy(layer)
    watch_inputs(layer)
    DeltaGradientDescent(layer.parameters(), lr=0.3)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    layer(a).square().sum().backward()
    plain(b).square().sum().backward()
    assert torch.equal(a.grad, b.grad) and torch.equal(layer.bias.grad, plain.bias.grad)
    assert not torch.allclose(layer.weight.grad, plain.weight.grad)


def test_recomputed_activations_change_nothing():
    layer, x, _ = layer_and_data()
    watch_inputs(layer)
    DeltaGradientDescent(layer.parameters(), lr=0.3)
    gradients = []
    for forward in (layer, lambda inputs: checkpoint(layer, inputs, use_reentrant=False)):
        layer.zero_grad()
        forward(x).square().sum().backward()
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_matrix_that_nobody_watches_is_refused():
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) whose inputs nobody watches, needs nestling.optim.watch_inp"):
        DeltaGradientDescent(layer.parameters(), lr=0.1)
    assert DeltaGradientDescent([{"params": layer.parameters(), "matrix": False}], lr=0.1)


def test_a_layer_whose_forward_pass_is_passed_by_is_found():
    layer = nn.Linear(4, 3)
    watch_inputs(nn.Sequential(layer))
    DeltaGradientDescent(layer.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="weight of layer '0' got a gradient that has not gone through"):
        (torch.ones(4) @ layer.weight.mT).sum().backward()


@pytest.mark.parametrize("after_descent", [False, True])
def test_watching_changes_nothing_for_other_rules(after_descent):
    layer, x, _ = layer_and_data()
    plain = deepcopy(layer)
    watch_inputs(layer)
    if after_descent:
        DeltaGradientDescent(layer.parameters(), lr=0.1)
        M3(layer.parameters(), lr=0.1)
    for each in (layer, plain):
        each(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)


# Groups and settings


def test_matrix_groups():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    model.memories = nn.ParameterDict({"w1": nn.Parameter(torch.zeros(2, 3, 4))})
    matrices, others = matrix_groups(model, lr=0.1)
    assert [p.shape for p in matrices["params"]] == [(4, 4), (2, 3, 4)]
    assert {p.shape for p in others["params"]} == {(5, 4), (4,), (5,)}
    assert (matrices["matrix"], others["matrix"], others["lr"]) == (True, False, 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(M3, lr=-1.0), "lr of level 'M3': got -1.0, needs a number of at least 0"),
        (
            partial(M3, lr=0.1, betas=(0.9, 0.9)),
            r"betas of level 'M3': got \(0.9, 0.9\), needs three numbers in \[0, 1",
        ),
        (partial(M3, lr=0.1, slow_period=0), "slow_period of level 'M3': got 0, needs an integer of at least 1"),
        (partial(M3, lr=0.1, mode="printed"), "got 'printed', needs one of ema, literal, adamuon"),
        (partial(Muon, lr=0.1, momentum=1.0), r"momentum of level 'Muon': got 1.0, needs a number in \[0, 1\)"),
        (partial(Muon, lr=0.1, nesterov=1), "needs True or False"),
        (partial(DeltaMomentum, lr=float("nan")), "lr of level 'DeltaMomentum': got nan"),
        (partial(DeepMomentum, lr=0.1, hidden=1.5), "got 1.5, needs an integer of at least 1"),
        (partial(Levels, ns_step=3), "ns_step: no setting of any update rule, needs one of betas, eps, hidden"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2, 2))])


def test_a_group_has_the_settings_of_its_own_rule():
    slow, fast = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    levels = Levels(
        [{"params": [slow], "name": "slow", "optimizer": "m3"}, {"params": [fast], "betas": (0.5, 0.6)}], eps=1e-4
    )
    assert levels.param_groups[0]["betas"] == (0.95, 0.99, 0.9)
    assert levels.param_groups[1]["betas"] == (0.5, 0.6)
    assert [group["eps"] for group in levels.param_groups] == [1e-4, 1e-4]
    assert "slow_period" not in levels.param_groups[1]


@pytest.mark.parametrize("make", [M3, Muon, DeltaMomentum])
def test_a_shard_is_not_taken_for_a_vector(make):
    """As ZeRO does it: the parameters of a group are replaced by a flat shard of them."""
    optimizer = make([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    shard = nn.Parameter(torch.ones(2))
    shard.grad = torch.ones(2)
    optimizer.param_groups[0]["params"] = [shard]
    with pytest.raises(RuntimeError, match="none of the parameters it was made with, such as a flat shard of ZeRO"):
        optimizer.step()


@pytest.mark.parametrize("make", [M3, Muon])
def test_names_tell_embeddings_and_heads_from_matrices(make):
    model = build({"name": "transformer", "vocab_size": 31, "width": 16, "layers": 1, "heads": 2})
    by_names, by_groups = make(model.named_parameters(), 0.1), make(matrix_groups(model), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    by_names.step()
    assert {name for name, p in model.named_parameters() if "exp_avg" in by_names.state[p]} == {
        name for name, p in model.named_parameters() if not is_matrix(name, p)
    }
    moved = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter, value in zip(model.parameters(), start, strict=True):
        parameter.data.copy_(value)
    by_groups.step()
    for parameter, value in zip(model.parameters(), moved, strict=True):
        assert torch.equal(parameter, value)

"""The recurrent baselines against their own published equations, token by token, and models of equal size."""

import pytest
import torch
import torch.nn.functional as F

from nestling.models import build
from nestling.models.config import (
    MODEL_CONFIGS,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    HopeConfig,
    LstmConfig,
    Mamba2Config,
    TransformerConfig,
)
from nestling.models.delta_net import DeltaNet, GatedDeltaNet
from nestling.models.fast_weights import Decay, fast_weight_scan
from nestling.models.mamba2 import Mamba2
from nestling.models.parameters import match_parameters, parameter_count

RECURRENT = ("delta_net", "gated_delta_net", "linear_attention", "mamba2", "lstm")


def published_loop(queries, keys, values, log_alpha, beta, initial, erase):
    """Eq. 10 of arXiv:2412.06464 as printed: the gate in front of the whole bracket."""
    memory, outputs = initial, []
    identity = torch.eye(keys.shape[-1], dtype=keys.dtype)
    for t in range(keys.shape[2]):
        k, v = keys[:, :, t, :, None], values[:, :, t, :, None]
        alpha, step = log_alpha[:, :, t, None, None].exp(), beta[:, :, t, None, None]
        bracket = identity - step * k @ k.mT if erase else identity
        memory = memory @ (alpha * bracket) + step * v @ k.mT
        outputs.append((memory @ queries[:, :, t, :, None]).squeeze(-1))
    return torch.stack(outputs, dim=2), memory


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize(("tokens", "shut"), [(1, 0.0), (70, 0.0), (150, 0.1)])
def test_the_scan_is_the_published_equation(erase, tokens, shut):
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, values, initial = draw(2, 3, tokens, 5), draw(2, 3, tokens, 4), draw(2, 3, 4, 5)
    keys = F.normalize(draw(2, 3, tokens, 5), dim=-1)
    # Some gates are all but shut: 1 / alpha is then e^50.
    closed = torch.rand(2, 3, tokens, generator=generator) < shut
    log_alpha = F.logsigmoid(draw(2, 3, tokens) + 2).masked_fill(closed, -50.0)
    beta = 2 * torch.sigmoid(draw(2, 3, tokens))
    inputs = [tensor.requires_grad_() for tensor in (queries, keys, values, log_alpha, beta, initial)]
    weights = draw(2, 3, tokens, 4), draw(2, 3, 4, 5)
    results = []
    for scan in (fast_weight_scan, published_loop):
        outputs, final = scan(*inputs, erase=erase)
        loss = (outputs * weights[0]).sum() + (final * weights[1]).sum()
        results.append((outputs, final, *torch.autograd.grad(loss, inputs)))
    for ours, published in zip(*results, strict=True):
        torch.testing.assert_close(ours, published, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shut", [-20.0, -50.0, -70.0, -1e4])
def test_shut_gates_keep_their_gradients_in_float32(shut):
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(1, 2, 150, 8, generator=generator), dim=-1)
    values, initial = torch.randn(1, 2, 150, 4, generator=generator), torch.randn(1, 2, 4, 8, generator=generator)
    log_alpha = torch.full((1, 2, 150), -0.1)
    log_alpha[:, :, ::7], log_alpha[:, 1, 40:] = shut, shut
    inputs = [t.requires_grad_() for t in (keys, values, log_alpha, torch.full((1, 2, 150), 0.5), initial)]
    results = []
    for scan, dtype in ((fast_weight_scan, torch.float32), (published_loop, torch.float64)):
        outputs, final = scan(*(t.to(dtype) for t in (keys, *inputs)), erase=True)
        gradients = torch.autograd.grad(outputs.square().sum() + final.sum(), inputs)
        results.append((outputs.double(), final.double(), *gradients))
    for ours, published in zip(*results, strict=True):
        torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-4)


def test_mamba2_is_its_published_block():
    torch.manual_seed(0)
    config = Mamba2Config(vocab_size=9, width=16, heads=4, state_width=6)
    mixer = Mamba2(config, 2).double()
    with torch.no_grad():
        mixer.skip.normal_()
    x = torch.randn(2, 90, 16, dtype=torch.float64)

    z, xbc, dt = mixer.into(x).split((32, 32 + 12, 4), dim=-1)
    padded = F.pad(xbc.mT, (3, 0))
    xbc = F.silu(F.conv1d(padded, mixer.conv.weight.mT.unsqueeze(1), groups=44)).mT
    inputs, b, c = xbc.split((32, 6, 6), dim=-1)
    dt = F.softplus(dt + mixer.decay.dt_bias)
    h, outputs = torch.zeros(2, 4, 8, 6, dtype=torch.float64), []
    for t in range(90):
        now = inputs[:, t].unflatten(-1, (4, 8))
        decay = torch.exp(-mixer.decay.A_log.exp() * dt[:, t])
        h = decay[..., None, None] * h + (dt[:, t, :, None] * now).unsqueeze(-1) * b[:, t, None, None, :]
        outputs.append((h @ c[:, t, None, :, None]).squeeze(-1) + mixer.skip[:, None] * now)
    read = torch.stack(outputs, dim=1).flatten(2) * F.silu(z)
    normed = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + 1e-6) * mixer.norm.weight

    ours, state = mixer(x, None)
    torch.testing.assert_close(ours, mixer.output(normed), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.memory, h, rtol=1e-10, atol=1e-12)


def test_the_decay_starts_in_mamba2s_range():
    torch.manual_seed(0)
    decay = Decay(500)
    log_alpha, dt = decay(torch.zeros(1, 500, 1))
    assert 1e-3 * 0.99 <= dt.min() < 2e-3 and 0.08 < dt.max() <= 0.1 * 1.01
    rate = -log_alpha / dt
    assert 0.99 <= rate.min() < 1.5 and 15 < rate.max() <= 16.01


@pytest.mark.parametrize(("allow", "low", "high"), [(False, 0.0, 1.0), (True, 0.0, 2.0)])
def test_negative_eigenvalues_are_a_switch(allow, low, high):
    config = DeltaNetConfig(width=32, heads=4, allow_neg_eigval=allow)
    log_alpha, beta = DeltaNet(config, 2).gates(5 * torch.randn(2, 200, 32))
    assert low <= beta.min() and 0.95 * high < beta.max() <= high and not log_alpha.any()


def test_gated_delta_net_forgets_and_delta_net_does_not():
    mixer = GatedDeltaNet(GatedDeltaNetConfig(width=32, heads=4), 2)
    x = torch.randn(2, 20, 32)
    log_alpha, beta = mixer.gates(x)
    dt = F.softplus((x @ mixer.rate.weight.mT) + mixer.decay.dt_bias)
    torch.testing.assert_close(log_alpha, (-mixer.decay.A_log.exp() * dt).mT)
    torch.testing.assert_close(beta, torch.sigmoid(x @ mixer.beta.weight.mT).mT)
    assert (log_alpha < 0).all()


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_empty_and_single_tokens(name, dtype):
    torch.manual_seed(0)
    model = build({"name": name, "vocab_size": 11, "width": 16, "layers": 2, "heads": 2, "dtype": dtype})
    text = torch.randint(0, 11, (2, 9))
    whole, _ = model(text)
    state, pieces = None, []
    for piece in text.split((1, 0, 8), dim=1):
        logits, state = model(piece, state)
        assert logits.shape == (*piece.shape, 11) and logits.dtype == getattr(torch, dtype)
        pieces.append(logits)
    tolerance = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=tolerance, atol=tolerance)
    if name != "lstm":
        assert {block.memory.dtype for block in state} == {torch.float32}


@pytest.mark.parametrize("name", RECURRENT)
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    model = build({"name": name, "vocab_size": 11, "width": 16, "layers": 2, "heads": 2})
    text = torch.randint(0, 11, (2, 30))
    F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_forget_gate_of_an_lstm_starts_open():
    cells = build(LstmConfig(vocab_size=11, width=8, layers=1, heads=1)).blocks[0].mixer.cells
    torch.testing.assert_close((cells.bias_ih_l0 + cells.bias_hh_l0).view(4, 8)[1], torch.ones(8))
    torch.testing.assert_close(cells.weight_hh_l0[:8] @ cells.weight_hh_l0[:8].mT, torch.eye(8))


@pytest.mark.parametrize("name", MODEL_CONFIGS)
@pytest.mark.parametrize("tie_head", [False, True])
def test_a_count_is_that_of_the_model(name, tie_head):
    config = MODEL_CONFIGS[name](vocab_size=31, width=16, layers=2, heads=2, tie_head=tie_head)
    assert parameter_count(config) == sum(p.numel() for p in build(config).parameters())


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_models_are_made_equal(name):
    target = HopeConfig(vocab_size=257)
    config = MODEL_CONFIGS[name](vocab_size=257, width=64, layers=1, heads=4)
    matched = match_parameters(config, target)
    wanted = parameter_count(target)
    assert abs(sum(p.numel() for p in build(matched).parameters()) - wanted) <= 0.005 * wanted
    assert (matched.layers, matched.heads, config.width) == (1, 4, 64)
    assert match_parameters(config, wanted) == matched
    assert match_parameters(matched, matched) == matched


def test_widths_keep_their_proportions():
    matched = match_parameters(TransformerConfig(vocab_size=257, width=64, mlp_width=256), 5_000_000)
    assert 3.8 < matched.mlp_width / matched.width < 4.2
    matched = match_parameters(HopeConfig(vocab_size=257, level_widths=[100, 300]), 5_000_000)
    assert 2.9 < matched.level_widths[1] / matched.level_widths[0] < 3.1 and matched.width > 300


def test_what_cannot_be_equal_is_refused():
    with pytest.raises(ValueError, match=r"hope with 2 layers.*needs 500,000 within 0\.00%"):
        match_parameters(HopeConfig(vocab_size=257, level_widths=[]), 500_000, tolerance=1e-6)
    with pytest.raises(ValueError, match="comes to .* parameters at width 8, needs 1,000"):
        match_parameters(TransformerConfig(vocab_size=257), 1000)
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        parameter_count(LstmConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "mamba2", "inner_width": 30}, r"needs a multiple of model\.heads=4"),
        ({"name": "mamba2", "state_width": 0}, "model.state_width: got 0, needs at least 1"),
        ({"name": "delta_net", "conv_width": 0}, "model.conv_width: got 0, needs at least 1"),
        ({"name": "gated_delta_net", "mlp_width": 0}, "model.mlp_width: got 0, needs at least 1"),
        ({"name": "lstm", "hidden_width": 0}, "model.hidden_width: got 0, needs at least 1"),
    ],
)
def test_a_wrong_configuration_says_what_is_needed(config, message):
    with pytest.raises(ValueError, match=message):
        build({"vocab_size": 11, "width": 32, "heads": 4, **config})

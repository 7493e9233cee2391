"""Each model beside a forward pass written out from its weights, each setting beside what it has to change."""

import pytest
import torch
import torch.nn.functional as F

from nestling.memory import MEMORIES, MemoryState, memory_gates, self_modifying_scan
from nestling.models import build
from nestling.models.cms import Level
from nestling.models.hope import mixers, retention_biases, set_chunk_size
from nestling.optim import COMPONENTS, Levels

SKELETON = {"vocab_size": 61, "width": 32, "layers": 1, "heads": 2, "dtype": "float64"}
#: Strong writes and two chunk sizes that do not divide each other, so that every switch shows in 30 tokens.
HOPE = {"name": "hope", "chunk_size": 8, "projection_chunk_size": 12, "eta_bias": -1.0, "level_widths": [24, 40]}
TRANSFORMER = {"name": "transformer", "rope_base": 100.0, "mlp_width": 24}
#: Fields of the configuration that the operation takes as they are.
PASSED_ON = "chunk_size projection_chunk_size eta_bias objective erase step_size read decay_to write".split()
SHAPES = [
    {},
    {"conv_width": 2},
    {"memory_width": 24},
    {"tie_head": True},
    {"level_widths": []},
    {"level_variant": "nested"},
]
SWITCHES = [
    {"chunk_size": 16},
    {"projection_chunk_size": 5},
    {"projection_chunk_size": None},
    {"eta_max": 2.0},
    {"eta_bias": -2.0},
    {"alpha_bias": 1.5},
    {"horizons": [4.0, 64.0]},
    {"objective": "dot"},
    {"erase": "none"},
    {"step_size": "direct"},
    {"read": "after"},
    {"read": "boundary"},
    {"decay_to": "zero"},
    {"write": "all"},
    {"write": "all", "erase": "first"},
    {"write": "all", "erase": "all"},
]


def tiny(**config):
    """A model whose every weight, the norms' too, is off its initial value."""
    torch.manual_seed(0)
    model = build({**SKELETON, **config}).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(rows=2, count=30):
    return torch.randint(0, 61, (rows, count), generator=torch.Generator().manual_seed(0))


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def silu(x):
    return x / (1 + (-x).exp())


def heads(x):
    return x.unflatten(-1, (SKELETON["heads"], -1)).transpose(1, 2)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def weights(model):
    """The weights of the only block, by their name within it."""
    prefix = "blocks.0."
    return {name.removeprefix(prefix): w for name, w in model.state_dict().items() if name.startswith(prefix)}


def head(model, x):
    return rms(x, model.norm.weight) @ model.head.weight.T


def memory_inputs(model, text):
    """Inputs and queries (B, H, T, D) of the memories, and the state before the first token."""
    w = weights(model)
    x = rms(model.embedding.weight[text], w["norm.weight"])
    taps, width = w["mixer.conv.weight"].shape
    padded = F.pad(x.mT, (taps - 1, 0))
    convolved = silu(F.conv1d(padded, w["mixer.conv.weight"].T[:, None], groups=width).mT)
    inputs, queries = (unit(heads(convolved @ w[f"mixer.{name}.weight"].T)) for name in ("input", "query"))
    first = {
        name: tuple(w[f"mixer.memories.{name}_{layer}"].expand(len(text), -1, -1, -1) for layer in ("w1", "w2"))
        for name in MEMORIES
    }
    return inputs, queries, MemoryState.initial(first)


def reference_scan(config, inputs, queries, state, writes=True):
    gates = {"eta_max": config.eta_max if writes else 0.0, "alpha_bias": retention_biases(config).double()}
    passed_on = {name: getattr(config, name) for name in PASSED_ON}
    return self_modifying_scan(inputs, queries, state, backend="reference", **gates, **passed_on)


def written_out_hope(model, text):
    w, x = weights(model), model.embedding.weight[text]
    read, _ = reference_scan(model.config, *memory_inputs(model, text))
    gate = silu(rms(x, w["norm.weight"]) @ w["mixer.gate.weight"].T)
    x = x + (rms(read, w["mixer.norm.weight"]).transpose(1, 2).flatten(2) * gate) @ w["mixer.output.weight"].T
    for level in range(len(model.config.level_widths)):
        norm, into, out = (w[f"feed_forward.{level}.{name}.weight"] for name in ("norm", "into", "out"))
        x = x + silu(rms(x, norm) @ into.T) @ out.T
    return head(model, x)


def rotate(x, base):
    """Token t turned by t * base^(-2i / D) in plane i, which features i and i + D / 2 span."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * base ** -(torch.arange(half).double() / half)
    turned = torch.complex(*x.split(half, dim=-1)) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def written_out_transformer(model, text):
    w, x = weights(model), model.embedding.weight[text]
    q, k, v = map(heads, (rms(x, w["norm.weight"]) @ w["mixer.qkv.weight"].T).chunk(3, dim=-1))
    q, k = (rotate(t, model.config.rope_base) for t in (q, k))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).exp().tril()
    mixed = scores / scores.sum(-1, keepdim=True) @ v
    x = x + mixed.transpose(1, 2).flatten(2) @ w["mixer.output.weight"].T
    norm, into, out = (w[f"feed_forward.0.{name}.weight"] for name in ("norm", "into", "out"))
    gate, value = (rms(x, norm) @ into.T).chunk(2, dim=-1)
    return head(model, x + (silu(gate) * value) @ out.T)


@pytest.mark.parametrize("change", SHAPES + SWITCHES, ids=str)
def test_hope_is_its_equations(change):
    model = tiny(**{**HOPE, **change})
    torch.testing.assert_close(model(tokens())[0], written_out_hope(model, tokens()), rtol=1e-10, atol=1e-10)


def test_the_transformer_is_its_equations():
    model = tiny(**TRANSFORMER)
    # The model's angles are in float32 whatever its dtype.
    torch.testing.assert_close(model(tokens())[0], written_out_transformer(model, tokens()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("change", SWITCHES, ids=str)
def test_every_switch_changes_the_logits(change):
    usual, changed = (tiny(**config)(tokens())[0] for config in (HOPE, {**HOPE, **change}))
    assert (usual - changed).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_levels_are_applied_and_listed_fastest_first(variant):
    model, applied = tiny(**{**HOPE, "layers": 2, "level_variant": variant}), []
    for part in model.modules():
        if isinstance(part, Level):
            part.register_forward_hook(lambda level, *_: applied.append(level))
    model(tokens())
    assert [level.into.out_features for level in applied] == [24, 40, 24, 40]
    for number, listed in enumerate(model.level_parameters()):
        own = [p for level in applied[number::2] for p in level.parameters()]
        assert list(map(id, listed)) == list(map(id, own))


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize(("chunk_size", "projections"), [(8, None), (8, 12), (12, 8), (64, 4)])
def test_the_gate_log_is_the_mean_of_every_tokens_gates(chunk_size, projections, writes):
    model = tiny(**{**HOPE, "chunk_size": chunk_size, "projection_chunk_size": projections})
    text, split = tokens(), 18  # in the middle of a chunk of each size
    (mixer,) = mixers(model)
    mixer.gate_log, mixer.writes = [], writes
    _, state = model(text[:, :split])
    model(text[:, split:], state)

    config, gates = model.config, []
    inputs, queries, memory = memory_inputs(model, text)
    limit, bias = config.eta_max if writes else 0.0, retention_biases(config).double()
    for x, q in zip(inputs.split(1, 2), queries.split(1, 2), strict=True):
        gates.append(torch.stack(memory_gates(x, memory, limit, config.eta_bias, bias)))
        _, memory = reference_scan(config, x, q, memory, writes)
    expected = [torch.cat(part, -1).flatten(1).mean(1).tolist() for part in (gates[:split], gates[split:])]
    counts = [2 * split, 2 * (text.shape[1] - split)]
    assert mixer.gate_log == [pytest.approx((*means, n), rel=1e-10) for means, n in zip(expected, counts, strict=True)]
    assert writes or [eta for eta, *_ in mixer.gate_log] == [0, 0]


def test_another_chunk_size_is_one_for_both_memories():
    model, text = tiny(**{**HOPE, "projection_chunk_size": 24}), tokens()
    usual = model(text)[0]
    set_chunk_size(model, 16)
    built = tiny(**{**HOPE, "chunk_size": 16, "projection_chunk_size": None})
    assert torch.equal(model(text)[0], built(text)[0])
    set_chunk_size(model, None)
    assert torch.equal(model(text)[0], usual)


@pytest.mark.parametrize("optimizer", COMPONENTS)
def test_without_a_gradient_only_weight_decay_moves(optimizer):
    before = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    parameter = torch.nn.Parameter(before.clone())
    parameter.grad = torch.zeros_like(before)
    Levels([parameter], lr=0.2, weight_decay=0.5, optimizer=optimizer).step()
    torch.testing.assert_close(parameter.data, before * (1 - 0.2 * 0.5))

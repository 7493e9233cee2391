"""Every option of attention beside attention written out from the weights, token by token, and what a window bounds."""

import math

import pytest
import torch
import torch.nn.functional as F

from nestling.models import build
from nestling.models.attention import rotary_frequencies
from nestling.models.config import AttentionConfig
from nestling.models.continuum import Continuum

SIZES = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 4, "mlp_width": 24, "rope_base": 100.0}
ATTENTION = {**SIZES, "name": "hope_attention", "conv_width": 0, "dtype": "float64"}
LLAMA3 = [8.0, 1.0, 4.0, 64.0]
OPTIONS = [
    {},
    {"kv_heads": 2},
    {"kv_heads": 1},
    {"head_dim": 12},
    {"heads": 5, "head_dim": 6},
    {"qkv_bias": True},
    {"qk_norm": True},
    {"window": 1},
    {"window": 7},
    {"rope_scaling": LLAMA3},
    {"norm_eps": 0.1},
    {"conv_width": 3},
    {"kv_heads": 2, "head_dim": 12, "qkv_bias": True, "qk_norm": True, "window": 7, "rope_scaling": LLAMA3},
]


def tiny(**changes):
    """A model whose every weight, the norms' too, is off its initial value."""
    torch.manual_seed(0)
    model = build({**ATTENTION, **changes}).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(rows=2, count=40):
    return torch.randint(0, 61, (rows, count), generator=torch.Generator().manual_seed(0))


def stretched(frequency, factor, low, high, length):
    """Llama 3.1's rule for one frequency, case by case."""
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotated(x, config):
    """Each token's pairs of features (i, i + D / 2) turned by its position times their frequency."""
    half, out = x.shape[-1] // 2, torch.empty_like(x)
    for i in range(half):
        frequency = config.rope_base ** (-2 * i / x.shape[-1])
        if config.rope_scaling:
            frequency = stretched(frequency, *config.rope_scaling)
        for t in range(x.shape[0]):
            cos, sin = math.cos(t * frequency), math.sin(t * frequency)
            out[t, i] = cos * x[t, i] - sin * x[t, i + half]
            out[t, i + half] = sin * x[t, i] + cos * x[t, i + half]
    return out


def written_out(model, text):
    """Logits (T, V) of one row."""
    c, w = model.config, dict(model.named_parameters())
    width, x = c.head_dim or c.width // c.heads, w["embedding.weight"][text]

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    for layer in range(c.layers):
        own = {name.removeprefix(f"blocks.{layer}."): p for name, p in w.items() if name.startswith(f"blocks.{layer}.")}
        own = {name.replace("mixer.mixer", "mixer"): p for name, p in own.items()}
        read = rms(x, own["norm.weight"])
        if c.conv_width:
            taps = own["mixer.conv.weight"]
            padded = torch.cat([torch.zeros_like(read[: len(taps) - 1]), read])
            read = F.silu(sum(padded[i : i + len(read)] * tap for i, tap in enumerate(taps)))
        qkv = read @ own["mixer.qkv.weight"].T + own.get("mixer.qkv.bias", 0.0)
        groups, heads = c.kv_heads or c.heads, []
        for head in range(c.heads):
            group = head * groups // c.heads
            q, k, v = (
                qkv[:, place * width :][:, :width] for place in (head, c.heads + group, c.heads + groups + group)
            )
            if c.qk_norm:
                q, k = rms(q, own["mixer.query_norm.weight"]), rms(k, own["mixer.key_norm.weight"])
            q, k, rows = rotated(q, c), rotated(k, c), []
            for t in range(len(text)):
                seen = slice(0 if c.window is None else max(0, t + 1 - c.window), t + 1)
                rows.append(torch.softmax(k[seen] @ q[t] / width**0.5, 0) @ v[seen])
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, -1) @ own["mixer.output.weight"].T
        gate, value = (rms(x, own["feed_forward.0.norm.weight"]) @ own["feed_forward.0.into.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * value) @ own["feed_forward.0.out.weight"].T
    return rms(x, w["norm.weight"]) @ w["head.weight"].T


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_attention_is_its_equations_however_the_text_is_split(change):
    model, text = tiny(**change), tokens()
    whole = model(text)[0]
    # The model's angles are in float32 whatever its dtype.
    torch.testing.assert_close(whole, torch.stack([written_out(model, row) for row in text]), rtol=0, atol=5e-6)
    for splits in ((1, 1, 38), (5, 3, 7, 25), (39, 1)):
        state, pieces = model.initial_state(2), []
        for piece in text.split(splits, dim=1):
            logits, state = model(piece, state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", OPTIONS[1:], ids=str)
def test_every_option_changes_the_logits(change):
    usual, changed = (tiny(**some)(tokens())[0] for some in ({}, change))
    assert (usual - changed).abs().max() > 1e-3


def test_gradients_through_shared_heads_and_a_window():
    model, text = tiny(kv_heads=2, window=7, layers=1).requires_grad_(True), tokens(1, 12)
    gradients = []
    for logits in (model(text)[0][0], written_out(model, text[0])):
        gradients.append(torch.autograd.grad(logits.square().mean(), list(model.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_a_window_bounds_the_cache():
    model, sizes = tiny(window=7), []
    state = None
    for piece in tokens(1, 40).split((16, 1, 1, 20, 2), dim=1):
        _, state = model(piece, state)
        sizes.append([part.untyped_storage().nbytes() for block in state for part in block[:2]])
    assert sizes == [[4 * 6 * 8 * 8] * 4] * 5  # heads, tokens, features, bytes of a float64
    assert [block.position for block in state] == [40, 40]


@pytest.mark.parametrize("width", [64, 128])
def test_llama_3_stretches_long_wavelengths_only(width):
    config = AttentionConfig(heads=1, width=width, rope_base=5e5, rope_scaling=[8, 1, 4, 8192])
    exact = [stretched(5e5 ** (-2 * i / width), 8, 1, 4, 8192) for i in range(width // 2)]
    torch.testing.assert_close(rotary_frequencies(config).double(), torch.tensor(exact).double(), rtol=1e-5, atol=0)
    plain = rotary_frequencies(AttentionConfig(heads=1, width=width, rope_base=5e5))
    assert torch.equal(rotary_frequencies(config)[: width // 8], plain[: width // 8])
    assert (plain / rotary_frequencies(config))[-1] == 8


def test_one_mlp_a_layer_is_the_transformer():
    model, plain = tiny(), build({**SIZES, "name": "transformer", "dtype": "float64"})
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens())[0], plain(tokens())[0])
    assert model.level_parameters() == []


def test_levels_of_whole_layers():
    model = build({**ATTENTION, "layers": 3, "level_layers": [[2, 0], [1]]})
    names = {id(p): name for name, p in model.named_parameters()}
    parts = ("norm", "into", "out")
    assert [[names[id(p)] for p in level] for level in model.level_parameters()] == [
        [f"blocks.{layer}.feed_forward.0.{part}.weight" for layer in level for part in parts] for level in ([2, 0], [1])
    ]


def test_the_chain_of_levels_is_listed_fastest_first():
    model = build({**ATTENTION, "mlp_width": None, "level_widths": [24, 40]})
    assert [[p.shape[0] for p in level if p.dim() == 2 and p.shape[1] == 32] for level in model.level_parameters()] == [
        [24, 24],
        [40, 40],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "3 heads of keys do not divide model.heads=4"),
        ({"window": 0}, "model.window: got 0, needs at least 1"),
        ({"head_dim": 7}, "heads of 7 are odd"),
        ({"rope_scaling": [8.0]}, "model.rope_scaling: got .8.0., needs .factor"),
        ({"rope_scaling": [8.0, 4.0, 1.0, 64.0]}, "low_freq_factor < high_freq_factor"),
        ({"norm_eps": 0.0}, "model.norm_eps: got 0.0, needs more than 0"),
        ({"conv_width": -1}, "model.conv_width: got -1"),
        ({"heads": 5}, "do not divide model.width=32"),
        ({"level_layers": [[0], [0]]}, "needs each layer from 0 to 1 at most once"),
        ({"level_layers": [[2]]}, "needs each layer from 0 to 1 at most once"),
        ({"level_layers": [[0]], "mlp_width": None}, "model.level_layers: got .0., needs model.mlp_width"),
        ({"level_variant": "independent"}, "one MLP a layer .model.mlp_width. needs sequential"),
    ],
)
def test_what_cannot_be_built(change, message):
    with pytest.raises(ValueError, match=message):
        build({**ATTENTION, **change})


@pytest.mark.parametrize("drive", ["stream", "meta"])
def test_levels_of_whole_layers_move_while_the_model_reads(drive):
    options = {"kv_heads": 2, "qkv_bias": True, "qk_norm": True, "window": 7}
    model, text = tiny(**options, level_layers=[[0], [1]]), tokens()
    still, moving = (Continuum(model, [4, 8], rates, drive=drive) for rates in ([0.0, 0.0], [0.5, 0.2]))
    assert torch.equal(still(text)[0], model(text)[0])
    whole, state = moving(text)
    assert state.updates == (9, 4) and (whole - model(text)[0]).abs().max() > 1e-3
    first, state = moving(text[:, :17])
    torch.testing.assert_close(torch.cat([first, moving(text[:, 17:], state)[0]], 1), whole, rtol=1e-10, atol=1e-12)

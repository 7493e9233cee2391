"""HOPE with each switch of the ablation (Table 6): still a model under the contract; the switch does what it says."""

import pytest
import torch
import torch.nn.functional as F

from nestling.memory import memory_gates
from nestling.models import HopeConfig, build
from nestling.models.hope import mixers, set_chunk_size

SKELETON = {"name": "hope", "vocab_size": 61, "width": 32, "layers": 2, "heads": 2, "dtype": "float64"}
#: Strong writes and two chunk sizes that do not divide each other.
USUAL = {"chunk_size": 8, "projection_chunk_size": 12, "eta_bias": -1.0, "level_widths": [24]}
PROJECTIONS = ["key", "value", "query", "eta", "alpha"]
#: The rows of Table 6 beside HOPE itself, and what else the memories can be.
SWITCHES = {
    "w/o DGD": {"erase": "none"},
    "momentum": {"momentum": 0.8, "eta_bias": -2.0},
    "w/o weight decay": {"retention": False},
    "w/o CMS": {"level_widths": []},
    "w/o inner projection k": {"static": ["query", "key"]},
    "w/o inner projection v": {"static": ["query", "value"]},
    "inner projection q": {"static": []},
    "w/o inner projection eta": {"static": ["query", "eta"]},
    "w/o inner projection alpha": {"static": ["query", "alpha"]},
    "static projections": {"static": PROJECTIONS},
    "matrix": {"memory": "matrix"},
    "matrix, query, momentum": {"memory": "matrix", "static": ["alpha"], "momentum": 0.5, "write": "all"},
    "all": {"static": [], "momentum": 0.5, "write": "all", "erase": "all", "retention": False},
    "no convolution": {"conv_width": 0},
    "quiet projections": {"projection_gain": 0.1},
}
switches = pytest.mark.parametrize("change", SWITCHES.values(), ids=SWITCHES)


def tiny(**changes):
    torch.manual_seed(0)
    return build({**SKELETON, **USUAL, **changes})


def tokens(rows=2, count=40):
    return torch.randint(0, 61, (rows, count), generator=torch.Generator().manual_seed(0))


def next_token_loss(model, text):
    return F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())


@switches
def test_any_split_causal_and_rows_apart(change):
    model, text = tiny(**change), tokens()
    with torch.no_grad():
        whole, _ = model(text)
        state, pieces = model.initial_state(2), []
        for piece in text.split((1, 18, 21), dim=1):
            logits, state = model(piece, state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(model(text[1:])[0], whole[1:], rtol=1e-10, atol=1e-12)
        changed = text.clone()
        changed[:, 25:] = (changed[:, 25:] + 1) % 61
        torch.testing.assert_close(model(changed)[0][:, :25], whole[:, :25], rtol=0, atol=1e-12)


@switches
def test_the_switch_changes_the_logits(change):
    usual, changed = (tiny(**config)(tokens())[0] for config in ({}, change))
    assert (usual - changed).abs().max() > 1e-4


@switches
def test_the_outer_gradient_reaches_every_parameter(change):
    model = tiny(**change)
    next_token_loss(model, tokens()).backward()
    for name, parameter in model.named_parameters():
        # A gate that is always 1 has a memory that nothing asks.
        reached = "alpha" not in name or change.get("retention", True)
        assert torch.isfinite(parameter.grad).all() and bool(parameter.grad.any()) == reached, name


@switches
def test_what_is_static_is_read_and_never_written(change):
    model = tiny(**change)
    _, states = model(tokens())
    for mixer, state in zip(mixers(model), states, strict=True):
        written = {
            name
            for name, layers in state.memory.weights.items()
            if not torch.equal(layers[0], state.memory.base[name][0])
        }
        still = {*mixer.config.static, *([] if mixer.config.retention else ["alpha"])}
        assert written == {*PROJECTIONS, "memory"} - still
        assert ("query" in state.memory.weights) == ("query" not in mixer.config.static)
        assert set(state.memory.momentum) == (written if mixer.config.momentum else set())


@switches
def test_without_writes_nothing_moves(change):
    model = tiny(**change)
    for layer in mixers(model):
        layer.writes = False
    for state in model(tokens())[1]:
        for name, layers in state.memory.weights.items():
            for now, first in zip(layers, state.memory.base[name], strict=True):
                torch.testing.assert_close(now, first, rtol=1e-13, atol=0)


@pytest.mark.parametrize("change", ["static projections", "matrix, query, momentum", "all", "w/o inner projection eta"])
def test_the_gate_log_is_the_mean_of_every_tokens_gates(change):
    model, text = tiny(**SWITCHES[change], layers=1), tokens(1, 20)
    (mixer,) = mixers(model)
    with torch.no_grad():
        mixer.gate_log = []
        model(text)
        logged, mixer.gate_log = mixer.gate_log, None
        state, gates = model.initial_state(1), []
        x = model.blocks[0].norm(model.embedding(text))
        convolved = x if mixer.conv is None else mixer.conv(x, state[0].tail)[0]
        inputs = F.normalize(mixer._heads(mixer.input(convolved)), dim=-1)
        for t in range(20):
            biases = mixer.config.eta_max, mixer.config.eta_bias, mixer.alpha_bias.double()
            gates.append(torch.stack(memory_gates(inputs[:, :, t : t + 1], state[0].memory, *biases)))
            _, state = model(text[:, t : t + 1], state)
    assert logged == [pytest.approx([*torch.cat(gates, -1).flatten(1).mean(1).tolist(), 20], rel=1e-10)]
    assert mixer.config.retention or logged[0][1] == 1


@switches
def test_another_chunk_size_for_a_while(change):
    model, text = tiny(**change), tokens(1, 30)
    with torch.no_grad():
        usual = model(text)[0]
        set_chunk_size(model, 5)
        built = tiny(**{**change, "chunk_size": 5, "projection_chunk_size": None})
        assert torch.equal(model(text)[0], built(text)[0])
        set_chunk_size(model, None)
        assert torch.equal(model(text)[0], usual)


def test_a_static_projection_costs_the_same_parameters():
    def count(**changes):
        return sum(parameter.numel() for parameter in tiny(**changes).parameters())

    usual = count()
    for name in ("w/o inner projection k", "w/o inner projection eta", "static projections", "w/o weight decay"):
        assert count(**SWITCHES[name]) == usual
    memory = 2 * 2 * 16 * 16  # two heads, two layers of 16 x 16
    assert count(static=[]) == usual + SKELETON["layers"] * memory


def test_the_defaults_are_the_model_of_before():
    """Names and shapes of a default block's parameters: checkpoints of earlier versions load."""
    names = {name.removeprefix("blocks.0.mixer.") for name in tiny().state_dict() if name.startswith("blocks.0.mixer")}
    memories = {f"memories.{n}_{w}" for n in ("key", "value", "eta", "alpha", "memory") for w in ("w1", "w2")}
    linear = {f"{name}.weight" for name in ("conv", "input", "query", "gate", "norm", "output")}
    assert names == memories | linear


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_memories_start_at_the_scale_that_is_asked_for(memory):
    torch.manual_seed(0)
    config = {"width": 256, "heads": 4, "memory": memory, "memory_gain": 2.0, "projection_gain": 0.5, "static": []}
    (mixer,) = mixers(build({**SKELETON, **config, "layers": 1}))
    for name in mixer.names:
        layers = [mixer.memories[f"{name}_{layer}"] for layer in mixer.layers]
        z = F.normalize(torch.randn(4, 64, 500, dtype=torch.float64), dim=1)
        # The root mean square of silu at unit scale.
        hidden, size = (z, 1.0) if memory == "matrix" else (F.silu(layers[1] @ z), 0.6)
        norm = (layers[0] @ hidden).square().sum(1).mean().sqrt().item()
        assert norm == pytest.approx(size * (2.0 if name == "memory" else 0.5), rel=0.25), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"static": ["memory"]},
            r"model.static: got \['memory'\], needs different names of key, value, query, eta, al",
        ),
        ({"static": ["key", "key"]}, "model.static: got .*, needs different names"),
        ({"memory": "vector"}, "model.memory: got 'vector', needs one of mlp, matrix"),
        ({"memory": "matrix", "memory_width": 8}, "matrix memories have no hidden layer; leave it out"),
        ({"momentum": 1.0}, r"model.momentum: got 1.0, needs a value in \[0, 1\)"),
        ({"projection_gain": 0.0}, "model.projection_gain: got 0.0, needs more than 0"),
        ({"conv_width": -1}, r"model.conv_width: got -1, needs at least 0 \(no convolution\)"),
    ],
)
def test_a_wrong_configuration_says_what_is_needed(config, message):
    with pytest.raises(ValueError, match=message):
        HopeConfig(**config)

"""The contract of every model (causal, streaming at any split, rows apart), and what HOPE's memories owe their name."""

import pytest
import torch
import torch.nn.functional as F

from nestling.memory import MEMORIES, MemoryState
from nestling.models import MODEL_CONFIGS, HopeConfig, build
from nestling.models.hope import mixers, retention_biases, set_chunk_size
from nestling.models.sampling import generate

TINY = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 2}
NAMES = tuple(MODEL_CONFIGS)


def tiny(name, **changes):
    torch.manual_seed(0)
    return build({"name": name, "dtype": "float64", **TINY, **changes})


def tokens(rows, count, seed=0):
    return torch.randint(0, 61, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("splits", [(1, 1, 98), (37, 27, 36), (64, 36), (99, 1)])
def test_any_split_gives_the_same_logits(name, splits):
    model, text = (
        tiny(name, **({"chunk_size": 16, "projection_chunk_size": 24} if name == "hope" else {})),
        tokens(2, 100),
    )
    whole, _ = model(text)
    state, pieces = model.initial_state(2), []
    for piece in text.split(splits, dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_causal(name):
    model, text = tiny(name), tokens(1, 80)
    changed = text.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % 61
    before, after = model(text)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :50], after[:, :50], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 50:], after[:, 50:])


@pytest.mark.parametrize("name", NAMES)
def test_rows_never_see_each_other(name):
    model, text = tiny(name), tokens(3, 70)
    alone = torch.cat([model(row[None])[0] for row in text])
    torch.testing.assert_close(model(text)[0], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_train_and_eval_are_one_function(name):
    model, text = tiny(name), tokens(2, 40)
    assert torch.equal(model.train()(text)[0], model.eval()(text)[0])


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_no_gradient(name):
    model, text = tiny(name), tokens(2, 40)
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model(text)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-10, atol=1e-14)


def test_a_tied_head_is_the_embedding():
    model = tiny("transformer", tie_head=True)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "hoppe"}, "needs one of " + ", ".join(MODEL_CONFIGS)),
        ({"name": "hope", "widht": 3}, "did you mean model.width"),
        ({"name": "hope", "vocab_size": None}, "vocab_size"),
        ({"name": "hope", "heads": 3}, "do not divide model.width=32"),
        ({"name": "hope", "erase": "some"}, "needs one of all, first, last, none"),
        ({"name": "hope", "chunk_size": 0}, "model.chunk_size: got 0, needs at least 1"),
        ({"name": "hope", "horizons": [5, 3]}, "1 < shortest <= longest"),
        ({"name": "transformer", "width": 6}, "even width / heads"),
    ],
)
def test_a_wrong_configuration_says_what_is_needed(config, message):
    with pytest.raises(ValueError, match=message):
        build({**TINY, **config})


def test_tokens_are_checked():
    with pytest.raises(ValueError, match=r"needs int64 of shape \(B, T\)"):
        tiny("hope")(torch.zeros(2, 3))


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_the_outer_gradient_reaches_every_memory(chunk_size):
    model, text = tiny("hope", chunk_size=chunk_size), tokens(2, 100)
    F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten()).backward()
    for layer in mixers(model):
        for name in MEMORIES:
            for part in ("w1", "w2"):
                assert layer.memories[f"{name}_{part}"].grad.norm() > 0, (name, part)


@pytest.mark.parametrize("head_width", [16, 32, 64])
def test_memories_hold_what_they_learnt(head_width):
    torch.manual_seed(0)
    model = build({"name": "hope", "vocab_size": 257, "width": 2 * head_width, "layers": 2, "heads": 2})
    with torch.no_grad():
        _, state = model(torch.randint(0, 257, (1, 4096)))
    for block in state:
        for name in MEMORIES:
            for now, first in zip(block.memory.weights[name], block.memory.base[name], strict=True):
                assert 0.3 <= (now.norm() / first.norm()).item() <= 3, name
            assert not torch.equal(block.memory.weights[name][0], block.memory.base[name][0])


def test_a_memory_that_decays_to_zero_does_not():
    torch.manual_seed(0)
    literal = {"erase": "all", "write": "all", "decay_to": "zero", "alpha_bias": 4, "eta_bias": 0}
    model = build({"name": "hope", "vocab_size": 257, "width": 64, "layers": 1, "heads": 2, **literal})
    with torch.no_grad():
        _, (state,) = model(torch.randint(0, 257, (1, 4096)))
    assert state.memory.weights["memory"][0].norm() < 0.01 * state.memory.base["memory"][0].norm()


def test_writes_off_leaves_the_memories_alone():
    model, text = tiny("hope"), tokens(1, 100)
    on, state = model(text)
    assert (state[0].memory.weights["memory"][0] - state[0].memory.base["memory"][0]).norm() > 0
    for layer in mixers(model):
        layer.writes = False
    off, state = model(text)
    assert torch.equal(state[0].memory.weights["memory"][0], state[0].memory.base["memory"][0])
    assert not torch.allclose(on, off)


def test_bfloat16_keeps_states_in_float32():
    torch.manual_seed(0)
    model = build({"name": "hope", **TINY, "dtype": "bfloat16"})
    logits, state = model(tokens(2, 70))
    assert logits.dtype == torch.bfloat16
    assert {layer.alpha_bias.dtype for layer in mixers(model)} == {torch.float32}
    assert {w.dtype for block in state for layers in block.memory.weights.values() for w in layers} == {torch.float32}
    wide = build({"name": "hope", **TINY})
    wide.load_state_dict(model.state_dict())
    reference = wide(tokens(2, 70))[0]
    assert (logits.float() - reference).norm() < 0.05 * reference.norm()


def test_retention_horizons_spread_over_the_heads():
    alpha = torch.sigmoid(retention_biases(HopeConfig(heads=4, horizons=[16, 2048])))
    torch.testing.assert_close(1 / (1 - alpha), torch.tensor([16.0, 80.635, 406.37, 2048.0]), rtol=1e-2, atol=0)


def test_another_chunk_size_for_a_while():
    model, text = tiny("hope"), tokens(1, 100)
    usual = model(text)[0]
    set_chunk_size(model, 16)
    assert not torch.allclose(model(text)[0], usual)
    set_chunk_size(model, None)
    assert torch.equal(model(text)[0], usual)


@pytest.mark.parametrize("name", NAMES)
def test_sampling_follows_the_whole_sequence(name):
    model = tiny(name).eval()
    prompt = tokens(1, 9)[0]
    drawn = list(generate(model, prompt, 12, temperature=0))
    text = prompt.tolist()
    for token in drawn:
        assert token == model(torch.tensor([text]))[0][0, -1].argmax()
        text.append(token)


def test_sampling_is_seeded_and_stops():
    model, prompt = tiny("hope").eval(), tokens(1, 5)[0]
    first = list(generate(model, prompt, 20, seed=1))
    assert first == list(generate(model, prompt, 20, seed=1)) != list(generate(model, prompt, 20, seed=2))
    assert list(generate(model, prompt, 20, seed=1, stop=first[3])) == first[: first.index(first[3])]
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(model, prompt[:0], 3))


def storages(part):
    """Memory behind every tensor of a state, by its address: a view counts with all that it keeps alive."""
    if isinstance(part, torch.Tensor):
        storage = part.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if isinstance(part, MemoryState):
        part = vars(part)
    if isinstance(part, dict):
        part = part.values()
    if isinstance(part, int):
        return {}
    return {address: size for piece in part for address, size in storages(piece).items()}


def state_sizes(model, count):
    """Bytes of the whole state after each of `count` tokens that `generate` writes."""
    sizes = []

    def measure(model, arguments, output):
        logits, state = output
        assert torch.isfinite(logits).all()
        sizes.append(sum(storages(state).values()))

    handle = model.register_forward_hook(measure)
    assert len(list(generate(model.eval(), tokens(1, 1)[0], count))) == count
    handle.remove()
    return sizes[1:]


@pytest.mark.slow
def test_the_state_stays_the_same_size_for_16k_tokens():
    model = build({"name": "hope", "vocab_size": 61, "width": 16, "layers": 1, "heads": 1, "level_widths": [16]})
    sizes = state_sizes(model, 16384)
    # Within a chunk the snapshots are tensors of their own, at its boundary they are the weights.
    assert len({max(sizes[start : start + 1024]) for start in range(0, 16384, 1024)}) == 1
    assert min(sizes) > max(sizes) / 2


def test_the_measure_sees_a_cache_that_grows():
    sizes = state_sizes(tiny("transformer"), 20)
    assert sizes == sorted(set(sizes))

"""Levels that move while the model reads, beside a loop that reads one token of one row at a time."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestling.models import build
from nestling.models.cms import continuum_memory
from nestling.models.config import TransformerConfig
from nestling.models.config.levels import LevelsConfig
from nestling.models.continuum import Continuum
from nestling.models.hope import mixers, set_backend
from nestling.models.sampling import generate
from nestling.models.skeleton import LanguageModel
from nestling.models.transformer import Attention

PERIODS, RATES = (2, 4, 12), (0.4, 0.2, 0.3)
VARIANTS = ("sequential", "nested", "independent")
LAYERS = ("norm", "into", "out")


@dataclass
class AttentionConfig(TransformerConfig, LevelsConfig):
    """Softmax attention before a Continuum Memory System: the smallest model with levels that is cheap twice over."""


def attention(variant="sequential", widths=(6, 5, 7)):
    """A model whose every weight, the norms' too, is off its initial value."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "width": 8, "layers": 2, "heads": 2}
    config = AttentionConfig(**sizes, level_widths=list(widths), level_variant=variant)
    parts = lambda: (Attention(config, 8), continuum_memory(8, config.level_widths, 8, variant))  # noqa: E731
    model = LanguageModel(config, parts).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def hope(**config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "width": 8, "layers": 2, "heads": 2, "level_widths": [6, 5], "chunk_size": 5}
    return build({"name": "hope", "dtype": "float64", "eta_bias": 0.0, **sizes, **config})


def tokens(count, rows=2):
    return torch.randint(0, 11, (rows, count), generator=torch.Generator().manual_seed(0))


def in_pieces(continuum, text, *sizes):
    """Logits and state after calls of these sizes and one of the rest."""
    pieces, state, start = [], None, 0
    for size in (*sizes, text.shape[1] - sum(sizes)):
        logits, state = continuum(text[:, start : start + size], state)
        pieces.append(logits)
        start += size
    return torch.cat(pieces, dim=1), state


def outer_gradients(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))


def token_loop(model, row, periods, rates, error="task", second_order=True):
    """Eq. 71-74 for one row (T,), a token at a time: logits (T, V) and, of the last level matrix, its last value."""
    variant = model.config.level_variant
    groups = [block.feed_forward for block in model.blocks]
    if variant == "independent":
        groups = [group[0].levels for group in groups]
    count = len(periods)
    theta = [[[getattr(g[n], layer).weight for layer in LAYERS] for g in groups] for n in range(count)]
    start = [[list(ws) for ws in level] for level in theta]
    sums = [None] * count
    start_sums = [None] * count
    read = [block.mixer.initial_state(1) for block in model.blocks]
    outputs, nats, seen = [], [], []
    used = None
    for i, token in enumerate(row):
        if i:
            nats.append(-outputs[-1].log_softmax(-1)[token])
        if i and any(i % period == 0 for period in periods):
            errors = errors_of(sum(nats), used, seen, rates, error, second_order)
            for n in range(count):
                sums[n] = add(sums[n], errors[n])
                if i % periods[n] == 0:
                    theta[n] = step(theta[n], sums[n], rates[n] / periods[n])
                    sums[n] = None
                if variant == "nested" and n + 1 < count:
                    start_sums[n] = add(start_sums[n], errors[n])
                    if i % periods[n + 1] == 0:
                        start[n] = step(start[n], start_sums[n], rates[n + 1] / periods[n + 1])
                        theta[n], start_sums[n] = start[n], None
            nats, seen, used = [], [], None
        if used is None:
            used = [[[w * 1.0 for w in ws] for ws in level] for level in theta]
        x = model.embedding.weight[token][None, None]
        for place, block in enumerate(model.blocks):
            mixed, read[place] = block.mixer(block.norm(x), read[place])
            x = x + mixed
            branches = []
            for n in range(count):
                gain, into, out = used[n][place]
                z = x / (x.square().mean() + 1e-6).sqrt() * gain
                y = z @ into.T
                h = y * torch.sigmoid(y)
                o = h @ out.T
                seen.append((n, place, (z, y), (h, o)))
                if variant == "independent":
                    branches.append(block.feed_forward[0].weights[n] * o)
                else:
                    x = x + o
            x = x + sum(branches)
        outputs.append(model.head(model.norm(x))[0, 0])
    return torch.stack(outputs), theta[-1][-1][-1]


def errors_of(loss, used, seen, rates, error, second_order):
    flat = [w for level in used for ws in level for w in ws]
    graph = {"create_graph": second_order, "retain_graph": True}
    gradients = iter(torch.autograd.grad(loss, flat, **graph))
    errors = [[[next(gradients) for _ in ws] for ws in level] for level in used]
    if error == "local":
        for ws in (ws for level in errors for ws in level):
            ws[1:] = [torch.zeros_like(w) for w in ws[1:]]
        outputs = [y for *_, into, out in seen for _, y in (into, out)]
        deltas = iter(torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True, **graph))
        for n, place, *layers in seen:
            for layer, (z, y) in enumerate(layers, start=1):
                z, e = z[0, 0], (next(deltas) + y)[0, 0]
                errors[n][place][layer] = errors[n][place][layer] + torch.outer(e, z) / (1 + rates[n] * z @ z)
    return errors if second_order else [[[g.detach() for g in ws] for ws in level] for level in errors]


def add(total, more):
    if total is None:
        return more
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(total, more, strict=True)]


def step(weights, errors, rate):
    return [[w - rate * e for w, e in zip(ws, es, strict=True)] for ws, es in zip(weights, errors, strict=True)]


@cache
def expected(variant, error, second_order=True):
    """The loop's logits (B, T, V), gradients of the mean loss, and last weights, for `tokens(27)`."""
    model, text = attention(variant), tokens(27)
    with sdpa_kernel(SDPBackend.MATH):
        rows = [token_loop(model, row, PERIODS, RATES, error, second_order) for row in text]
    logits = torch.stack([logits for logits, _ in rows])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    return logits.detach(), outer_gradients(model, loss), torch.stack([weight.detach() for _, weight in rows])


@pytest.mark.parametrize("sizes", [(), (5, 1, 9), (4, 8)], ids=str)
@pytest.mark.parametrize("error", ["task", "local"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_is_autograd_through_a_token_loop(variant, error, sizes):
    model, text = attention(variant), tokens(27)
    continuum = Continuum(model, PERIODS, RATES, drive="meta", error=error, second_order=True)
    logits, state = in_pieces(continuum, text, *sizes)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    gradients = outer_gradients(model, loss)
    loop_logits, loop_gradients, loop_weights = expected(variant, error)
    torch.testing.assert_close(logits, loop_logits, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients, loop_gradients, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state.levels[-1].weights[continuum.names[-1][-1]], loop_weights, rtol=1e-11, atol=1e-11)
    # What is tested shows: the levels have moved, and the gradient through the moves is not the one past them.
    assert state.updates == (13, 6, 2)
    assert (logits - model(text)[0]).abs().max() > 1e-2


def test_first_order_takes_inner_gradients_as_constants():
    model, text = attention(), tokens(27)
    logits, _ = Continuum(model, PERIODS, RATES, drive="meta")(text)
    gradients = outer_gradients(model, F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))
    torch.testing.assert_close(gradients, expected("sequential", "task", False)[1], rtol=1e-9, atol=1e-11)
    second = expected("sequential", "task")[1]
    assert max((gradients[name] - second[name]).abs().max() for name in second) > 1e-3


def test_a_meta_gradient_is_its_finite_difference():
    model, text = attention("nested"), tokens(14)
    continuum = Continuum(model, PERIODS, RATES, drive="meta", second_order=True)

    def loss():
        return F.cross_entropy(continuum(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())

    gradients = outer_gradients(model, loss())
    direction = {name: torch.randn_like(gradient) for name, gradient in gradients.items()}
    slope = sum((direction[name] * gradient).sum() for name, gradient in gradients.items())
    values = []
    for sign in (1, -1, -1, 1):  # there, and back again
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(direction[name], alpha=sign * 1e-5)
        values.append(loss().item())
    torch.testing.assert_close((values[0] - values[2]) / 2e-5, slope.item(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("error", ["task", "local"])
@pytest.mark.parametrize("make", [attention, hope], ids=["attention", "hope"])
def test_updates_and_outputs_do_not_depend_on_the_split(make, error):
    periods, rates = ((4, 8, 32), RATES) if make is attention else ((8, 32), RATES[:2])
    continuum, text = Continuum(make(), periods, rates, error=error), tokens(70)
    logits, state = continuum(text)
    assert state.updates == tuple(70 // period for period in periods)
    assert (logits - continuum.model(text)[0]).abs().max() > 1e-2
    for sizes in ([1] * 69, [8, 24, 1, 0, 30], [33]):
        again, split = in_pieces(continuum, text, *sizes)
        assert split.updates == state.updates and split.position == 70
        torch.testing.assert_close(again, logits, rtol=1e-11, atol=1e-12)
        for level, other in zip(state.levels, split.levels, strict=True):
            torch.testing.assert_close(other.weights, level.weights, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_gives_metas_numbers_and_no_gradient(variant):
    model, text = attention(variant), tokens(30)
    stream, after = Continuum(model, PERIODS, RATES)(text)
    meta, _ = Continuum(model, PERIODS, RATES, drive="meta", second_order=True)(text)
    torch.testing.assert_close(stream, meta, rtol=1e-11, atol=1e-12)
    assert not stream.requires_grad and not any(w.requires_grad for w in after.levels[0].weights.values())
    with torch.no_grad():
        static = Continuum(model, PERIODS, RATES, drive="meta", second_order=True)(text)[0]
    assert torch.equal(static, stream)


def test_stream_keeps_no_graph():
    state = Continuum(hope(), PERIODS[:2], RATES[:2])(tokens(29))[1]
    mixer = state.opened[0]  # as a block that has been differentiated has left it
    parts = [*mixer.memory.weights.values(), *mixer.memory.snapshots.values(), [mixer.tail]]
    assert not any(tensor.requires_grad for part in parts for tensor in part)


def test_calls_in_inference_mode_learn_too():
    continuum, text = Continuum(attention(), PERIODS, RATES), tokens(30)
    with torch.inference_mode():
        logits, _ = in_pieces(continuum, text + 0, 7)
    torch.testing.assert_close(logits, continuum(text)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("drive", ["stream", "meta"])
@pytest.mark.parametrize("make", [*VARIANTS, "hope"])
def test_zero_rates_are_the_static_model_to_the_bit(make, drive):
    model, text = hope() if make == "hope" else attention(make), tokens(30)
    count = len(model.level_parameters())
    logits, state = Continuum(model, PERIODS[:count], [0.0] * count, drive=drive)(text)
    assert torch.equal(logits, model(text)[0]) and state.updates == (0,) * count
    assert not any(level.weights for level in state.levels) and not state.tokens.numel()
    # The moving path, at rates too small to show.
    moved, state = Continuum(model, PERIODS[:count], [1e-30] * count, drive=drive, second_order=False)(text)
    torch.testing.assert_close(moved, logits, rtol=1e-12, atol=1e-13)
    assert state.updates[0] == 14


def test_the_rates_are_of_the_mean_error():
    """One chunk of C tokens moves a level by rate / C times the gradient of the summed loss of its predictions."""
    model, text = attention(widths=(6,)), tokens(9)
    state = Continuum(model, [8], [0.5])(text)[1]
    for row in range(2):
        loss = F.cross_entropy(model(text[row : row + 1, :8])[0][0], text[row, 1:], reduction="sum")
        for name, gradient in outer_gradients(model, loss).items():
            if ".feed_forward." in name:
                expected = model.get_parameter(name) - 0.5 / 8 * gradient
                torch.testing.assert_close(state.levels[0].weights[name][row], expected.detach())


@pytest.mark.parametrize("zero", [1, 2])
def test_a_level_is_reset_by_a_slower_one_that_stays(zero):
    """A rate of 0 is the limit of small ones: what a level is reset to does not move, the reset is made."""
    model, text = attention("nested"), tokens(14)
    results = []
    for small in (0.0, 1e-9):
        rates = [0.7, 0.5, 0.3]
        rates[zero] = small
        results.append(Continuum(model, PERIODS, rates)(text)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)


def test_nested_levels_are_reset_to_what_the_slower_level_has_learned():
    model = attention("nested")
    continuum, text = Continuum(model, PERIODS, RATES), tokens(30)
    for read, reset in ((3, False), (5, True), (7, False), (9, True)):
        fast = continuum(text[:, :read])[1].levels[0]
        same = [torch.equal(fast.weights[name], fast.start[name]) for name in continuum.names[0]]
        assert all(same) if reset else not any(same)
        moved = [not torch.equal(fast.start[name][0], model.get_parameter(name)) for name in continuum.names[0]]
        assert all(moved) if read >= 5 else not any(moved)
    slowest = continuum(text)[1].levels[-1]
    assert slowest.start is None and slowest.updates == 2


def test_another_models_state_is_refused():
    model, text = attention(), tokens(6)
    with pytest.raises(ValueError, match="state: got list"):
        Continuum(model, PERIODS, RATES)(text, model.initial_state(len(text)))


def test_a_level_that_stays_can_still_be_reset():
    """Rate 0 on the fast level: only its start moves, with the slower level."""
    continuum, text = Continuum(attention("nested"), PERIODS, (0.0, 0.2, 0.0)), tokens(6)
    state = continuum(text)[1]
    assert state.updates == (0, 1, 0)
    assert not torch.equal(
        state.levels[0].weights[continuum.names[0][1]][0], continuum.model.blocks[0].feed_forward[0].into.weight
    )


@pytest.mark.parametrize("make", [attention, hope], ids=["attention", "hope"])
def test_rows_are_apart_and_nothing_comes_from_later(make):
    model, text = make(), tokens(30, rows=3)
    count = len(model.level_parameters())
    continuum = Continuum(model, PERIODS[:count], RATES[:count])
    logits = continuum(text)[0]
    torch.testing.assert_close(continuum(text[1:2])[0], logits[1:2], rtol=1e-11, atol=1e-12)
    changed = text.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 11
    torch.testing.assert_close(continuum(changed)[0][:, :13], logits[:, :13], rtol=1e-11, atol=1e-12)
    assert (continuum(changed)[0] - logits)[:, 13].abs().min() > 1e-4  # token 13's own step is seen at once


def test_hope_has_meta_gradients_through_the_token_loop():
    model, text = hope(), tokens(12)
    meta = Continuum(model, (4, 8), (0.4, 0.2), drive="meta", second_order=True)
    first = Continuum(model, (4, 8), (0.4, 0.2), drive="meta")
    second = outer_gradients(model, meta(text)[0].square().mean())
    assert {mixer.backend for mixer in mixers(model)} == {"auto"}
    chunked = outer_gradients(model, first(text)[0].square().mean())
    assert max((second[name] - chunked[name]).abs().max() for name in second) > 1e-4
    set_backend(model, "reference")
    torch.testing.assert_close(outer_gradients(model, first(text)[0].square().mean()), chunked, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outer_gradients(model, meta(text)[0].square().mean()), second)
    set_backend(model, "chunked")
    with pytest.raises(RuntimeError, match=r"set_backend\(model, 'reference'\)"):
        meta(text)


def test_sampling_learns_from_what_it_reads():
    model = attention().float()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    continuum = Continuum(model, PERIODS, RATES)
    prompt = tokens(7, rows=1)[0]
    text = list(generate(continuum, prompt, 12, temperature=0))
    # The same from calls with the whole text.
    for length in range(12):
        logits = continuum(torch.cat([prompt, torch.tensor(text[:length], dtype=torch.int64)])[None])[0]
        assert int(logits[0, -1].argmax()) == text[length]
    assert text != list(generate(model, prompt, 12, temperature=0))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_half_precision_moves_in_float32():
    model = attention().bfloat16()
    state = Continuum(model, PERIODS, [1e-6] * 3)(tokens(9))[1]
    weights = state.levels[0].weights
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert all(not torch.equal(weight[0], model.get_parameter(name).float()) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": attention(widths=())}, "no level that could move"),
        ({"periods": (2, 4)}, "got 2 periods and 3 rates, needs 3 of each, for level 1, level 2, level 3"),
        ({"periods": (0, 4, 8)}, r"periods: got \[0, 4, 8\]"),
        ({"periods": (2, 3, 12), "model": attention("nested")}, "multiple of the one before"),
        ({"rates": (0.1, 0.1, -1.0)}, "finite numbers of at least 0"),
        ({"drive": "schedule"}, "drive: got 'schedule', needs one of stream, meta"),
        ({"error": "mse"}, "continuum.error: got 'mse', needs one of task, local"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Continuum(**{"model": attention(), "periods": PERIODS, "rates": RATES, **arguments})


def test_wrong_calls_are_named():
    continuum = Continuum(attention(), PERIODS, RATES)
    state = continuum(tokens(5))[1]
    with pytest.raises(ValueError, match="state: got 3 levels of 2 rows, needs 3 of 1"):
        continuum(tokens(5, rows=1), state)
    with pytest.raises(ValueError, match="int64"):
        continuum(tokens(5).int())
    continuum.model.activation_checkpointing = True
    with pytest.raises(ValueError, match="activation_checkpointing"):
        continuum(tokens(5))


def markov_text(seed, rows, count):
    """Rows of a Markov chain over 11 tokens; the seed is the chain's."""
    generator = torch.Generator().manual_seed(seed)
    chain = (3 * torch.randn(11, 11, generator=generator)).softmax(-1)
    text = [torch.zeros(rows, dtype=torch.int64)]
    for _ in range(count):
        text.append(torch.multinomial(chain[text[-1]], 1, generator=generator)[:, 0])
    return torch.stack(text, dim=1)


def test_stepping_levels_learn_another_domain_while_they_read_it():
    """Trained on one Markov chain, reading another: every token is predicted before it is learned from."""
    model = attention()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    train, other = markov_text(0, 8, 1200), markov_text(1, 4, 200)

    def loss(reader, text):
        return F.cross_entropy(reader(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())

    for part in train.split(24, dim=1)[:-1]:
        optimizer.zero_grad()
        loss(model, part).backward()
        optimizer.step()
    static, moving = loss(model, other), loss(Continuum(model, (4, 16, 64), (0.5, 0.5, 0.5)), other)
    assert static > 2.7 and moving < static - 0.7  # nats; ln 11 is 2.4

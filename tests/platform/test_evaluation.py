"""What an evaluation must say, for models whose losses are known beforehand.

The models here predict by rule: their loss can be written down, so that a figure under the wrong name, from the wrong
rows or in the wrong unit is a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.config import DataConfig, JobConfig, TrainingConfig
from nestling.data import Corpus, Counts, Part, Tokenizer, Tokens
from nestling.evaluation import Report, heldout, heldout_report
from nestling.models import HopeConfig, build
from nestling.models.continuum import Continuum
from nestling.models.hope import mixers

VOCABULARY = 61
LN2 = math.log(2)
NO_COUNTS = Counts(0, 0, 0, np.zeros((2, 0), np.int64))


class Rule(nn.Module):
    """Predicts by a function from tokens (B, T) to logits (B, T, V); keeps what it was given."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        self.rule = rule
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, list[Any]]:
        self.seen.append(tokens)
        self.modes.append(self.training)
        return self.rule(tokens), []


def uniform(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, VOCABULARY)


def corpus(tokens: np.ndarray, text_bytes: int | None = None) -> Corpus:
    """A corpus that holds these tokens out; the other side has another ratio of tokens to bytes."""
    held = Tokens(tokens.astype(np.uint16), text_bytes or len(tokens), 3, 4.25)
    train = Tokens(np.zeros(100, np.uint16), 7, 1, 1.5)
    return Corpus(Path("none"), Tokenizer.bytes(), (Part("text", 1.0, train, held, NO_COUNTS),))


def counting(count: int) -> np.ndarray:
    return np.arange(count) % VOCABULARY


def random_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


def report(model: nn.Module, on: Corpus, length: int, tokens: int = 1 << 20) -> Report:
    job = JobConfig(data=DataConfig(sequence_length=length), training=TrainingConfig(batch_tokens=length))
    return heldout_report(model, on, job, tokens)  # type: ignore[arg-type]


def hope(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "width": 16, "layers": 2, "heads": 2, "chunk_size": 8, "level_widths": [8]}
    return build(HopeConfig(**{**sizes, "eta_bias": 0.0, **changes}))


def nats(model: nn.Module, rows: np.ndarray) -> float:
    """Mean loss of the model on rows of tokens, without any of the code under test."""
    text = torch.from_numpy(rows.astype(np.int64))
    with torch.no_grad():
        return F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten()).item()


def test_loss_by_position_from_first_to_last() -> None:
    """The next token is always this one plus one; position t costs (t + 1) / 10 nats."""
    length = 20

    def rule(tokens: Tensor) -> Tensor:
        cost = (torch.arange(tokens.shape[1]) + 1.0) / 10
        height = math.log(VOCABULARY - 1) - torch.expm1(cost).log()  # of the right token above the others
        return height[None, :, None] * F.one_hot((tokens + 1) % VOCABULARY, VOCABULARY)

    found = report(Rule(rule), corpus(counting(401), 200), length)
    # 20 positions in eight stretches: four of three, then four of two.
    ends = [0, 3, 6, 9, 12, 14, 16, 18, 20]
    costs = [np.arange(a + 1, b + 1).mean() / 10 for a, b in zip(ends, ends[1:], strict=False)]
    assert found.bits_per_byte_by_position == pytest.approx([cost * 401 / 200 / LN2 for cost in costs], rel=1e-5)
    assert found.heldout_loss == pytest.approx(1.05, rel=1e-5)


def test_a_second_copy_is_told_from_a_passage_after_another() -> None:
    """A model that repeats what stood `size` tokens ago; a passage's first token, which does not count, it guesses."""
    size = 16

    def rule(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, VOCABULARY)
        logits[:, size:] = 50.0 * F.one_hot(tokens[:, 1 : tokens.shape[1] - size + 1], VOCABULARY)
        return logits

    model = Rule(rule)
    found = report(model, corpus(random_tokens(2000), 1000), 2 * size)
    assert found.second_copy_bits_per_byte == pytest.approx(0, abs=1e-9)
    assert found.after_another_bits_per_byte == pytest.approx(50 * (1 - 1 / VOCABULARY) * 2 / LN2, rel=0.02)


def test_passages_are_given_twice_and_then_after_another_one() -> None:
    size, model = 16, Rule(uniform)
    tokens = random_tokens(2000)
    report(model, corpus(tokens), 2 * size, tokens=1)
    reads = torch.cat([seen for seen in model.seen if seen.shape[1] == 2 * size - 1])
    twice, after_another = reads.tensor_split(2)
    assert len(twice) == len(after_another) == min(heldout.PASSAGES, 2000 // (2 * size))
    assert torch.equal(twice[:, : size - 1], twice[:, size:])
    assert torch.equal(twice[:, size:], after_another[:, size:])
    assert not (after_another[:, : size - 1] == after_another[:, size:]).all(1).any()
    assert twice[0, 0] == tokens[0] and twice[-1, 0] == tokens[-size]  # from the first to the last of the text


def test_gates_are_named_and_in_the_order_of_the_layers() -> None:
    """With w1 of the gates' memories at zero and no chunk boundary in the sequence, only the biases speak."""
    model = hope(chunk_size=32, eta_max=0.5)
    biases = [(-1.0, [2.0, 4.0]), (0.5, [-1.0, 1.0])]
    for layer, (eta, alpha) in zip(mixers(model), biases, strict=True):
        layer.config = replace(layer.config, eta_bias=eta)
        layer.alpha_bias.copy_(torch.tensor(alpha))
        for name in ("eta_w1", "alpha_w1"):
            nn.init.zeros_(layer.memories[name])
    found = report(model, corpus(random_tokens(200)), 32)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    etas = [0.5 * sigmoid(eta) for eta, _ in biases]
    alphas = [sum(map(sigmoid, alpha)) / 2 for _, alpha in biases]
    assert found.eta == pytest.approx(etas, rel=1e-5)
    assert found.alpha == pytest.approx(alphas, rel=1e-5)
    metrics = found.metrics()
    assert [metrics[f"memory/layer{layer}/{gate}"] for gate in ("eta", "alpha") for layer in (0, 1)] == [
        *found.eta,
        *found.alpha,
    ]
    assert all(layer.gate_log is None for layer in mixers(model))


def test_levels_that_move_are_beside_levels_that_stay() -> None:
    """Two parts of unequal length, so of unequal numbers of blocks."""
    model, long, short = hope(), counting(400), random_tokens(30)
    reader = Continuum(model, [8], [1.0])
    parts = [replace(corpus(text).parts[0], name=name, weight=0.5) for name, text in (("long", long), ("short", short))]
    mixed = replace(corpus(long), parts=tuple(parts))
    found, still = report(reader, mixed, 64), report(model, mixed, 64)
    for each, read in ((found, reader), (still, model)):
        assert each.parts["short"]["heldout_loss"] == pytest.approx(nats(read, short[None]), rel=1e-6)
    assert found.heldout_loss != pytest.approx(still.heldout_loss, rel=1e-5)
    assert found.levels_still_bits_per_byte == pytest.approx(still.heldout_bits_per_byte, rel=1e-6)
    assert found.levels_moving_bits_per_byte == pytest.approx(found.heldout_bits_per_byte, rel=1e-6)
    assert still.levels_still_bits_per_byte is None and still.levels_moving_bits_per_byte is None
    for name in ("eta", "alpha"):
        gates = getattr(found, name)
        assert len(gates) == 2 and gates == pytest.approx(getattr(still, name), abs=0.05)


def test_writes_off_is_the_loss_without_steps() -> None:
    tokens = random_tokens(321)
    found = report(hope(), corpus(tokens, 200), 32)
    still = hope()
    for layer in mixers(still):
        layer.config = replace(layer.config, eta_max=1e-12)
    expected = report(still, corpus(tokens, 200), 32)
    assert found.writes_off_bits_per_byte == pytest.approx(expected.heldout_bits_per_byte, rel=1e-6)
    assert found.writes_on_bits_per_byte == pytest.approx(found.heldout_bits_per_byte, rel=1e-9)
    assert found.writes_on_bits_per_byte != pytest.approx(found.writes_off_bits_per_byte, rel=1e-4)
    assert found.metrics()["memory/writes_off_bits_per_byte"] == found.writes_off_bits_per_byte
    assert found.metrics()["memory/writes_on_bits_per_byte"] == found.writes_on_bits_per_byte


def test_writes_on_and_off_are_measured_on_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    length, tokens, model = 32, random_tokens(8 * 32 + 1), hope()
    monkeypatch.setattr(heldout, "CONTROL_TOKENS", 2 * length)
    found = report(model, corpus(tokens), length)
    rows = np.stack([tokens[start : start + length + 1] for start in (0, 4 * length)])
    assert found.control_tokens == 2 * length and found.tokens == 8 * length
    assert found.writes_on_bits_per_byte == pytest.approx(nats(model, rows) / LN2, rel=1e-5)
    for layer in mixers(model):
        layer.writes = False
    assert found.writes_off_bits_per_byte == pytest.approx(nats(model, rows) / LN2, rel=1e-5)


def test_the_memories_write_again_afterwards() -> None:
    model, text = hope(), corpus(random_tokens(200))
    report(model, text, 32)
    assert all(layer.writes for layer in mixers(model))

    def refuse(module: nn.Module, arguments: Any) -> None:
        if not mixers(module)[-1].writes:
            raise RuntimeError("stopped while the writes were off")

    model.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="stopped while"):
        report(model, text, 32)
    assert all(layer.writes for layer in mixers(model))


def test_a_transformer_has_no_memory_to_ask() -> None:
    model = build({"name": "transformer", "vocab_size": VOCABULARY, "width": 16, "layers": 1, "heads": 2})
    found = report(model, corpus(random_tokens(200)), 32)
    assert found.control_tokens is found.writes_on_bits_per_byte is found.writes_off_bits_per_byte is None
    assert found.eta == found.alpha == []
    assert found.second_copy_bits_per_byte is not None  # a cache is a memory too
    assert not [name for name in found.metrics() if "writes" in name or "layer" in name]


def test_a_model_that_knows_nothing_scores_the_vocabulary() -> None:
    """In bits per byte of the held-out text; the unigram line is the corpus's own."""
    found = report(Rule(uniform), corpus(random_tokens(401), 300), 20)
    assert found.tokens == 400
    assert found.heldout_loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    for bits in (found.heldout_bits_per_byte, found.second_copy_bits_per_byte, *found.bits_per_byte_by_position):
        assert bits == pytest.approx(math.log2(VOCABULARY) * 401 / 300, rel=1e-6)
    assert found.unigram_bits_per_byte == 4.25
    metrics = found.metrics()
    assert metrics["heldout/loss"] == found.heldout_loss
    assert metrics["heldout/bits_per_byte"] == found.heldout_bits_per_byte
    assert metrics["heldout/unigram_bits_per_byte"] == 4.25


@pytest.mark.parametrize(("tokens", "starts"), [(80, [0, 100, 200, 300]), (1, [0]), (10**6, range(0, 400, 20))])
def test_a_part_is_spread_over_the_text(
    tokens: int, starts: range | list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 20 tokens and the one to predict; with all of them, each token is predicted exactly once."""
    monkeypatch.setattr(heldout, "PASSAGES", 0)
    model = Rule(lambda tokens: torch.zeros(*tokens.shape, 401))
    found = report(model, corpus(np.arange(401)), 20, tokens)
    assert torch.cat(model.seen).tolist() == [list(range(start, start + 20)) for start in starts]
    assert found.tokens == 20 * len(starts)


@pytest.mark.parametrize(("size", "stretches"), [(2, 1), (5, 4), (10, 8), (64, 8)])
def test_a_text_shorter_than_a_sequence(size: int, stretches: int) -> None:
    found = report(hope(), corpus(random_tokens(size)), 64)
    assert found.tokens == size - 1 and len(found.bits_per_byte_by_position) == stretches
    assert math.isfinite(found.heldout_loss) and math.isfinite(found.writes_off_bits_per_byte or math.nan)
    assert (found.second_copy_bits_per_byte is None) == (found.after_another_bits_per_byte is None)


def test_too_little_text_for_two_passages() -> None:
    found = report(Rule(uniform), corpus(random_tokens(31)), 16)
    assert found.second_copy_bits_per_byte is found.after_another_bits_per_byte is None


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back(training: bool) -> None:
    model = Rule(uniform).train(training)
    report(model, corpus(random_tokens(200)), 32)
    assert model.training is training
    assert not any(model.modes)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_rows_in_equal_calls(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of all ranks add up to the whole, and every rank calls the model equally often (ZeRO 3 wants that)."""
    monkeypatch.setattr(heldout.dist, "all_reduce", lambda losses: None)
    model = hope().eval()
    rows = random_tokens(20 * 9).reshape(20, 9).astype(np.int64)
    models, total = [Rule(lambda tokens: model(tokens)[0]) for _ in range(world)], torch.zeros(20, 8).double()
    with torch.no_grad():
        for rank, mine in enumerate(models):
            total += heldout.token_losses(mine, rows, rank, world)  # type: ignore[arg-type]
    assert {len(mine.seen) for mine in models} == {-(-3 // world)}
    assert total.mean().item() == pytest.approx(nats(model, rows), rel=1e-6)


def mix(*parts: tuple[np.ndarray, float, int]) -> Corpus:
    """From the tokens, the weight and the bytes of each part."""
    made = []
    for number, (tokens, weight, size) in enumerate(parts):
        side = Tokens(tokens.astype(np.uint16), size, 3, 4.0 + number)
        made.append(Part(f"part{number}", weight, side, side, NO_COUNTS))
    return Corpus(Path("none"), Tokenizer.bytes(), tuple(made))


def test_the_parts_of_a_mix_by_their_weights() -> None:
    """Tokens of one part are below 20, those of the other from 20 on, and their losses are known."""
    low, high = np.arange(801) % 20, 20 + np.arange(1601) % 41

    def rule(tokens: Tensor) -> Tensor:  # chooses among 20 or among 41
        logits = torch.full((*tokens.shape, VOCABULARY), -1e9)
        logits[..., :20] = torch.where(tokens < 20, 0.0, -1e9)[..., None]
        logits[..., 20:] = torch.where(tokens < 20, -1e9, 0.0)[..., None]
        return logits

    model = Rule(rule)
    found = report(model, mix((low, 0.75, 1602), (high, 0.25, 4803)), 20, tokens=800)
    nats, bytes_per_token = (math.log(20), math.log(41)), (2.0, 3.0)
    mean = 0.75 * nats[0] + 0.25 * nats[1]
    size = 0.75 * bytes_per_token[0] + 0.25 * bytes_per_token[1]
    assert found.tokens == 800
    reads = torch.cat([seen for seen in model.seen if seen.shape[1] == 20])
    assert np.count_nonzero(reads[:, 0] < 20) == 30 and len(reads) == 40
    assert found.heldout_loss == pytest.approx(mean, rel=1e-6)
    assert found.heldout_bits_per_byte == pytest.approx(mean / size / LN2, rel=1e-6)
    assert found.bits_per_byte_by_position == pytest.approx([mean / size / LN2] * 8, rel=1e-6)
    assert found.unigram_bits_per_byte == pytest.approx((0.75 * 2 * 4 + 0.25 * 3 * 5) / size)
    metrics = found.metrics()
    for name, loss, ratio, line in zip(("part0", "part1"), nats, bytes_per_token, (4.0, 5.0), strict=True):
        assert metrics[f"heldout/{name}/loss"] == pytest.approx(loss, rel=1e-6)
        assert metrics[f"heldout/{name}/bits_per_byte"] == pytest.approx(loss / ratio / LN2, rel=1e-6)
        assert found.as_dict()["parts"][name]["unigram_bits_per_byte"] == line


def test_one_part_has_no_figures_of_its_own() -> None:
    found = report(Rule(uniform), corpus(random_tokens(401)), 20)
    assert "parts" not in found.as_dict()
    assert {name for name in found.metrics() if name.startswith("heldout")} == {
        "heldout/loss",
        "heldout/bits_per_byte",
        "heldout/unigram_bits_per_byte",
    }


def test_the_memories_of_a_mix() -> None:
    """Of two equal parts everything is what it is of one; a part too short for passages leaves them to the other."""
    tokens = random_tokens(641)
    alone = report(hope(), corpus(tokens), 32)
    twice = report(hope(), mix((tokens, 0.5, 641), (tokens, 0.5, 641)), 32)
    short = report(hope(), mix((tokens, 0.5, 641), (tokens[:20], 0.5, 20)), 32)
    assert twice.eta == pytest.approx(alone.eta) and twice.alpha == pytest.approx(alone.alpha)
    for name in ("heldout_bits_per_byte", "writes_on_bits_per_byte", "writes_off_bits_per_byte"):
        assert getattr(twice, name) == pytest.approx(getattr(alone, name), rel=1e-6)
    assert twice.control_tokens == 2 * (alone.control_tokens or 0)
    assert twice.second_copy_bits_per_byte == pytest.approx(alone.second_copy_bits_per_byte, rel=1e-6)
    assert short.second_copy_bits_per_byte == pytest.approx(alone.second_copy_bits_per_byte, rel=1e-6)
    assert len(short.bits_per_byte_by_position) == 8

"""Synthetic tasks: labels recomputed by another method from the tokens alone, chance levels by guessing."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from nestling.models import build
from nestling.tasks import (
    IGNORE,
    MAD,
    Compression,
    Examples,
    FuzzyRecall,
    InContextRecall,
    MadTask,
    Memorisation,
    NoisyRecall,
    OrthogonalTasks,
    PassKey,
    SelectiveCopying,
    generator,
    padded,
    scores,
    stable_rule,
)

ALL = [task() for task in MAD]


def rows(examples: Examples) -> list[tuple[list[int], list[int]]]:
    return [(inputs.tolist(), targets.tolist()) for inputs, targets in zip(*examples, strict=True)]


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_examples_are_in_range_and_come_back_with_the_seed(task: MadTask) -> None:
    first, again, other = (task.sample(8, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, other.inputs)
    test = task.tests(0)["test"]
    assert len(test.inputs) == 1280
    assert not torch.equal(test.inputs[:8], task.validation(generator(1), 8).inputs)
    for examples in (first, test):
        assert examples.inputs.shape == examples.targets.shape
        assert 0 <= examples.inputs.min() and examples.inputs.max() < task.vocab_size
        scored = examples.targets[examples.targets != IGNORE]
        assert len(scored) and 0 <= scored.min() and scored.max() < task.classes


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_guessing_scores_the_chance_level(task: MadTask) -> None:
    """Guesses are uniform over the classes that occur; the compression token, always last, is known."""
    targets = task.tests(1)["test"].targets
    classes = targets[targets != IGNORE].unique()
    if isinstance(task, Compression):
        classes = classes[:-1]
    guesses = classes[torch.randint(len(classes), targets.shape, generator=generator(5))]
    if isinstance(task, Compression):
        guesses[:, -1] = task.vocab_size - 1
    assert scores(guesses, targets)["macro_accuracy"] == pytest.approx(task.chance("test"), rel=0.1, abs=0.002)


@pytest.mark.parametrize("task", [InContextRecall(), NoisyRecall(), InContextRecall(64, 256)])
def test_recall_asks_for_the_values_of_keys_seen_before(task: InContextRecall) -> None:
    tokens = task.vocabulary - task.noise_tokens
    noisy = 0
    for inputs, targets in rows(task.validation(generator(0), 40)):
        seen: dict[int, int] = {}
        inputs = [*inputs, targets[-1]]  # the last value is only a target
        assert len(inputs) == task.length and targets[-1] != IGNORE
        for place in range(0, len(inputs), 2):
            key, value = inputs[place : place + 2]
            if key >= tokens:
                assert value >= tokens and targets[place] == IGNORE
                noisy += 1
            else:
                assert key < tokens // 2 <= value < tokens
                assert targets[place] == seen.get(key, IGNORE)
                assert seen.setdefault(key, value) == value
            assert place == 0 or targets[place - 1] == IGNORE
    share = noisy / (40 * task.length / 2)
    assert share == pytest.approx(task.noise, abs=0.04)


def test_recall_is_trained_on_the_next_token() -> None:
    for task in (InContextRecall(), NoisyRecall(), FuzzyRecall()):
        inputs, targets = task.sample(4, generator(0))
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_fuzzy_recall_asks_for_the_values_of_tuples_seen_before() -> None:
    task = FuzzyRecall()
    padding, sizes = task.vocabulary - 1, Counter[int]()
    for inputs, targets in rows(task.validation(generator(0), 60)):
        text, labels = [*inputs, targets[-1]], [IGNORE, *targets]
        assert len(text) == task.length + 1
        start = next(place for place, token in enumerate(text) if token != padding)
        assert padding not in text[start:]
        pairs = re.findall(r"([a-g]+)([h-o]+)", "".join(chr(97 + token) for token in text[start:]))
        seen: dict[str, str] = {}
        expected = [IGNORE] * start
        for key, value in pairs:
            assert len(key) == len(set(key)) == 3 and 1 <= len(value) == len(set(value)) <= 3
            again = key in seen
            expected += [IGNORE] * 3 + [ord(letter) - 97 if again else IGNORE for letter in value]
            assert seen.setdefault(key, value) == value
            sizes[len(value)] += 1
        assert labels == expected
        assert pairs[-1] in pairs[:-1]  # the probe
    assert all(count > 100 for count in sizes.values()) and len(sizes) == 3


def test_selective_copying_wants_what_is_no_blank() -> None:
    task = SelectiveCopying()
    for inputs, targets in rows(task.sample(40, generator(0))):
        assert len(inputs) == 256 and inputs[-17] == 15 and inputs[-16:] == [14] * 16
        before = inputs[:-17]
        assert targets[:-16] == [IGNORE] * 240
        assert targets[-16:] == [token for token in before if token != 14]
        assert before[-1] != 14  # blanks fall in front of a token


def test_memorisation_has_one_map_from_keys_to_values() -> None:
    task, found = Memorisation(), dict[int, int]()
    for examples in (task.sample(256, generator(0)), *task.tests(7).values()):
        for inputs, targets in rows(examples):
            assert inputs[1::2] == [255] * 16 and targets[::2] == [IGNORE] * 16
            for key, value in zip(inputs[::2], targets[1::2], strict=True):
                assert found.setdefault(key, value) == value and key < 127 <= value < 255
    assert sorted(found) == list(range(127)) and len(set(found.values())) == 127


class OnlyTheLast(nn.Module):
    """A model whose states before the last one say nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        hidden = self.model(tokens)[0].clone()
        hidden[:, :-1] = 0
        return hidden, None


def test_compression_is_read_from_the_last_state_alone() -> None:
    task = Compression(length=8)
    inputs, targets = task.sample(3, generator(0))
    assert torch.equal(inputs, targets) and (inputs[:, -1] == 15).all() and (inputs[:, :-1] < 15).all()
    torch.manual_seed(0)
    body = build({"name": "transformer", "vocab_size": 16, "width": 8, "heads": 2, "layers": 1})
    model = task.readout(body)
    logits, _ = model(inputs)
    assert logits.shape == (3, 8, 16)
    hidden = body(inputs)[0]
    assert hidden.shape == (3, 8, 8)
    model.model = OnlyTheLast(body)
    assert torch.equal(model(inputs)[0], logits)
    model.model = body
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pass_key_is_said_once_and_asked_for_at_the_end() -> None:
    filler = bytes(random.Random(0).choices(b"abcdefgh \n", k=3000))
    task = PassKey(filler, lengths=(256, 512), depths=(0.0, 0.5, 1.0), trials=5)
    tests = task.tests(0)
    assert set(tests) == {task.test_name(length, depth) for length in (256, 512) for depth in (0.0, 0.5, 1.0)}
    for name, examples in tests.items():
        length, depth = int(name.split()[0]), float(name.split()[-1])
        for inputs, targets in rows(examples):
            text = bytes([*inputs, targets[-1]])
            assert len(text) == length
            told, asked = re.search(rb" The pass key is (\d{5})\. Remember it\. ", text), text[-5:]
            assert told is not None and told[1] == asked and text.endswith(b" The pass key is " + asked)
            assert targets[-5:] == list(asked) and set(targets[:-5]) == {IGNORE}
            around = len(text) - len(told[0]) - 17 - 5
            assert told.start() == round(depth * around)
            rest = text[: told.start()] + text[told.end() : -22]
            assert rest in filler
    assert len({bytes(row[-5:].tolist()) for row in task.sample(30, generator(0)).targets}) > 25
    with pytest.raises(ValueError, match="filler: got 3000 bytes, needs at least the longest length, 8192"):
        PassKey(filler)


def test_orthogonal_tasks_pull_along_their_own_direction() -> None:
    tasks = OrthogonalTasks(dimension=6, tasks=4)
    assert torch.allclose(tasks.directions @ tasks.directions.T, torch.eye(4, dtype=torch.float64))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for task in range(4):
        x, y = tasks.sample(task, 200_000, generator(task))
        measured = ((x @ weight - y) ** 2).mean()
        assert measured.item() == pytest.approx(tasks.loss(weight, task).item(), rel=0.02)
        (gradient,) = torch.autograd.grad(measured, weight)
        along = (gradient @ tasks.directions[task]) * tasks.directions[task]
        assert (gradient - along).norm() < 1e-9 * gradient.norm()
        assert (y**2).mean().item() == pytest.approx(tasks.chance(task), rel=0.02)
    with pytest.raises(ValueError, match="tasks: got 7"):
        OrthogonalTasks(dimension=6, tasks=7)


def test_the_stable_rule_is_a_line_on_a_wave() -> None:
    x, noise = (torch.randn(300, dtype=torch.float64, generator=generator(seed)) for seed in (0, 1))
    wave, y = stable_rule(x, noise)
    assert torch.allclose(y - 2 * x - 0.2 * noise, wave)
    times = torch.arange(300, dtype=torch.float64) * 60 / 299
    assert torch.allclose(wave, 5 * (times / 4).sin())
    assert 3.2 < y.abs().mean() < 4.2


def test_scores_count_positions_classes_and_sequences() -> None:
    targets = torch.tensor([[0, 0, IGNORE, 1], [0, 2, 2, IGNORE], [IGNORE] * 4])
    predictions = torch.tensor([[0, 1, 9, 1], [0, 2, 2, 9], [9] * 4])
    found = scores(predictions, targets)
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["sequence_accuracy"] == 0.5
    assert found["macro_accuracy"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    # A class that is predicted and never right counts, as in torchmetrics.
    assert scores(torch.tensor([[3]]), torch.tensor([[0]]))["macro_accuracy"] == 0
    never = torch.full((1, 2), IGNORE)
    assert all(value != value for value in scores(never, never).values())


def test_padding_is_on_the_right_and_not_scored() -> None:
    inputs, targets = padded([[1, 2, 3], [4]], [[0, 1, 0], [1]])
    assert inputs.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert targets.tolist() == [[0, 1, 0], [1, IGNORE, IGNORE]]


class Lookup(nn.Module):
    """Answers recall by looking the key up: the tasks can be solved, and what solves them scores 1."""

    def forward(self, inputs: Tensor) -> Tensor:
        answers = torch.zeros_like(inputs)
        for row, tokens in enumerate(inputs.tolist()):
            seen: dict[int, int] = {}
            for place, token in enumerate(tokens):
                answers[row, place] = seen.get(token, 0)
                if place % 2:
                    seen[tokens[place - 1]] = token
        return answers


def test_one_who_looks_up_is_right_everywhere() -> None:
    test = InContextRecall(test_examples=50).tests(0)["test"]
    assert scores(Lookup()(test.inputs), test.targets) == dict.fromkeys(
        ("accuracy", "macro_accuracy", "sequence_accuracy"), 1.0
    )

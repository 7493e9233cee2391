"""The reservoir is a uniform sample in bounded memory, and a stream that goes on draws what it would have drawn."""

import numpy as np
import torch

from nestling.data import IGNORED
from nestling.training.replay import Replay


def sequences(first, count, length=4):
    numbers = np.arange(first, first + count, dtype=np.int32)
    return np.repeat(numbers[:, None], length, 1), np.repeat(numbers[:, None] + 1, length, 1)


def filled(seed, count=200, room=10):
    replay = Replay(0.5, room, 4, seed)
    for first in range(0, count, 4):
        replay.add(*sequences(first, 4))
    return replay


def test_a_uniform_sample_in_bounded_memory():
    counts = np.zeros(200)
    for seed in range(400):
        kept = filled(seed).tensors()["replay"].view(10, 2, 4)
        assert (kept[:, 1] == kept[:, 0] + 1).all()
        counts[kept[:, 0, 0].numpy()] += 1
    # 400 x 10 / 200 = 20 each; a binomial's standard deviation is 4.4.
    assert counts.sum() == 4000 and abs(counts[:100].sum() - 2000) < 150
    assert counts.min() > 3 and counts.max() < 45


def test_the_share_of_what_is_drawn():
    replay = filled(0)
    drawn = [len(replay.draw(step, 3)[0]) for step in range(400)]
    assert set(drawn) == {1, 2} and abs(np.mean(drawn) - 1.5) < 0.1
    assert len(Replay(0.5, 3, 4, 0).draw(1, 8)[0]) == 0  # nothing is there yet
    off = Replay(0.0, 1000, 4, 0)
    off.add(*sequences(0, 4))
    assert off.seen == 0 and len(off.draw(1, 100)[0]) == 0


def test_masked_sequences_are_not_kept():
    replay = Replay(0.5, 30, 4, 0)
    inputs, targets = sequences(0, 3)
    targets[1] = IGNORED
    replay.add(inputs, targets)
    assert replay.seen == 2


def test_a_state_goes_on_as_the_original():
    def held(replay):
        return {name: tensor.clone() for name, tensor in replay.tensors().items()}

    def more(replay, first, count):
        """Sequences whose logits are their number."""
        inputs, targets = sequences(first, count)
        rows = list(replay.places(targets))
        replay.add(inputs, targets, np.repeat(inputs[rows, :, None], 3, 2).astype(np.float16))

    one, two = (Replay(0.5, 10, 4, 7, vocabulary=3) for _ in range(2))
    for first in range(0, 200, 8):
        more(one, first, 8)
    two.load(one.seen, held(one))
    for replay in (one, two):
        more(replay, 1000, 40)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name])
    for left, right in zip(one.draw(55, 8), two.draw(55, 8), strict=True):
        assert (left == right).all()
    inputs, _, logits = one.draw(55, 40)
    assert len(inputs) == 20 and (logits == inputs[:, :, None]).all()  # each has its own
    smaller = Replay(0.5, 4, 4, 7, vocabulary=3)
    smaller.load(one.seen, held(one))
    assert torch.equal(smaller.tensors()["replay"], one.tensors()["replay"][: 4 * 2 * 4])
    larger = Replay(0.5, 30, 4, 7, vocabulary=3)  # more room than before: what was never filled is never drawn
    larger.load(one.seen, held(one))
    assert all((larger.draw(step, 8)[1] > 0).all() for step in range(50))

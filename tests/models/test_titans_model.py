"""What the Titans model owes its memory, besides the contract of every model (test_models.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nestling.models import build
from nestling.models.config import TitansConfig
from nestling.models.titans import LongTermMemory

torch.set_num_threads(1)
TINY = {"name": "titans", "vocab_size": 61, "width": 32, "layers": 2, "heads": 2}


def tokens(rows, count):
    return torch.randint(0, 61, (rows, count), generator=torch.Generator().manual_seed(0))


def test_persistent_tokens_are_read_before_the_first_and_stream_exactly():
    torch.manual_seed(0)
    model = build({**TINY, "dtype": "float64", "persistent_tokens": 5, "chunk_size": 8})
    text = tokens(2, 40)
    whole, state = model(text)
    assert {block.memory.position for block in state} == {45}
    first, state = model(text[:, :13], model.initial_state(2))
    rest, _ = model(text[:, 13:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-10, atol=1e-12)
    whole.square().mean().backward()
    for block in model.blocks:
        assert block.mixer.persistent.grad.norm() > 0
        block.mixer.persistent.data += 1
    assert not torch.allclose(model(text)[0], whole)


def test_the_outer_gradient_reaches_the_memory_and_its_gates():
    torch.manual_seed(0)
    model, text = build(TINY), tokens(2, 60)
    F.cross_entropy(model(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten()).backward()
    for block in model.blocks:
        for name in ("w1", "w2"):
            assert getattr(block.mixer, name).grad.norm() > 0, name
        for gate in block.mixer.gates.weight.grad.chunk(3):
            assert gate.norm() > 0


def test_gates_are_bounded_and_begin_where_they_should():
    torch.manual_seed(0)
    config = TitansConfig(vocab_size=61, width=64, heads=4, horizons=[16, 2048], theta_max=0.5, mu_max=0.8)
    mixer = LongTermMemory(config, depth=4)
    log_alpha, log_mu, theta = mixer._gates(torch.zeros(1, 1, 64))
    horizons = 1 / (1 - log_alpha.exp()).flatten()
    torch.testing.assert_close(horizons, torch.tensor([16.0, 80.635, 406.37, 2048.0]), rtol=1e-2, atol=0)
    torch.testing.assert_close(log_mu.exp(), torch.full_like(log_mu, 0.4))
    torch.testing.assert_close(theta, torch.full_like(theta, 0.5 * 0.6 / 16 / 2))
    log_alpha, log_mu, theta = mixer._gates(1000 * torch.randn(1, 50, 64))
    assert (log_alpha <= 0).all() and (log_mu.exp() <= 0.8 + 1e-6).all() and (theta >= 0).all()
    assert (theta <= 0.5 * (1 - log_mu.exp()) / 16 * (1 + 1e-6)).all()


@pytest.mark.parametrize("head_width", [16, 64])
def test_the_memory_stays_bounded_for_4k_tokens(head_width):
    torch.manual_seed(0)
    model = build({"name": "titans", "vocab_size": 257, "width": 2 * head_width, "layers": 2, "heads": 2})
    with torch.no_grad():
        logits, state = model(torch.randint(0, 257, (1, 4096)))
    assert torch.isfinite(logits).all()
    for block in state:
        for now, first in zip(block.memory.weights, block.memory.base, strict=True):
            assert 0.3 <= (now.norm() / first.norm()).item() <= 3
            assert not torch.equal(now, first)


def test_it_learns_to_recall_and_only_by_writing():
    """Three pairs of a key and a value, then the keys again in another order; chance is one value in six."""
    torch.manual_seed(0)
    model = build({"name": "titans", "vocab_size": 12, "width": 32, "layers": 1, "heads": 1})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(0)

    def sample(count):
        keys, values = (torch.rand(count, 6, generator=draw).argsort(1)[:, :3] for _ in range(2))
        again = torch.rand(count, 3, generator=draw).argsort(1)
        shown = torch.stack([keys, values + 6], dim=2).flatten(1)
        return torch.cat([shown, keys.gather(1, again)], dim=1), values.gather(1, again) + 6

    def right(count):
        text, answers = sample(count)
        return (model(text)[0][:, 6:].argmax(-1) == answers).float().mean().item()

    for _ in range(150):
        text, answers = sample(64)
        loss = F.cross_entropy(model(text)[0][:, 6:].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert right(200) > 0.9
        for block in model.blocks:
            block.mixer.gates.bias[-1:] = -1e4
        assert right(200) < 0.4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "model.chunk_size: got 0, needs at least 1"),
        ({"mu_max": 1.0}, r"model.mu_max: got 1.0, needs a value in \(0, 1\)"),
        ({"theta_max": 0.0}, "model.theta_max: got 0.0, needs more than 0"),
        ({"horizons": [5, 3]}, "1 < shortest <= longest"),
        ({"read": "never"}, "model.read: got 'never', needs one of before, after, boundary"),
    ],
)
def test_a_wrong_configuration_says_what_is_needed(changes, message):
    with pytest.raises(ValueError, match=message):
        build({**TINY, **changes})

"""Sampling beside the distribution that it names, from a model whose logits are known and always the same."""

from collections import Counter

import pytest
import torch

from nestling.models.sampling import generate

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0])
DRAWS = 3000


def shares(**settings):
    """The share of each token among many drawn ones."""
    drawn = Counter(
        generate(
            lambda tokens, state: (LOGITS.expand(*tokens.shape, -1), state),
            torch.zeros(1, dtype=torch.int64),
            DRAWS,
            **settings,
        )
    )
    return torch.tensor([drawn[token] / DRAWS for token in range(len(LOGITS))])


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_divides_the_logits(temperature, top_k):
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(shares(temperature=temperature, top_k=top_k), expected, rtol=0, atol=0.04)


def test_temperature_zero_takes_the_likeliest():
    assert shares(temperature=0).tolist() == [0, 1, 0, 0, 0]


def test_top_k_draws_among_the_likeliest_only():
    drawn = shares(temperature=1.0, top_k=2)
    expected = torch.tensor([2.0, 1.5]).softmax(-1)
    assert drawn[[0, 2, 4]].tolist() == [0, 0, 0]
    torch.testing.assert_close(drawn[[1, 3]], expected, rtol=0, atol=0.04)


def test_logits_that_are_not_finite_are_told():
    with pytest.raises(ValueError, match="lower continuum.rates"):
        list(generate(lambda tokens, state: (LOGITS / 0 * 0 + torch.zeros(1, 1, 5), state), torch.tensor([1]), 3))

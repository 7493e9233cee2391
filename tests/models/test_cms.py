"""The variants of the Continuum Memory System, and the layers they are made of."""

import pytest
import torch
from torch.func import functional_call

from nestling.models import build
from nestling.models.cms import IndependentLevels, Level, continuum_memory
from nestling.models.layers import Linear, RMSNorm


def random_parts(variant, hidden=(6, 5, 7)):
    torch.manual_seed(0)
    parts = torch.nn.ModuleList(continuum_memory(8, hidden, depth=4, variant=variant)).double().requires_grad_(False)
    for parameter in parts.parameters():
        parameter.add_(torch.randn_like(parameter))
    return parts, torch.randn(2, 9, 8, dtype=torch.float64)


@pytest.mark.parametrize("variant", ["sequential", "nested"])
def test_a_chain_is_one_residual_branch_a_level(variant):
    parts, _ = random_parts(variant)
    assert [type(part) for part in parts] == [Level] * 3
    assert [part.into.out_features for part in parts] == [6, 5, 7]


def test_independent_levels_are_a_weighted_sum():
    (part,), x = random_parts("independent")
    expected = part.weights[0] * part.levels[0](x) + part.weights[1] * part.levels[1](x)
    torch.testing.assert_close(part(x), expected + part.weights[2] * part.levels[2](x), rtol=1e-12, atol=1e-12)
    fresh = IndependentLevels([Level(8, 6, depth=1)])
    assert torch.equal(fresh.weights, torch.ones(1))


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_without_levels_a_block_ends_with_its_mixer(variant):
    sizes = {"vocab_size": 61, "width": 16, "layers": 2, "heads": 2, "level_widths": []}
    model = build({"name": "hope", "level_variant": variant, **sizes})
    assert model.level_parameters() == [] and not any(block.feed_forward for block in model.blocks)
    assert model(torch.zeros(1, 5, dtype=torch.int64))[0].shape == (1, 5, 61)


@pytest.mark.parametrize(("layer", "shape"), [(Linear(8, 6), (3, 6, 8)), (RMSNorm(8, eps=1e-6), (3, 8))])
def test_one_weight_a_row(layer, shape):
    torch.manual_seed(0)
    weights, x = torch.randn(shape), torch.randn(3, 5, 8)
    together = functional_call(layer, {"weight": weights}, (x,))
    for row, weight in enumerate(weights):
        torch.testing.assert_close(together[row], functional_call(layer, {"weight": weight}, (x[row],)))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Linear(8, 6), torch.nn.Linear(8, 6, bias=False)), (RMSNorm(8), torch.nn.RMSNorm(8))]
)
def test_with_their_own_weights_the_layers_are_pytorchs(ours, theirs):
    theirs.weight = ours.weight
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="level_variant: got 'chain', needs one of sequential, nested, independent"):
        build({"name": "hope", "vocab_size": 61, "level_variant": "chain"})

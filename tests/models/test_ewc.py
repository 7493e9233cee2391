"""Elastic weight consolidation: the equation by hand, its state, and that it holds what mattered where it was."""

from copy import deepcopy

import pytest
import torch

from nestling.optim import EWC, Levels


def parameter():
    return torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def gradients(steps):
    return torch.randn(steps, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def levels_of(weights, ewc, period=1, optimizer="sgd"):
    return Levels([{"params": [weights], "name": "slow", "period": period, "optimizer": optimizer}], lr=0.1, ewc=ewc)


def run(levels, weights, grads):
    """The weights after each step."""
    history = []
    for grad in grads:
        weights.grad = grad.clone()
        levels.step()
        history.append(weights.detach().clone())
    return history


def by_hand(theta, grads, strength, every, decay, period):
    """Online EWC under gradient descent: w -= 0.1 sum of (g + strength F (w - w*)) over the steps of a period."""
    fisher, anchor, squares, summed, history = 0 * theta, theta, [], 0 * theta, []
    for step, grad in enumerate(grads, 1):
        summed = summed + grad + strength * fisher * (theta - anchor)
        squares.append(grad**2)
        if step % period == 0:
            theta, summed = theta - 0.1 * summed, 0 * theta
        if step % every == 0:
            fisher, anchor, squares = decay * fisher + sum(squares) / every, theta, []
        history.append(theta)
    return history


@pytest.mark.parametrize(("every", "period"), [(4, 1), (4, 3), (3, 4), (1, 1)])
def test_the_equation(every, period):
    weights, grads = parameter(), gradients(23)
    expected = by_hand(weights.detach().clone(), grads, 2.0, every, 0.7, period)
    found = run(levels_of(weights, EWC(2.0, every, 0.7), period), weights, grads)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_strength_it_is_plain_to_the_bit(optimizer):
    plain, off, on = parameter(), parameter(), parameter()
    grads = gradients(20)
    history = run(levels_of(plain, None, 3, optimizer), plain, grads)
    without = levels_of(off, EWC(0.0, 5), 3, optimizer)
    assert all(map(torch.equal, history, run(without, off, grads)))
    assert not torch.equal(run(levels_of(on, EWC(1.0, 5), 3, optimizer), on, grads)[-1], history[-1])


def test_no_ewc_keeps_nothing():
    weights = parameter()
    levels = levels_of(weights, None)
    run(levels, weights, gradients(9))
    assert levels.state[weights].keys() == {"steps", "updates"}


def test_half_a_period_is_state():
    weights, copy = parameter(), parameter()
    ewc, grads = EWC(3.0, 6, 0.9), gradients(20)
    first, second = levels_of(weights, ewc, 4, "adamw"), levels_of(copy, ewc, 4, "adamw")
    run(first, weights, grads[:9])
    second.load_state_dict(deepcopy(first.state_dict()))
    with torch.no_grad():
        copy.copy_(weights)
    assert torch.equal(run(first, weights, grads[9:])[-1], run(second, copy, grads[9:])[-1])


def test_paused_steps_and_missing_gradients_count_nothing():
    weights = parameter()
    levels = levels_of(weights, EWC(1.0, 4))
    run(levels, weights, gradients(5))
    before = deepcopy(levels.state[weights])
    levels.paused = True
    run(levels, weights, gradients(5))
    levels.paused, weights.grad, kept = False, None, weights.detach().clone()
    assert str(levels.state[weights]) == str(before)
    levels.step()  # a step without a gradient: only its number counts
    assert levels.state[weights]["steps"] == 6 and torch.equal(weights, kept)
    assert torch.equal(levels.state[weights]["squares"], before["squares"])


def test_what_mattered_to_an_old_task_is_held_and_the_rest_is_free():
    """Two quadratic tasks: the first cares about the first weight alone, the second wants both elsewhere."""
    ends = {}
    for strength in (0.0, 50.0):
        weights = torch.nn.Parameter(torch.zeros(2))
        levels = Levels([weights], lr=0.1, optimizer="sgd", ewc=EWC(strength, 20))
        noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        for step in range(40):
            target, cares = ([1.0, 0.0], [1.0, 0.0]) if step < 20 else ([-1.0, -1.0], [0.2, 0.2])
            weights.grad = torch.tensor(cares) * (weights.detach() - torch.tensor(target) + 0.1 * noise[step])
            levels.step()
        ends[strength] = weights.detach()
    assert ends[0.0][0] < 0.6 < 0.8 < ends[50.0][0]
    torch.testing.assert_close(ends[0.0][1], ends[50.0][1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1.0, 5), "strength of EWC: got -1.0, needs a finite number of at least 0"),
        ((1.0, 0), "every of EWC: got 0, needs an integer of at least 1"),
        ((1.0, 5, 1.5), "decay of EWC: got 1.5, needs a number from 0 to 1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EWC(*settings)

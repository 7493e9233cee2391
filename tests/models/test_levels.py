"""Levels: each group moves at its own period, sums its gradients in between, and is byte-equal until then."""

from copy import deepcopy as copy_of

import pytest
import torch

from nestling.optim import Levels
from nestling.optim.levels import due


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(steps, shape):
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(1))


def run(optimizer, parameter, grads):
    """Step through the gradients; returns the parameter after each step."""
    history = []
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        history.append(parameter.detach().clone())
    return history


@pytest.mark.parametrize("period", [1, 3, 4, 100])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_level_moves_once_a_period(period, optimizer):
    (parameter,) = parameters((4, 3))
    start = parameter.detach().clone()
    levels = Levels([{"params": [parameter], "name": "slow", "period": period, "optimizer": optimizer}], lr=0.1)
    history = [start, *run(levels, parameter, gradients(17, (4, 3)))]
    moved = [step for step in range(1, 18) if not torch.equal(history[step], history[step - 1])]
    assert moved == [step for step in range(1, 18) if step % period == 0]
    assert levels.updates == {"slow": 17 // period}


def test_sgd_takes_the_sum_of_the_period():
    (parameter,) = parameters((3,))
    start, grads = parameter.detach().clone(), gradients(4, (3,))
    levels = Levels([{"params": [parameter], "period": 4, "optimizer": "sgd"}], lr=0.1)
    end = run(levels, parameter, grads)[-1]
    torch.testing.assert_close(end, start - 0.1 * grads.sum(0))  # Eq. 71


def test_adamw_is_torchs():
    ours, theirs = parameters((5, 2)) + parameters((5, 2))
    settings = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    a, b = Levels([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for grad in gradients(25, (5, 2)):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adamw_on_a_slow_level_sees_summed_gradients():
    slow, fast = parameters((6,)) + parameters((6,))
    grads = gradients(12, (6,))
    run(Levels([{"params": [slow], "period": 3}], lr=0.01), slow, grads)
    run(Levels([fast], lr=0.01), fast, grads.view(4, 3, 6).sum(1))
    torch.testing.assert_close(slow, fast)


def test_sgd_momentum_is_torchs():
    ours, theirs = parameters((5,)) + parameters((5,))
    a = Levels([ours], lr=0.1, optimizer="sgd", momentum=0.9)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for grad in gradients(10, (5,)):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("period", "tokens_per_step"), [(1000, 300), (600, 300), (100, 300), (299, 100)])
def test_periods_in_tokens(period, tokens_per_step):
    moves = [step for step in range(1, 50) if due(step, period, "tokens", tokens_per_step)]
    borders = {-(-multiple // tokens_per_step) for multiple in range(period, 49 * tokens_per_step + 1, period)}
    assert moves == sorted(borders)


def test_the_half_filled_accumulator_is_state():
    (parameter,), (copy,) = parameters((4,)), parameters((4,))
    grads = gradients(6, (4,))
    groups = {"name": "slow", "period": 4}
    first = Levels([{"params": [parameter], **groups}], lr=0.1)
    run(first, parameter, grads[:2])
    second = Levels([{"params": [copy], **groups}], lr=0.1)
    second.load_state_dict(copy_of(first.state_dict()))
    assert torch.equal(run(first, parameter, grads[2:])[-1], run(second, copy, grads[2:])[-1])


def test_update_norms_are_what_moved():
    fast, slow = parameters((4,), (3,))
    levels = Levels([{"params": [fast], "name": "fast"}, {"params": [slow], "name": "slow", "period": 2}], lr=0.1)
    start = fast.detach().clone()
    fast.grad, slow.grad = torch.ones(4), torch.ones(3)
    levels.step()
    norms = levels.pop_update_norms()
    assert set(norms) == {"fast"}
    torch.testing.assert_close(norms["fast"].sqrt(), (fast.detach() - start).norm())
    assert levels.pop_update_norms() == {}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_level_does_not_know_of_the_steps(optimizer):
    """It goes on as if they had not been: no decay, no momentum, no count; the other level takes them in."""
    grads, others = gradients(9, (3, 2)), gradients(9, (3, 2))

    def levels_of(slow, fast):
        groups = [{"params": [slow], "name": "slow", "period": 2}, {"params": [fast], "name": "fast"}]
        return Levels(groups, lr=0.1, weight_decay=0.1, optimizer=optimizer)

    (slow, fast), (alone, unfrozen) = parameters((3, 2), (3, 2)), parameters((3, 2), (3, 2))
    levels, reference = levels_of(slow, fast), levels_of(alone, unfrozen)
    for step in range(9):
        levels.frozen = frozenset({"slow"}) if 3 <= step < 6 else frozenset()
        slow.grad, fast.grad = grads[step].clone(), others[step].clone()
        levels.step()
        if not levels.frozen:
            alone.grad, unfrozen.grad = grads[step].clone(), others[step].clone()
            reference.step()
    assert torch.equal(slow, alone) and not torch.equal(fast, unfrozen)
    for key, value in reference.state[alone].items():
        assert torch.equal(torch.as_tensor(levels.state[slow][key]), torch.as_tensor(value)), key
    assert levels.updates == {"slow": 3, "fast": 9}


def test_a_missing_gradient_does_not_shift_the_period():
    a, b = parameters((3,), (3,))
    levels = Levels([{"params": [a, b], "period": 2, "optimizer": "sgd"}], lr=1.0)
    start = b.detach().clone()
    for step in range(1, 5):
        a.grad, b.grad = torch.ones(3), None if step == 1 else torch.ones(3)
        levels.step()
        if step == 2:
            torch.testing.assert_close(b.detach(), start - 1)
    torch.testing.assert_close(b.detach(), start - 3)


def test_a_level_without_gradients_stays():
    (a,) = parameters((3,))
    start = a.detach().clone()
    levels = Levels([{"params": [a], "period": 2}], lr=1.0, weight_decay=0.1)
    for _ in range(4):
        levels.step()
    assert torch.equal(a, start)


def test_a_copy_goes_on_and_knows_its_updates():
    (a,) = parameters((3,))
    levels = Levels([{"params": [a], "name": "slow", "period": 2}], lr=0.1)
    run(levels, a, gradients(5, (3,)))
    again = copy_of(levels)
    assert again.updates == {"slow": 2}
    again.step()
    loaded = Levels([{"params": [a], "name": "slow", "period": 2}], lr=0.1)
    loaded.load_state_dict(levels.state_dict())
    assert loaded.updates == {"slow": 2}


def test_a_level_has_one_period():
    a, b = parameters((3,), (3,))
    with pytest.raises(ValueError, match="got periods of 1 steps and 2 steps, needs one period"):
        Levels([{"params": [a], "name": "x"}, {"params": [b], "name": "x", "period": 2}])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"period": 0}, "period of level 'slow': got 0, needs an integer of at least 1"),
        ({"unit": "hours"}, "needs one of steps, tokens"),
        ({"unit": "tokens"}, "needs the tokens of one step"),
        ({"optimizer": "adam"}, "needs one of adamw, sgd"),
        ({"lr": -1.0}, "lr of level 'slow': got -1.0, needs a number of at least 0"),
        ({"betas": (0.9, 1.0)}, r"needs two numbers in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        Levels([{"params": parameters((2,)), "name": "slow", **setting}])

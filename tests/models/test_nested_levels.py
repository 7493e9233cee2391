"""Nested levels under the schedule drive (Eq. 72): the slower level learns what a level is reset to."""

from copy import deepcopy

import pytest
import torch

from nestling.optim import COMPONENTS, Levels

RULES = ["sgd", "adamw", "m3", "delta_momentum", "deep_momentum"]


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def gradients(steps, shape):
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def nested(fast, slow, fast_rule="sgd", slow_rule="sgd", **settings):
    groups = [
        {"params": [fast], "name": "fast", "period": 2, "lr": 0.1, "optimizer": fast_rule, "slower": "slow"},
        {"params": [slow], "name": "slow", "period": 6, "lr": 0.05, "optimizer": slow_rule},
    ]
    return Levels([{**group, **settings} for group in groups])


def run(levels, fast, slow, grads):
    """The fast parameter after each step."""
    history = []
    for grad in grads:
        fast.grad, slow.grad = grad.clone(), torch.ones_like(slow)
        levels.step()
        history.append(fast.detach().clone())
    return history


def test_the_slower_level_learns_the_start_that_the_level_is_reset_to():
    fast, slow = parameters((3, 2), (4,))
    start, grads = fast.detach().clone(), gradients(20, (3, 2))
    levels = nested(fast, slow)
    history = run(levels, fast, slow, grads)
    theta, moved = start, []
    for step in range(1, 21):
        if step % 2 == 0:
            theta = theta - 0.1 * grads[step - 2 : step].sum(0)
        if step % 6 == 0:
            start = theta = start - 0.05 * grads[step - 6 : step].sum(0)
        torch.testing.assert_close(history[step - 1], theta, rtol=1e-12, atol=1e-12)
        moved.append(step > 1 and not torch.equal(history[step - 1], history[step - 2]))
    assert [step for step, yes in enumerate(moved, start=1) if yes] == list(range(2, 21, 2))
    assert levels.updates == {"fast": 10, "slow": 3}


@pytest.mark.parametrize("slow_rule", RULES)
@pytest.mark.parametrize("fast_rule", ["sgd", "adamw"])
def test_the_start_moves_as_a_parameter_of_the_slower_level_would(fast_rule, slow_rule):
    fast, slow = parameters((3, 2), (4,))
    settings = {"weight_decay": 0.1}
    levels, grads = nested(fast, slow, fast_rule, slow_rule, **settings), gradients(25, (3, 2))
    (alone,) = parameters((3, 2))
    slower = Levels([alone], lr=0.05, period=6, optimizer=slow_rule, **settings)
    fast_steps = run(levels, fast, slow, grads)
    slow_steps = run(slower, alone, slow, grads)
    for end in range(5, 25, 6):
        torch.testing.assert_close(fast_steps[end], slow_steps[end], rtol=1e-12, atol=1e-12)
        assert not torch.equal(fast_steps[end - 1], slow_steps[end - 1])


def test_the_start_is_state():
    (fast, slow), (copy, other) = parameters((3, 2), (4,)), parameters((3, 2), (4,))
    grads, rules = gradients(20, (3, 2)), ("adamw", "adamw")
    first, second = nested(fast, slow, *rules), nested(copy, other, *rules)
    run(first, fast, slow, grads[:9])
    second.load_state_dict(deepcopy(first.state_dict()))
    with torch.no_grad():
        copy.copy_(fast)
    assert torch.equal(run(first, fast, slow, grads[9:])[-1], run(second, copy, other, grads[9:])[-1])
    state = first.state[fast]
    assert all(value.shape == fast.shape for value in state.values() if torch.is_tensor(value))
    assert {"start", "start_gradient", "start_exp_avg", "start_updates"} <= state.keys()


def test_three_levels_deep_each_start_moves_with_the_next_level():
    parts = parameters((2,), (2,), (2,))
    begin, grads = [p.detach().clone() for p in parts], gradients(8, (2,))
    periods = {"a": (1, "b"), "b": (2, "c"), "c": (4, None)}
    levels = Levels(
        [
            {"params": [p], "name": name, "period": period, "slower": slower, "lr": 0.1, "optimizer": "sgd"}
            for p, (name, (period, slower)) in zip(parts, periods.items(), strict=True)
        ]
    )
    for grad in grads:
        for p in parts:
            p.grad = grad.clone()
        levels.step()
    # All have been reset or have moved at step 8; with one rate the sums of the starts' gradients are all of them.
    for p, start in zip(parts, begin, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.1 * grads.sum(0))
    assert levels.updates == {"a": 8, "b": 4, "c": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slower": "middle"}, r"slower of level 'fast': got 'middle', needs the name of another level \(slow\)"),
        ({"slower": "fast"}, "needs the name of another level"),
        ({"period": 4}, "got a period of 4 steps inside one of 6 steps"),
        ({"unit": "tokens", "tokens_per_step": 1}, "got a period of 2 tokens inside one of 6 steps"),
    ],
)
def test_wrong_nesting_is_named(settings, message):
    fast, slow = parameters((2,), (2,))
    groups = [{"params": [fast], "name": "fast", "period": 2, "slower": "slow", **settings}]
    with pytest.raises(ValueError, match=message):
        Levels([*groups, {"params": [slow], "name": "slow", "period": 6}])


def test_the_rules_here_are_all_that_need_no_layer():
    assert set(RULES) == set(COMPONENTS) - {"muon", "delta_gradient_descent"}

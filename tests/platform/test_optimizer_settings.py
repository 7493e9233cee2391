"""Which rule moves which parameter: from a job's keys to the optimizer's groups."""

from dataclasses import replace
from typing import get_args

import pytest

from nestling.config import ConfigError, from_yaml, load, to_yaml
from nestling.config.optimizers import MATRIX_OPTIMIZERS, Optimizer
from nestling.models import build
from nestling.optim import COMPONENTS, Levels
from nestling.training.groups import MATRIX_RULES, parameter_groups


def job(*overrides):
    return load("jobs/quickstart.yaml", ["model.width=32", "model.heads=2", "model.layers=1", *overrides])


def groups_of(config):
    """Groups by level, with the names of their parameters."""
    model = build(replace(config.model, vocab_size=257))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    Levels(groups)
    return [group | {"names": {names[id(parameter)] for parameter in group["params"]}} for group in groups]


def test_every_rule_takes_its_settings_from_the_job():
    config = job(
        "training.optimizer=m3",
        "training.betas=[0.8, 0.9]",
        "optimizers.m3={slow_period: 7, mode: literal, betas: [0.5, 0.6, 0.7]}",
        "optimizers.deep_momentum.hidden=3",
        "optimizers.muon.nesterov=false",
        "levels=[{width: 32, optimizer: muon, learning_rate: 0.02}, {width: 16, optimizer: deep_momentum}]",
    )
    for each in (config, from_yaml(to_yaml(config))):
        groups = {(group["name"], group["matrix"]): group for group in groups_of(each)}
        base = groups["base", True]
        assert (base["optimizer"], base["slow_period"], base["mode"]) == ("m3", 7, "literal")
        assert list(base["betas"]) == [0.5, 0.6, 0.7]
        assert (groups["level1", True]["nesterov"], groups["level1", True]["lr"]) == (False, 0.02)
        assert (groups["level2", True]["hidden"], groups["level2", True]["betas"]) == (3, (0.8, 0.9))


def test_only_linear_maps_are_matrices_and_the_rest_has_a_rate_of_its_own():
    groups = groups_of(
        job(
            "training.optimizer=m3",
            "training.learning_rate=1e-4",
            "training.adamw_learning_rate=3e-3",
            "levels=[{width: 32, optimizer: sgd, learning_rate: 0.1}]",
        )
    )
    base = [group for group in groups if group["name"] == "base"]
    matrices = next(group for group in base if group["matrix"])
    assert matrices["lr"] == matrices["peak_lr"] == 1e-4
    assert "blocks.0.mixer.memories.key_w1" in matrices["names"]
    others = set().union(*(group["names"] for group in base if not group["matrix"]))
    assert {"embedding.weight", "head.weight", "blocks.0.mixer.conv.weight", "norm.weight"} <= others
    assert all(group["lr"] == 3e-3 for group in base if not group["matrix"])
    assert all(group["lr"] == 0.1 for group in groups if group["name"] == "level1")
    decayed = {name: group["weight_decay"] > 0 for group in groups for name in group["names"]}
    assert decayed["head.weight"] and not decayed["embedding.weight"] and not decayed["norm.weight"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.optimizer=adam", "training.optimizer: got 'adam', needs one of adamw, sgd, m3, muon, delta_mom"),
        ("levels.0.optimizer=m33", "levels.0.optimizer: got 'm33', needs one of adamw, sgd, m3, muon"),
        ("optimizers.m3.betas=[0.9, 0.9]", r"optimizers.m3.betas: got \[0.9, 0.9\], needs three values"),
        ("optimizers.m3.betas=[0.9, 0.9, 1]", "optimizers.m3.betas: got 1.0, needs a value from 0 to below 1"),
        ("optimizers.m3.slow_weight=-1", "optimizers.m3.slow_weight: got -1.0, needs a finite value of at least 0"),
        ("optimizers.m3.slow_period=0", "optimizers.m3.slow_period: got 0, needs at least 1"),
        ("optimizers.m3.mode=printed", "optimizers.m3.mode: got 'printed', needs one of ema, literal, adamuon"),
        ("optimizers.muon.ns_steps=0", "optimizers.muon.ns_steps: got 0, needs at least 1"),
        ("optimizers.deep_momentum.hidden=0", "optimizers.deep_momentum.hidden: got 0, needs at least 1"),
        ("optimizers.sgd.momentum=1", "optimizers.sgd.momentum: got 1.0, needs a value from 0 to below 1"),
        (
            "optimizers.adamw.betas=[0.9, 0.9]",
            "optimizers.adamw.betas: .* AdamW's settings are training.betas and train",
        ),
        ("optimizers.bucket=0", "optimizers.bucket: got 0, needs at least 1"),
        ("optimizers.m3.slow_perod=3", "optimizers.m3.slow_perod: unknown key; .* optimizers.m3.slow_period"),
        ("training.adamw_learning_rate=0", "training.adamw_learning_rate: got 0.0, needs a finite value above 0"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        job(override)


def test_a_rate_that_no_rule_uses_is_told(caplog):
    with caplog.at_level("WARNING"):
        for override in ("training.optimizer=m3", "levels.0.optimizer=muon", "training.learning_rate=0.1"):
            assert "adamw_learning_rate" not in caplog.text
            job("training.adamw_learning_rate=1e-3", override)
    assert "training.adamw_learning_rate is not used: no optimizer is m3 or muon" in caplog.text


def test_names_are_those_of_the_rules():
    assert set(get_args(Optimizer)) == set(COMPONENTS)
    assert list(MATRIX_OPTIMIZERS) == MATRIX_RULES

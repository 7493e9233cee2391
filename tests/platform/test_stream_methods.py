"""Methods against forgetting on a stream: each by its equation, all together on ranks and in a snapshot, and what each
is for on two domains that follow each other."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from nestling.config import ConfigError, from_yaml, load, to_yaml
from nestling.config.stream import StreamConfig
from nestling.data import IGNORED, Tokenizer
from nestling.training.dark import DarkKnowledge
from nestling.training.schedule import rewarming


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_the_loss_of_der(pieces):
    """Four new sequences and three replayed ones, of which the last token is masked, in micro-batches."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 6, 11, generator=generator, requires_grad=True)
    remembered = torch.randn(3, 6, 11, generator=generator).half()
    targets = torch.randint(0, 11, (7, 6), generator=generator)
    targets[6, 5] = IGNORED
    mask = torch.ones(3, 6)
    mask[2, 5] = 0
    right = 0.7 * (((logits[4:] - remembered.float()) ** 2).mean(-1) * mask).sum()
    dark = DarkKnowledge(0.7, 4, remembered, {0: 2, 1: 3})
    parts = zip(logits.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
    found = sum(dark.penalty(some, answers) for some, answers in parts)
    torch.testing.assert_close(found, right)
    for mine, theirs in zip(*(torch.autograd.grad(loss, logits) for loss in (found, right)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(torch.stack(list(dark.mine.values())), logits[2:4].half())


def test_the_rate_rises_after_an_alarm_and_decays_again():
    stream = StreamConfig(rewarm_factor=3.0, rewarm_steps=4, redecay_steps=4)
    cosine = [2 + math.cos(math.pi * step / 4) for step in (1, 2, 3)]
    expected = [1.5, 2.0, 2.5, 3.0, *cosine, 1.0, 1.0]
    assert [rewarming(since, stream) for since in range(1, 10)] == pytest.approx(expected, abs=1e-12)
    assert rewarming(math.inf, stream) == 1.0  # there was no alarm
    assert all(rewarming(since, StreamConfig()) == 1.0 for since in range(1, 80))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ewc_strength=-1"], "stream.ewc_strength: got -1.0, needs a finite value of at least 0"),
        (["ewc_every=0"], "stream.ewc_every: got 0, needs at least 1"),
        (["ewc_decay=1.5"], "stream.ewc_decay: got 1.5, needs a fraction from 0 to 1"),
        (["rewarm_factor=0.5"], "stream.rewarm_factor: got 0.5, needs a finite value of at least 1"),
        (["redecay_steps=0"], "stream.redecay_steps: got 0, needs at least 1"),
        (["der_alpha=0.5"], "stream.der_alpha: got 0.5, but nothing is replayed whose logits could be kept"),
        (
            ["der_alpha=0.5", "replay_share=0.1", "replay_bytes=100000"],
            "stream.replay_bytes: got 100000, but one sequence of data.sequence_length=256 and logits of 257 tokens "
            "takes 133632; give room for many",
        ),
        (
            ["replay_share=0.1", "replay_bytes=100"],
            "stream.replay_bytes: got 100, but one sequence of data.sequence_length=256 takes 2048",
        ),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ConfigError) as error:
        load("jobs/five-domains.yaml", [f"stream.{override}" for override in overrides])
    assert str(error.value).startswith(message)


LENGTH, ROWS = 64, 8
#: Steps of each domain, and the step that a snapshot is of, in the middle of a period of each.
LONG, SHORT, SAVED = 80, 24, 30
SMALL = [
    *("model.name=transformer", "model.width=32", "model.layers=1", "model.heads=2", "model.vocab_size=257"),
    *(f"data.sequence_length={LENGTH}", f"training.batch_tokens={LENGTH * ROWS}", "training.warmup_steps=5"),
    *("training.learning_rate=5e-3", "stream.replay_bytes=4000000", "levels=[]"),
]
EWC = ["stream.ewc_strength=10000", "stream.ewc_every=8"]
REPLAY = ["stream.replay_share=0.3"]
DER = [*REPLAY, "stream.der_alpha=0.5"]
REWARM = [
    *("stream.rewarm_factor=3", "stream.rewarm_steps=3", "stream.redecay_steps=20"),
    *("stream.drift_delta=0", "stream.drift_threshold=0.5"),
]
#: Alone, on one process, beside the same without it ("faint": DER++ of no weight).
LOW = "training.learning_rate=1e-3"
METHODS = {
    "plain": [],
    "ewc": EWC,
    "der": DER,
    "faint": [*REPLAY, "stream.der_alpha=1e-9"],
    "rewarm": [*REWARM, LOW],
    "low": [LOW],
}
#: All at once, with a level of period 4, on one process and on two.
LEVELS = "levels=[{parameters: ['blocks.0.feed_forward.*'], period: 4}]"
ALL = [*EWC, *DER, *REWARM, LEVELS]
STAGES = {f"zero{stage}": [*ALL, f"training.zero_stage={stage}", "training.micro_batch=2"] for stage in range(3)}


def domains():
    """Batches of English and of lines of Unicode names, LONG to learn and eight more of each to test with."""
    from nestling.data.streams import Record
    from nestling.data.streams.content import batches
    from nestling.data.streams.five_domains import _records

    learnt, held = {}, {}
    for name in ("english", "unicode"):
        chosen = [Record("0", 0, 1, text, key, None, name) for domain, key, text in _records(False) if domain == name]
        made = batches(chosen[:35], Tokenizer.bytes(), LENGTH, ROWS)
        learnt[name], held[name] = made[:LONG], made[LONG : LONG + 8]
    return learnt, held


@torch.no_grad()
def nats(model, batches):
    """Mean loss a token."""
    halves = zip(*((batch.inputs, batch.targets) for batch in batches), strict=True)
    inputs, targets = (torch.from_numpy(np.concatenate(half)).long() for half in halves)
    return float(F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORED))


def learn(training, stream, keeper=None):
    """Learn from step `done` on; of each step the loss, that before learning of the new sequences, and the rate."""
    steps = []
    for batch in stream[training.done :]:
        before = training.window_nats
        training.learn(batch)
        steps.append((training.loss, training.window_nats - before, training.record()["train/learning_rate"]))
        if keeper is not None and training.done == SAVED:
            keeper.save({})
    return steps


def result(training, steps):
    from nestling.training.engine import full_weights

    return {
        "steps": steps,
        "weights": full_weights(training.engine, keep=True),
        "replay": {name: tensor.clone() for name, tensor in training.replay.tensors().items()},
        "drifted": training.drifted,
        "kinds": {kind for state in training.levels.state.values() for kind in state},
    }


@torch.no_grad()
def distance(training):
    """Mean squared difference of the model's logits from those that are remembered."""
    inputs, _, logits = training.replay.draw(1, 200)
    return float((training.model(torch.from_numpy(inputs).long())[0] - torch.from_numpy(logits)).square().mean())


def worker(rank, world, place, jobs):
    """One process of `world`: learns two domains by every job and leaves what came of it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/init{world}", rank=rank, world_size=world)
    from nestling.checkpoint import Store
    from nestling.training.keeper import Keeper
    from nestling.training.stream_loop import StreamTraining

    (learnt, held), results = domains(), {}
    store = Store(Path(place, "saved"))
    for label, job in jobs.items():
        training = StreamTraining(from_yaml(job), torch.device("cpu"), rank, world)
        if label in METHODS:
            steps = learn(training, learnt["english"])
            after = nats(training.model, held["english"])
            steps += learn(training, learnt["english"] + learnt["unicode"])
            results[label] = result(training, steps) | {
                "forgetting": nats(training.model, held["english"]) - after,
                "new": nats(training.model, held["unicode"]),
                "distance": distance(training) if "der_alpha" in job and training.config.stream.der_alpha else None,
            }
            continue
        stream = learnt["english"][:SHORT] + learnt["unicode"][:SHORT]
        keeper = Keeper(training, store, None) if label == "zero2" and world == 2 else None
        results[label] = result(training, learn(training, stream, keeper))
        if keeper is not None:
            assert not keeper.close()
            other = StreamTraining(from_yaml(job), torch.device("cpu"), rank, world)
            assert Keeper(other, store, None).restore() == SAVED
            results["resumed"] = result(other, learn(other, stream))
    torch.save(results, Path(place, f"results{world}-{rank}"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of every job, by processes and rank."""
    place = tmp_path_factory.mktemp("methods")

    def job(*overrides, workers):
        places = [f"run.dir={place}", f"training.workers={workers}"]
        return to_yaml(load("jobs/five-domains.yaml", [*SMALL, *places, *overrides]))

    for world in (1, 2):
        jobs = {label: job(*keys, workers=world) for label, keys in STAGES.items()}
        if world == 1:
            jobs |= {label: job(*keys, workers=1) for label, keys in METHODS.items()}
        mp.spawn(worker, (world, str(place), jobs), nprocs=world)
    ranks = [(1, 0), (2, 0), (2, 1)]
    return {at: torch.load(place / f"results{at[0]}-{at[1]}", weights_only=False) for at in ranks}


@pytest.mark.slow
def test_all_together_are_equal_on_ranks_and_stages_and_after_a_snapshot(results):
    one, two = results[1, 0], results[2, 0]
    reference = one["zero0"]
    assert SHORT < reference["drifted"] < SAVED  # and the snapshot is of the middle of a re-warming
    assert {"squares", "fisher", "anchor", "accumulator"} <= reference["kinds"]
    losses, new, rates = zip(*reference["steps"], strict=True)
    assert max(rates) == pytest.approx(3 * 5e-3)
    for found in (*(one[stage] for stage in STAGES), *(two[stage] for stage in STAGES)):
        theirs = list(zip(*found["steps"], strict=True))
        assert theirs[0] == pytest.approx(losses, rel=1e-5) and theirs[1] == pytest.approx(new, rel=1e-5)
        assert theirs[2] == rates
        for name, weight in reference["weights"].items():
            assert (found["weights"][name] - weight).norm() < 1e-4 * weight.norm(), name
    for stage in STAGES:
        for name, tensor in two[stage]["replay"].items():
            assert len(tensor) and torch.equal(tensor, results[2, 1][stage]["replay"][name])
    whole, resumed = two["zero2"], two["resumed"]
    assert resumed["steps"] == whole["steps"][SAVED:]
    for kind in ("weights", "replay"):
        for name, tensor in whole[kind].items():
            assert torch.equal(tensor, resumed[kind][name]), name


@pytest.mark.slow
def test_each_does_what_it_is_for(results):
    found = results[1, 0]
    print({label: {k: v for k, v in found[label].items() if isinstance(v, float | int)} for label in METHODS})
    assert found["ewc"]["forgetting"] < 0.5 * found["plain"]["forgetting"]
    assert found["der"]["distance"] < 0.5 * found["faint"]["distance"]  # replay alone lets logits drift away
    assert found["faint"]["forgetting"] < found["plain"]["forgetting"]
    assert found["rewarm"]["drifted"] > LONG
    learnt = {label: sum(nats for _, nats, _ in found[label]["steps"][LONG:]) for label in ("rewarm", "low")}
    assert learnt["rewarm"] < 0.99 * learnt["low"]  # of the new domain, before learning

"""What a source may not write stays as it is, to the bit, weights and optimizer state, under every ZeRO stage."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from nestling.config import from_yaml, load, to_yaml
from nestling.data.streams import Batch

pytestmark = pytest.mark.slow

WORLD = 2
LEVELS = ("level1", "level2", "base")
JOB = [
    *("training.batch_tokens=64", "data.sequence_length=16", "model.width=16", "model.heads=2", "model.layers=1"),
    *("model.vocab_size=257", "training.warmup_steps=0", "training.schedule=constant", "stream.replay_share=1"),
    # Accumulators are half filled when a window begins, and momenta are there.
    "levels=[{width: 16, period: 2}, {width: 16, period: 3, optimizer: muon}]",
    "stream.sources=[{source: embedded:five-domains, name: lasting}, {source: embedded:five-domains, name: mood, "
    "levels: [level1]}, {source: embedded:five-domains, name: read, levels: []}]",
]
#: Source and batches of each window. The fifth step of "lasting" leaves no accumulator empty.
WINDOWS = (("lasting", 5), ("mood", 3), ("read", 3), ("lasting", 2))


def batch(number, first="a", last="z"):
    tokens = np.random.default_rng(number).integers(ord(first), ord(last) + 1, (4, 17), np.int32)
    domains = np.zeros((4, 16), np.int16)
    return Batch(tokens[:, :-1], tokens[:, 1:], domains, ["some"], [64])


def worker(rank, place, jobs):
    """One of the processes: every job's state after each window, by level."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/init", rank=rank, world_size=WORLD)
    from nestling.training.groups import level_members
    from nestling.training.state import engine_pieces, optimizer_scalars
    from nestling.training.stream_loop import StreamTraining

    results = {}
    for stage, text in jobs.items():
        config = from_yaml(text)
        training = StreamTraining(config, torch.device("cpu"), rank, WORLD)
        members, seen = level_members(config), []
        for source, count in WINDOWS:
            training.open(source)
            losses = []
            for _ in range(count):
                training.learn(batch(training.done))
                losses.append(training.loss)
            pieces, scalars = engine_pieces(training.engine), optimizer_scalars(training.engine)
            found = {"losses": losses, "updates": dict(training.levels.updates), "replay": training.replay.seen}
            for level, names in members.items():
                digest, kinds = hashlib.sha256(), set()
                for piece in sorted(pieces, key=lambda piece: piece.name):
                    kind, _, name = piece.name.partition("/")
                    if name in names:
                        digest.update(piece.data.numpy().tobytes())
                        kinds.add(kind)
                digest.update(repr([sorted(scalars[name].items()) for name in names]).encode())
                found[level] = digest.hexdigest(), kinds
            seen.append(found)
        results[stage] = seen
    torch.save(results, Path(place, f"results{rank}"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By rank and ZeRO stage, what was found after each window."""
    place = tmp_path_factory.mktemp("policies")
    changes = [[*JOB, f"training.workers={WORLD}", f"training.zero_stage={stage}"] for stage in range(4)]
    jobs = {
        stage: to_yaml(load("jobs/five-domains.yaml", change, streamed=True)) for stage, change in enumerate(changes)
    }
    mp.spawn(worker, (str(place), jobs), nprocs=WORLD)
    return [torch.load(place / f"results{rank}", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("rank", range(WORLD))
def test_only_the_levels_that_a_source_may_write_change(results, rank, stage):
    first, mood, read, last = results[rank][stage]
    kinds = set.union(*(first[level][1] for level in LEVELS))
    assert {"weight", "accumulator", "exp_avg", "momentum"} <= kinds  # there was a state that could have changed
    assert [level for level in LEVELS if mood[level] != first[level]] == ["level1"]
    assert [level for level in LEVELS if read[level] != mood[level]] == []
    assert [level for level in LEVELS if last[level] != read[level]] == list(LEVELS)
    assert [found["updates"] for found in (first, mood, read, last)] == [
        {"level1": 2, "level2": 1, "base": 5},
        {"level1": 4, "level2": 1, "base": 5},
        {"level1": 4, "level2": 1, "base": 5},
        {"level1": 5, "level2": 2, "base": 7},
    ]
    assert [found["replay"] for found in (first, mood, read, last)] == [20, 20, 20, 28]


def test_every_stage_gives_the_same_losses(results):
    first, *others = [[loss for window in results[0][stage] for loss in window["losses"]] for stage in range(4)]
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-5)


def begin_alone(place):
    """What DeepSpeed wants to see in a process of its own."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/alone", rank=0, world_size=1)


def reading(rank, place, text):
    """Weights after two windows of a lasting source, which do not depend on what was only read between them."""
    begin_alone(place)
    from nestling.training.state import engine_pieces
    from nestling.training.stream_loop import StreamTraining

    found = []
    for other in (100, 200):
        training = StreamTraining(from_yaml(text), torch.device("cpu"), 0, 1)
        for source, first in (("lasting", 0), ("read", other), ("lasting", 10)):
            training.open(source)
            for number in range(first, first + 3):
                training.learn(batch(number))
        found.append(b"".join(piece.data.numpy().tobytes() for piece in engine_pieces(training.engine)))
    torch.save(found, Path(place, "read"))


def test_what_is_only_read_does_not_reach_what_others_learn_by_the_carried_state(tmp_path):
    config = load("five-domains", [*JOB, "stream.carry_state=true"], streamed=True)
    mp.spawn(reading, (str(tmp_path), to_yaml(config)), nprocs=1)
    one, other = torch.load(tmp_path / "read")
    assert one == other


def warming(rank, place, text):
    """Of each source alarms after its text has turned from letters to digits, and all rates before and after."""
    begin_alone(place)
    from nestling.training.stream_loop import StreamTraining

    found = {}
    for source in ("mood", "read", "lasting"):
        training, rates = StreamTraining(from_yaml(text), torch.device("cpu"), 0, 1), []
        for opened, count, signs in (
            ("lasting", 12, "az"),
            (source, 12, "az"),
            (source, 4, "09"),
            ("lasting", 1, "az"),
        ):
            training.open(opened)
            for _ in range(count):
                training.learn(batch(training.done, *signs))
            record = training.record()
            rates.append({name: rate for name, rate in record.items() if name.endswith("/learning_rate")})
        found[source] = training.drifts, rates
    torch.save(found, Path(place, "warmed"))


def test_a_source_that_may_not_write_every_level_warms_nobodys_rate(tmp_path):
    """Nor do its steps take a warmer one; the control: an alarm of a source that may, raises all."""
    alarm = ["stream.drift_delta=0", "stream.drift_threshold=0.5", "training.learning_rate=0.02"]
    config = load("five-domains", [*JOB, *alarm, "stream.rewarm_factor=3", "stream.rewarm_steps=2"], streamed=True)
    mp.spawn(warming, (str(tmp_path), to_yaml(config)), nprocs=1)
    for source, (alarms, (before, *_, last)) in torch.load(tmp_path / "warmed").items():
        assert alarms and len(before) == 4, source
        assert all((last[name] > before[name]) == (source == "lasting") for name in before), source
        assert source == "lasting" or last == before

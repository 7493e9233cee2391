"""Fast state carried along a stream: lanes hold every token once, and memories read them as one long text; any number
of workers sees the same, and a snapshot brings the state back to the bit."""

import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from nestling.config import ConfigError, from_yaml, load, to_yaml
from nestling.data import IGNORED, Tokenizer
from nestling.data.streams.content import batches
from nestling.data.streams.source import Record
from nestling.models import build
from nestling.models.fast_state import Continuing, leaves, mapped
from nestling.training.lanes import Lanes

LENGTH, ROWS = 8, 3
SEPARATOR = Tokenizer.bytes().separator


def records(seed, count):
    """Texts of two domains; some go on in the next record."""
    draw = random.Random(seed)
    texts = ["".join(draw.choices("abcdé ", k=draw.randrange(1, 40))) for _ in range(count)]
    return [Record("p", n, n + 1, text, "", None, "ab"[n % 2], draw.random() < 0.7) for n, text in enumerate(texts)]


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_lanes_hold_every_token_once_and_in_order(count):
    text, domains = [], []
    for record in records(count, count):
        ids = [*record.text.encode(), *([SEPARATOR] if record.whole else [])]
        text, domains = text + ids, domains + [record.domain] * len(ids)
    made = batches(records(count, count), Tokenizer.bytes(), LENGTH, ROWS, lanes=True)
    assert len(made) == math.ceil(math.ceil(len(text) / ROWS) / LENGTH)
    before = SEPARATOR
    read, known, sizes = [], [], []
    for row in range(ROWS):
        inputs, targets = (sum((list(getattr(b, half)[row]) for b in made), []) for half in ("inputs", "targets"))
        names = [batch.names[place] if batch.names else "" for batch in made for place in batch.domains[row]]
        end = sum(target != IGNORED for target in targets)
        assert set(targets[end:]) <= {IGNORED} and set(inputs[end:]) <= {SEPARATOR}  # filled up at its end only
        for token, target in zip(inputs[:end], targets[:end], strict=True):
            assert token == before
            before = target
        read, known, sizes = read + targets[:end], known + names[:end], [*sizes, end]
    assert read == text and known == domains
    assert max(sizes) - min(sizes) <= 1
    assert sum(sum(batch.bytes) for batch in made) == sum(len(record.text.encode()) for record in records(count, count))


MODELS = {
    "hope": {"chunk_size": 4, "level_widths": [8]},
    "hope with momentum": {"name": "hope", "chunk_size": 4, "momentum": 0.5},
    "titans": {"chunk_size": 4, "persistent_tokens": 2},
    "gated_delta_net": {},
    "mamba2": {},
    "lstm": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_carried_state_is_one_long_read(name):
    torch.manual_seed(0)
    config = {"name": name, "vocab_size": 257, "width": 16, "layers": 2, "heads": 2, "dtype": "float64"}
    model = build(config | MODELS[name])
    whole = torch.randint(256, (3, 30))
    expected, _ = model(whole)
    # In micro-batches of two rows, the fourth of which is one of the past, and of widths that end in a chunk's middle.
    lanes, engine, read = Lanes(3), Continuing(model), []
    for start, end in ((0, 10), (10, 17), (17, 30)):
        rows = torch.cat([whole[:, start:end], whole[:1, : end - start]])
        lanes.begin()
        pieces = [lanes.read(engine, piece) for piece in rows.split(2)]
        read.append(torch.cat(pieces))
        lanes.keep()
    torch.testing.assert_close(torch.cat([part[:3] for part in read], dim=1), expected, rtol=1e-9, atol=1e-9)
    assert all(not leaf.requires_grad for leaf in lanes.tensors().values())
    torch.testing.assert_close(read[0][3], expected[0, :10], rtol=1e-9, atol=1e-9)  # the past begins anew
    # Nothing is left of a batch that was refused, and a saved state is the state.
    kept = {name: tensor.clone() for name, tensor in lanes.tensors().items()}
    lanes.begin()
    lanes.read(engine, whole)
    other = Lanes(3)
    other.load(engine, 0, kept, lanes.numbers())
    for one, two in zip(lanes.tensors().values(), other.tensors().values(), strict=True):
        assert torch.equal(one, two)
    assert other.numbers() == lanes.numbers()


def test_a_row_whose_state_diverges_begins_anew_and_no_other():
    torch.manual_seed(0)
    model = build({"name": "hope", "vocab_size": 257, "width": 16, "layers": 1, "heads": 2})
    lanes, engine, readable = Lanes(3), Continuing(model), torch.ones(3, dtype=torch.bool)
    assert lanes.mend(readable) == 0  # there is no state yet
    lanes.begin()
    lanes.read(engine, torch.randint(256, (3, 20)))
    lanes.keep()
    before = leaves(lanes._state)
    assert lanes.mend(readable) == 0
    name, third = "0.memory.weights.memory.0", torch.tensor([2])
    lanes._state = mapped(lambda at, leaf: leaf.index_fill(0, third, math.inf) if at == name else leaf, lanes._state)
    assert lanes.mend(torch.tensor([False, True, True])) == 2
    for name, leaf in leaves(lanes._state).items():
        if isinstance(leaf, Tensor):
            assert not leaf[[0, 2]].any() and torch.equal(leaf[1], before[name][1]), name


def test_the_weights_that_memories_begin_with_are_trained_and_move_the_carried_state():
    torch.manual_seed(0)
    model = build({"name": "hope", "vocab_size": 257, "width": 16, "layers": 1, "heads": 2, "dtype": "float64"})
    lanes, engine, tokens = Lanes(2), Continuing(model), torch.randint(256, (2, 20))
    for _ in range(2):
        lanes.begin()
        logits = lanes.read(engine, tokens)
        lanes.keep()
    logits.square().mean().backward()
    initial = dict(model.named_parameters())["blocks.0.mixer.memories.memory_w1"]
    assert initial.grad.abs().max() > 1e-6
    carried = lanes._state
    with torch.no_grad():
        before = leaves(engine(tokens, carried)[1])
        initial += 1.0
        after = leaves(engine(tokens, carried)[1])
    assert not torch.equal(before["0.memory.weights.memory.0"], after["0.memory.weights.memory.0"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=transformer"], "model.name=transformer has no memory, only a cache"),
        (["model.name=hope_attention"], "has no memory, only a cache"),
        (["continuum.drive=meta", "continuum.periods=[4, 16]", "continuum.rates=[1.0, 1.0]"], "continuum.drive=meta"),
    ],
)
def test_what_cannot_be_carried_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load("jobs/five-domains.yaml", ["stream.carry_state=true", *overrides], streamed=True)


JOB = [
    *("model.width=16", "model.heads=2", "model.layers=1", "model.chunk_size=8", "model.vocab_size=257"),
    *("data.sequence_length=32", "training.batch_tokens=128", "training.warmup_steps=2", "training.log_every=1"),
    *("levels=[{width: 16, period: 1}, {width: 16, period: 3}]", "stream.carry_state=true"),
    *("stream.replay_share=0.3", "stream.replay_bytes=4096"),
]
VARIANTS = {
    "zero0": ["training.zero_stage=0"],
    "zero2": ["training.zero_stage=2", "training.micro_batch=1"],
    "zero3": ["training.zero_stage=3"],
    "checkpointed": ["training.activation_checkpointing=true"],
}
#: Steps after which a row is spoilt, and a snapshot is saved.
SPOILT, SAVED = 2, 5


def learn(rank, world, place, jobs):
    """One process of `world`: every job on three windows; one goes on from its snapshot, with its state and without."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/init{world}", rank=rank, world_size=world)
    from nestling.checkpoint import Store
    from nestling.training import engine
    from nestling.training.keeper import Keeper
    from nestling.training.stream_loop import StreamTraining

    usual = engine.engine_settings

    def cutting_all_parameters_up(*arguments):
        settings = usual(*arguments)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    engine.engine_settings, results = cutting_all_parameters_up, {}
    text = [batch for n in range(3) for batch in batches(records(n, 24), Tokenizer.bytes(), 32, 4, lanes=True)]
    assert len(text) > 2 * SAVED and (text[-1].targets == IGNORED).any()

    def spoil(training):
        """The memories of the second of four rows have grown so far that what they are used for overflows."""
        row = 1 - rank * 4 // world
        if row in range(4 // world):
            here = torch.tensor([row])
            training.lanes._state = mapped(
                lambda _, leaf: leaf.index_fill(0, here, 1e38) if isinstance(leaf, Tensor) else leaf,
                training.lanes._state,
            )

    def losses(training, keeper=None):
        found = []
        for batch in text[training.done :]:
            if training.done == SPOILT:
                spoil(training)
            training.learn(batch)
            assert bool(training.refused) == bool(training.anew) == (training.done == SPOILT + 1)
            assert training.record()["stream/lanes_anew"] == (training.done > SPOILT)
            found.append((training.loss, training.prequential.bits_per_byte))
            if keeper is not None and training.done == SAVED:
                keeper.save({})
        return found

    def training_of(label):
        return StreamTraining(from_yaml(jobs[label]), torch.device("cpu"), rank, world)

    for label in jobs:
        training = training_of(label)
        keeper = Keeper(training, Store(Path(place, f"{label}{world}")), None)
        results[label] = losses(training, keeper)
        assert not keeper.close()
    for label, store in {"resumed": f"zero2{world}", "forgetful": f"zero2{world}", "taken over": "zero22"}.items():
        training = training_of("zero2")
        assert Keeper(training, Store(Path(place, store)), None).restore() == SAVED
        if label == "forgetful":
            training.lanes.load(training.engine.module, rank, {}, {})
        results[label] = losses(training)
    if rank == 0:
        torch.save(results, Path(place, f"results{world}"))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    place = tmp_path_factory.mktemp("carried")
    for world in (2, 1):
        jobs = {
            label: to_yaml(load("jobs/five-domains.yaml", [*JOB, *more, f"training.workers={world}"], streamed=True))
            for label, more in VARIANTS.items()
        }
        mp.spawn(learn, (world, str(place), jobs), nprocs=world)
    return {world: torch.load(place / f"results{world}") for world in (1, 2)}


@pytest.mark.slow
def test_any_number_of_workers_carries_the_same_state(learnt):
    for found in learnt.values():
        for label in VARIANTS:
            np.testing.assert_allclose(found[label], learnt[1]["zero0"], rtol=1e-5, err_msg=label)


@pytest.mark.slow
def test_a_snapshot_brings_the_state_back_to_the_bit(learnt):
    for found in learnt.values():
        assert found["resumed"] == found["zero2"][SAVED:]
        assert found["forgetful"][0] != found["zero2"][SAVED]  # the control: the state left out
    np.testing.assert_allclose(learnt[1]["taken over"], learnt[1]["zero2"][SAVED:], rtol=1e-5)

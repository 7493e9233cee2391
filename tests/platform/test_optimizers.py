"""Optimizers under DeepSpeed: the same weights from every ZeRO stage and number of workers, because matrices are seen
whole; momenta that stay sharded, a bounded bucket, and an exact way back from a checkpoint."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from nestling.config import from_yaml, load, to_yaml
from nestling.data import Corpus, prepare
from nestling.optim import Muon, matrix_groups, newton_schulz
from nestling.optim.matrices import Unsharded
from nestling.training.engine import full_weights
from nestling.training.matrices import ShardedMatrices, Stretch

pytestmark = pytest.mark.slow

STEPS, SAVED, RESUMED = 20, 7, "literal zero2"
LARGEST, BUCKET = 128 * 24, 7000  # elements of the largest matrix; it is gathered with its momentum by delta_momentum
TINY = [
    "model.name=transformer",
    "model.width=24",
    "model.layers=2",
    "model.heads=2",
    "model.vocab_size=257",
    "data.sequence_length=32",
    "training.batch_tokens=256",
    f"training.steps={STEPS}",
    "training.warmup_steps=4",
    "training.learning_rate=1e-3",
    "training.adamw_learning_rate=1e-3",
    "optimizers.m3.slow_period=3",
    "optimizers.m3.eps=1e-3",
    f"optimizers.bucket={BUCKET}",
]
#: Between the two jobs every rule moves matrices once a step and once in four, and M3 runs in both of its modes.
LEVELS = (
    "levels=[{{parameters: ['blocks.0.mixer.*'], period: 1, optimizer: {}, learning_rate: {}}},"
    "{{parameters: ['blocks.0.feed_forward.*'], period: 1, optimizer: {}, learning_rate: {}}},"
    "{{parameters: ['blocks.1.mixer.*'], period: 4, optimizer: {}, learning_rate: {}}},"
    "{{parameters: ['blocks.1.feed_forward.*'], period: 4, optimizer: {}, learning_rate: {}}},"
    "{{parameters: ['head*', '*norm*'], period: 4, optimizer: {}, learning_rate: {}}}]"
)
M3, MUON, DELTA, DEEP = ("m3", 3e-5), ("muon", 1e-3), ("delta_momentum", 0.5), ("deep_momentum", 1e-3)
DESCENT = ("delta_gradient_descent", 0.5)
RULES = {
    "ema": [LEVELS.format(*M3, *DELTA, *DESCENT, *MUON, *DEEP), "training.optimizer=deep_momentum"],
    "literal": [
        LEVELS.format(*DESCENT, *MUON, *M3, *DELTA, *MUON),
        "training.optimizer=m3",
        "optimizers.m3.mode=literal",
    ],
}
STAGES = {
    "zero0": ["training.zero_stage=0"],
    "zero1": ["training.zero_stage=1"],
    "zero2": ["training.zero_stage=2", "training.micro_batch=2"],
    "zero3": ["training.zero_stage=3", "training.micro_batch=2"],
}


class ShardsAlone:
    """What must not be: each shard taken for a matrix."""

    gathered = 0

    def __call__(self, parameter, function, *tensors):
        return function(*(tensor.view(1, -1) for tensor in tensors)).view_as(parameter)

    def is_matrix(self, parameter):
        return True


def cut_up(world):
    """Shapes, and their stretches on each rank as (start, length, offset): cut anywhere, with padding, one uncut, and
    one of which the last rank has nothing."""
    shapes = [(5, 7), (3, 4, 6), (9,), (8, 2), (6, 6)]
    cuts = [(0, 13, 35), (0, 24, 72), (0, 9, 9), (0, 16, 16), (0, 1, 36)] if world == 2 else []
    ranks = [[], []]
    offsets = [3, 0]
    for shape, (_, middle, end) in zip(shapes, cuts, strict=True):
        for rank, (start, stop) in enumerate(((0, middle), (middle, end))):
            ranks[rank].append(Stretch(shape, start, stop - start, offsets[rank]))
            offsets[rank] += stop - start + 1
    return shapes, ranks, max(offsets)


def matrices_of_two_ranks(rank):
    """`ShardedMatrices` against whole matrices, for one and two tensors and several buckets."""
    shapes, ranks, length = cut_up(2)
    generator = torch.Generator().manual_seed(0)
    whole = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)]
    flats = [torch.zeros(length, dtype=torch.float64) for _ in range(2)]
    for flat, tensors in zip(flats, whole, strict=True):
        for tensor, piece in zip(tensors, ranks[rank], strict=True):
            flat[piece.offset : piece.offset + piece.length] = tensor.view(-1)[piece.start : piece.start + piece.length]

    def product(a, b):
        return a @ b.mT @ b

    worst, gathered = 0.0, []
    for bucket in (1, 80, 10**6):
        sharded = ShardedMatrices({flats[0]: ranks[rank]}, bucket)
        for function, count in ((partial(newton_schulz, steps=5), 1), (product, 2)):
            made = sharded(flats[0], function, *flats[:count])
            for place, piece in enumerate(ranks[rank]):
                right = Unsharded()(whole[0][place], function, *(tensors[place] for tensors in whole[:count]))
                mine = made[piece.offset : piece.offset + piece.length]
                worst = max(worst, float((mine - right.reshape(-1)[piece.start :][: piece.length]).abs().sum()))
        gathered.append(sharded.gathered)
    return worst, gathered


def partitioning(usual):
    """DeepSpeed's settings with every parameter cut up: ZeRO 3 leaves ones as small as these whole otherwise."""

    def settings(*arguments):
        made = usual(*arguments)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    return settings


def muon_in_an_engine_of_its_own(stage, matrices=True):
    """Weights after five steps of `Muon`, as anybody would use it with DeepSpeed; stage None: with torch alone."""
    import deepspeed

    from nestling.training.engine import see_whole_matrices

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer, x = Muon(matrix_groups(model), lr=0.01), torch.randn(8, 7)
    if stage is None:
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if matrices:
        see_whole_matrices(engine, 100)
    for _ in range(5):
        engine.backward(engine(x).square().mean())
        engine.step()
    return list(full_weights(engine, keep=True).values())


def worker(rank, world, place, jobs, folder, resumed):
    """One process of `world`: trains every job and leaves its weights; the `resumed` ones begin at RESUMED's middle."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/init{world}", rank=rank, world_size=world)
    from nestling.checkpoint import Store
    from nestling.training import engine
    from nestling.training.keeper import Keeper
    from nestling.training.loop import Training

    engine.engine_settings, results = partitioning(engine.engine_settings), {}
    if world == 2:
        results["matrices"] = matrices_of_two_ranks(rank)
        results["muon"] = [muon_in_an_engine_of_its_own(stage) for stage in (None, 0, 2, 3)]
        with pytest.raises(RuntimeError, match="call nestling.training.engine.see_whole_matrices"):
            muon_in_an_engine_of_its_own(2, matrices=False)

    def training_of(label):
        return Training(from_yaml(jobs[label]), Corpus.open(folder), torch.device("cpu"), rank, world)

    def finish(label, training, keeper=None):
        losses, first = [], full_weights(training.engine, keep=True)
        while training.done < STEPS:
            losses.append(training.step())
            if keeper is not None and training.done == SAVED:
                keeper.save({})
        results[label] = {"losses": losses, "weights": full_weights(training.engine, keep=True)}
        state = training.levels.state.values()
        results[label]["state"] = sum(t.numel() for s in state for t in s.values() if torch.is_tensor(t))
        results[label]["gathered"] = getattr(training.levels.whole, "gathered", None)
        results[label]["updates"] = training.levels.updates
        results[label]["moved"] = {
            name: float((weight - first[name]).norm() / first[name].norm())
            for name, weight in results[label]["weights"].items()
        }

    for label in jobs:
        training = training_of(label)
        if "alone" in label:
            training.levels.whole = ShardsAlone()
        keeper = Keeper(training, Store(Path(place, label)), None) if label == RESUMED else None
        finish(label, training, keeper)
        assert keeper is None or not keeper.close()
    for label, origin in resumed.items():
        training = training_of(origin)
        assert Keeper(training, Store(Path(place, RESUMED)), None).restore() == SAVED
        finish(label, training)
    if rank == 0:
        torch.save(results, Path(place, f"results{world}"))


@pytest.fixture(scope="module")
def probes(texts, tmp_path_factory):
    """Losses and weights of every job in every stage on two processes and on one."""
    place = tmp_path_factory.mktemp("optimizers")

    def job(workers, rule, *overrides):
        base = f"data.source={texts}", f"run.dir={place}", f"training.workers={workers}"
        return load("jobs/quickstart.yaml", [*TINY, *base, *RULES[rule], *overrides])

    corpus = prepare(job(1, "ema").data, place / "cache")
    results = {}
    for world in (2, 1):
        jobs = {f"{rule} {stage}": to_yaml(job(world, rule, *STAGES[stage])) for rule in RULES for stage in STAGES}
        if world == 2:
            jobs["ema zero2 alone"] = jobs["ema zero2"]
        resumed = {"resumed": RESUMED} if world == 2 else {"taken over": "literal zero3"}
        mp.spawn(worker, (world, str(place), jobs, corpus.folder, resumed), nprocs=world)
        results[world] = torch.load(place / f"results{world}", weights_only=False)
    return results


def difference(result, reference):
    """The largest difference of a parameter, relative to its norm."""
    return max(
        float((weight - reference["weights"][name]).norm() / reference["weights"][name].norm())
        for name, weight in result["weights"].items()
    )


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_every_stage_and_number_of_workers_gives_the_same_weights(probes, rule, world):
    reference = probes[1][f"{rule} zero0"]
    assert reference["updates"] == {"level1": 20, "level2": 20, "level3": 5, "level4": 5, "level5": 5, "base": 20}
    assert min(reference["moved"].values()) > 1e-4  # relative to the weights, so that equal weights say something
    for stage in STAGES:
        assert difference(probes[world][f"{rule} {stage}"], reference) < 1e-5, stage


def test_shards_taken_for_matrices_give_others(probes):
    assert difference(probes[2]["ema zero2 alone"], probes[1]["ema zero0"]) > 0.01


def test_momenta_stay_sharded_and_the_bucket_is_kept(probes):
    for rule in RULES:
        for stage in ("zero1", "zero2", "zero3"):
            result = probes[2][f"{rule} {stage}"]
            assert result["state"] <= probes[2][f"{rule} zero0"]["state"] / 2 + 64  # ZeRO pads its partitions
            assert LARGEST <= result["gathered"] <= BUCKET


def test_an_m3_run_resumes_to_the_bit(probes):
    whole, resumed = probes[2][RESUMED], probes[2]["resumed"]
    assert resumed["losses"] == whole["losses"][SAVED:]
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name


def test_another_layout_takes_an_m3_run_over(probes):
    assert difference(probes[1]["taken over"], probes[2][RESUMED]) < 1e-5


def test_matrices_of_any_cut_are_whole(probes):
    worst, gathered = probes[2]["matrices"]
    assert worst < 1e-12
    assert gathered[0] <= 2 * 36 and gathered[1] <= 80 < gathered[2]  # a bucket of 1 holds one matrix of two tensors


def test_an_engine_of_ones_own_can_see_whole_matrices(probes):
    plain, *staged = probes[2]["muon"]
    for weights in staged:
        for mine, right in zip(weights, plain, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)

"""Coming back from a checkpoint: to the bit in the same layout, within rounding in any other, at any step."""

import hashlib
from pathlib import Path

import pytest
import torch

STEPS, SAVED = 20, (7, 8)  # 7 is in the middle of every slow level's period
TINY = [
    "model.width=32",
    "model.layers=1",
    "model.heads=2",
    "model.chunk_size=16",
    "model.level_variant=nested",
    "levels=[{width: 32, period: 1}, {width: 32, period: 3, optimizer: sgd, learning_rate: 0.05}, "
    "{parameters: [embedding*], period: 5}]",
    "data.sequence_length=32",
    "training.batch_tokens=256",
    f"training.steps={STEPS}",
    "training.warmup_steps=4",
]
LAYOUTS = {
    "zero0": ["training.zero_stage=0"],
    "zero1": ["training.zero_stage=1"],
    "zero2": ["training.zero_stage=2", "training.micro_batch=2"],
    "zero3": ["training.zero_stage=3", "training.micro_batch=2"],
    "zero3 partitioned": ["training.zero_stage=3"],
    "bfloat16": ["training.precision=bfloat16", "training.zero_stage=2"],
    "meta": [
        *("training.zero_stage=2", "model.level_variant=sequential", "continuum.drive=meta"),
        *("continuum.periods=[4, 16]", "continuum.rates=[1.0, 0.5]"),
    ],
}


def partitioning(usual):
    """DeepSpeed's settings with every parameter cut up: ZeRO 3 leaves ones as small as these whole otherwise."""

    def settings(*arguments):
        made = usual(*arguments)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    return settings


def probe(settings):
    """A worker: trains and saves each layout, comes back in a used and in a fresh engine, takes over others' runs."""
    import ray.train

    from nestling.checkpoint import Store
    from nestling.config import from_yaml
    from nestling.data import Corpus
    from nestling.training import engine
    from nestling.training.engine import full_weights
    from nestling.training.keeper import Keeper
    from nestling.training.loop import Training

    torch.set_num_threads(1)
    usual = engine.engine_settings
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    place = Path(settings["place"])

    def training_of(label):
        engine.engine_settings = partitioning(usual) if "partitioned" in label else usual
        corpus = Corpus.open(settings["corpus"])
        return Training(from_yaml(settings["jobs"][label]), corpus, torch.device("cpu"), rank, world)

    def go_on(training, keeper=None):
        records = []
        while training.done < STEPS:
            training.step()
            record = training.record() if training.done % 2 == 0 else {"train/loss": training.loss}
            records.append({key: value for key, value in record.items() if "per_second" not in key})
            if keeper is not None and training.done in SAVED:
                keeper.save({})
        weights = full_weights(training.engine, keep=True)
        hashes = {name: hashlib.sha256(w.numpy().tobytes()).hexdigest() for name, w in weights.items()}
        return {"records": records, "weights": hashes}

    results = {}
    for label in settings["train"]:
        store = Store(place / f"{world} {label}")
        training = training_of(label)
        keeper = Keeper(training, store, None)
        results[label] = {"whole": go_on(training, keeper)}
        assert not keeper.close()
        # The engine that has trained to the end goes back to the earlier checkpoint ...
        assert keeper.restore(before=SAVED[1]) == SAVED[0]
        results[label]["back"] = go_on(training)
        # ... and a fresh one takes up the newest.
        fresh = training_of(label)
        assert Keeper(fresh, store, None).restore() == SAVED[1]
        results[label]["fresh"] = go_on(fresh)
        if label == "zero2":
            spoilt = training_of(label)
            Keeper(spoilt, store, None).restore(before=SAVED[1])
            for state in spoilt.levels.state.values():
                if "accumulator" in state:
                    state["accumulator"].zero_()
            results[label]["without accumulators"] = go_on(spoilt)
    for label, origin in settings["take_over"]:
        training = training_of(label)
        assert Keeper(training, Store(place / origin), None).restore(before=SAVED[1]) == SAVED[0]
        results[f"{origin} -> {world} {label}"] = go_on(training)
    return results


@pytest.fixture(scope="module")
def probes(ray_local, texts, tmp_path_factory):
    """Records and weights of every layout on two workers and on one, whole, resumed, and taken over from each other."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from nestling.config import load, to_yaml
    from nestling.data import prepare

    runs, place = (tmp_path_factory.mktemp(name) for name in ("runs", "checkpoints"))

    def job(*overrides):
        places = f"data.source={texts}", f"run.dir={runs}"
        return load("jobs/quickstart.yaml", [*TINY, *places, "model.vocab_size=257", *overrides])

    corpus = prepare(job().data, runs / "cache")

    def run(workers, train, take_over):
        jobs = {label: to_yaml(job(f"training.workers={workers}", *overrides)) for label, overrides in LAYOUTS.items()}
        trainer = TorchTrainer(
            probe,
            train_loop_config={
                "corpus": str(corpus.folder),
                "jobs": jobs,
                "place": str(place),
                "train": train,
                "take_over": take_over,
            },
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(name=f"probe-{workers}-{len(take_over)}", storage_path=str(runs)),
        )
        return trainer.fit().return_value

    two = run(2, list(LAYOUTS), [])
    two_as_one = [("zero1", "2 zero1"), ("zero1", "2 zero3 partitioned"), ("zero0", "2 zero2"), ("zero3", "2 zero1")]
    one = run(1, ["zero1", "zero3"], two_as_one)
    one_as_two = [("zero1", "1 zero1"), ("zero3 partitioned", "1 zero1"), ("zero2", "1 zero3"), ("zero0", "2 zero3")]
    others = run(2, [], one_as_two)
    return {"2": two, "1": one, "taken over": {k: v for k, v in (one | others).items() if "->" in k}}


def test_it_learns(probes):
    losses = [record["train/loss"] for record in probes["2"]["zero2"]["whole"]["records"]]
    assert losses[-1] < losses[0] - 0.5  # so that equal losses say something


@pytest.mark.parametrize("label", LAYOUTS)
def test_resuming_in_the_same_layout_is_exact(probes, label):
    for workers in ("1", "2"):
        result = probes[workers].get(label)
        if result is None:
            continue
        assert result["back"]["weights"] == result["whole"]["weights"]
        assert result["fresh"]["weights"] == result["whole"]["weights"]
        assert result["back"]["records"] == result["whole"]["records"][SAVED[0] :]
        assert result["fresh"]["records"] == result["whole"]["records"][SAVED[1] :]


def test_without_the_accumulators_it_is_not_exact(probes):
    result = probes["2"]["zero2"]
    assert result["without accumulators"]["weights"] != result["whole"]["weights"]
    assert result["without accumulators"]["records"] != result["whole"]["records"][SAVED[0] :]


def test_another_layout_goes_on_within_rounding(probes):
    assert len(probes["taken over"]) == 8
    reference = [record["train/loss"] for record in probes["2"]["zero1"]["whole"]["records"]][SAVED[0] :]
    for change, result in probes["taken over"].items():
        losses = [record["train/loss"] for record in result["records"]]
        assert len(losses) == STEPS - SAVED[0]
        worst = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
        assert worst < 1e-4, (change, worst)

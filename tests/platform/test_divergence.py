"""Steps that must not be trained on: skipped without a trace, counted, and the way back when there are too many."""

import hashlib
import json
import math
from types import SimpleNamespace

import pytest
import torch

from nestling.training.guard import ENOUGH, Guard

STEPS = 24
TINY = [
    "model.width=32",
    "model.layers=1",
    "model.heads=2",
    "model.chunk_size=16",
    "levels=[{width: 32, period: 1}, {width: 32, period: 3}]",
    "data.sequence_length=32",
    "training.batch_tokens=256",
    "training.micro_batch=2",
    "training.workers=2",
    f"training.steps={STEPS}",
    "training.warmup_steps=4",
    "training.checkpoint_every=4",
    "training.max_skipped=3",
    "training.evaluate_every=0",
    "evaluation.final_tokens=512",
]


def usual(guard, steps=ENOUGH):
    for step in range(steps):
        assert not guard.judge(3.0 + 0.1 * (step % 5), 1.0 + 0.2 * (step % 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_at_once(bad):
    guard = Guard(0)
    assert guard.judge(bad, 1.0) == "the loss is not finite"
    assert guard.judge(3.0, bad) == "the gradient norm is not finite"
    assert (guard.skipped, guard.in_a_row) == (2, 2)
    assert not guard.judge(3.0, 1.0)
    assert (guard.skipped, guard.in_a_row) == (2, 0)


def test_a_spike_is_refused_and_does_not_become_usual():
    guard = Guard(6)
    usual(guard)
    for _ in range(20):
        assert guard.judge(5.0, 1.2).startswith("the loss is 5, a spike over the usual 3.1")
    assert guard.judge(3.2, 90.0).startswith("the gradient norm is 90, a spike over the usual 1.1")
    assert not guard.judge(3.5, 9.0)  # a bad step, but no spike: clipping takes care of the gradient
    assert not guard.judge(1.0, 0.1)  # falling is no spike


def test_without_enough_steps_or_with_0_nothing_is_a_spike():
    fresh, off = Guard(6), Guard(0)
    usual(fresh, ENOUGH - 1)
    usual(off)
    assert not fresh.judge(50.0, 900.0) and not off.judge(50.0, 900.0)


def test_the_state_comes_back():
    guard, other = Guard(6), Guard(6)
    usual(guard)
    guard.judge(math.nan, 1.0)
    other.load(guard.state())
    assert other.state() == guard.state()
    assert other.judge(5.0, 1.0) and other.in_a_row == 2


def probe(settings):
    """A worker: runs jobs in which some batches have a loss that is not a number, or too large, on rank 1 alone."""
    import ray.train

    from nestling.checkpoint import run_store
    from nestling.config import from_yaml
    from nestling.data import Corpus
    from nestling.tracking import RunFolder, Tracker
    from nestling.training import guard, loop
    from nestling.training.engine import full_weights
    from nestling.training.worker import Worker

    guard.ENOUGH = 8
    torch.set_num_threads(1)
    real = loop.F.cross_entropy
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    results = {}
    for label, (job, path, bad) in settings["jobs"].items():
        config, folder = from_yaml(job), RunFolder.open(path)
        training = loop.Training(config, Corpus.open(settings["corpus"]), torch.device("cpu"), rank, world)
        batches, hashes = [], []
        take, step = training.feed.batch, training.step

        def batch(number, take=take, batches=batches):
            batches.append(number)
            return take(number)

        def poisoned(*arguments, batches=batches, bad=bad, label=label, **options):
            loss = real(*arguments, **options)
            worse = 5.0 if label.startswith("other data") else math.nan
            return loss * worse if batches[-1] in bad and rank == 1 else loss

        def watched(step=step, training=training, hashes=hashes):
            loss = step()
            weights = full_weights(training.engine, keep=True)
            whole = b"".join(weight.numpy().tobytes() for weight in weights.values())
            hashes.append((training.done, hashlib.sha256(whole).hexdigest()))
            return loss

        training.feed.batch, training.step = batch, watched
        loop.F = SimpleNamespace(cross_entropy=poisoned)
        tracker = Tracker(folder, settings["uri"], settings["mlflow_run_id"]) if rank == 0 else None
        result = Worker(training, run_store(config, folder), folder, tracker).run()
        if tracker is not None:
            tracker.close()
        results[label] = {"result": result, "batches": batches, "hashes": hashes}
    return results


@pytest.fixture(scope="module")
def runs(ray_local, texts, tmp_path_factory):
    """Results, batches and weights by step of runs with bad batches; the folders of the runs."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from nestling.config import load, to_mapping, to_yaml
    from nestling.data import prepare
    from nestling.tracking import RunFolder, start

    place = tmp_path_factory.mktemp("runs")

    def job(*overrides):
        places = f"data.source={texts}", f"run.dir={place}"
        return load("jobs/quickstart.yaml", [*TINY, *places, "model.vocab_size=257", *overrides])

    wanted = {f"single zero{stage}": ([f"training.zero_stage={stage}"], [9]) for stage in range(4)} | {
        "rollback": (["training.zero_stage=2"], [10, 11, 12]),
        "stop": (["training.zero_stage=3", "training.on_divergence=stop"], range(10, 99)),
        "hopeless": (["training.zero_stage=1"], range(10, 99)),
        "too early": (["training.zero_stage=0"], range(2, 99)),
        "other data": (["training.zero_stage=1"], range(10, 99)),
        "other data at the end": (["training.zero_stage=1", "training.max_skipped=4"], range(20, 99)),
        "due": (["training.zero_stage=1"], [7]),
    }
    folders = {label: RunFolder.create(place, label.replace(" ", "-")) for label in wanted}
    tracked = start(to_mapping(job()), folders["rollback"], None, "nestling")
    trainer = TorchTrainer(
        probe,
        train_loop_config={
            "corpus": str(prepare(job().data, place / "cache").folder),
            "uri": tracked.uri,
            "mlflow_run_id": tracked.mlflow_run_id,
            "jobs": {
                label: (to_yaml(job(*overrides)), str(folders[label].path), list(bad))
                for label, (overrides, bad) in wanted.items()
            },
        },
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="probe", storage_path=str(place)),
    )
    return trainer.fit().return_value, folders


@pytest.mark.parametrize("stage", range(4))
def test_a_bad_batch_on_one_rank_leaves_no_trace(runs, stage):
    results, folders = runs
    result, hashes = (results[f"single zero{stage}"][key] for key in ("result", "hashes"))
    assert (result["status"], result["steps"], result["skipped_steps"]) == ("finished", STEPS, 1)
    weights = dict(hashes)
    assert weights[10] == weights[9] and len(set(weights.values())) == STEPS - 1
    records = folders[f"single zero{stage}"].records()
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert "train/loss" not in records[9] and math.isfinite(records[10]["train/loss"])
    assert [record["train/skipped_steps"] for record in records] == [0] * 9 + [1] * (STEPS - 9)
    assert records[-1]["levels/level2/updates"] == (STEPS - 1) // 3  # a skipped step is none of its period
    assert result["train_loss"] < records[0]["train/loss"] - 0.3


def test_too_many_in_a_row_go_back_and_past_the_batches(runs):
    results, folders = runs
    found = results["rollback"]
    assert found["result"]["status"] == "finished" and found["result"]["skipped_steps"] == 3
    # Steps 11 to 13 are bad, the checkpoint is that of step 8; batch 12 is read again to find the gradient.
    assert found["batches"] == [*range(13), 12, *range(13, 13 + STEPS - 8)]
    at = [step for step, _ in found["hashes"]]
    assert at == [*range(1, 14), *range(9, STEPS + 1)]
    events = [json.loads(line) for line in folders["rollback"].events.read_text().splitlines()]
    events = [event for event in events if event["kind"] == "rolled-back"]
    assert len(events) == 1 and events[0]["step"] == 8
    assert "step 13 (batch 12): the loss is not finite" in events[0]["message"]
    assert "that of head.weight (rank 1)" in events[0]["message"]
    assert [record["step"] for record in folders["rollback"].records()] == list(range(1, STEPS + 1))


def test_a_run_that_may_not_go_back_stops_with_a_report(runs):
    results, _ = runs
    result = results["stop"]["result"]
    assert result["status"] == "failed" and result["steps"] == 13
    for part in ("step 13 (batch 12)", "3 steps in a row", "head.weight (rank 1)", "training.learning_rate"):
        assert part in result["error"]


def test_a_run_that_going_back_does_not_help_stops(runs):
    results, _ = runs
    result = results["hopeless"]["result"]
    assert result["status"] == "failed" and "going back to step 8 has not helped 2 times" in result["error"]
    assert "there is no checkpoint to go back to" in results["too early"]["result"]["error"]


def test_losses_that_stay_high_after_going_back_are_the_data(runs):
    results, folders = runs
    found = results["other data"]
    assert found["result"]["status"] == "finished" and found["result"]["skipped_steps"] == 6
    kinds = [json.loads(line)["kind"] for line in folders["other data"].events.read_text().splitlines()]
    assert [kind for kind in kinds if kind in ("rolled-back", "accepted")] == ["rolled-back", "accepted"]


def test_the_last_step_is_saved_also_where_it_is_the_one_that_makes_up_its_mind(runs):
    results, folders = runs
    result = results["other data at the end"]["result"]
    assert (result["status"], result["steps"]) == ("finished", STEPS)
    saved = [event["step"] for event in folders["other data at the end"].happened() if event["kind"] == "checkpoint"]
    assert saved[-1] == STEPS


def test_a_checkpoint_that_is_due_at_a_bad_step_is_saved_after_it(runs):
    _, folders = runs
    events = [json.loads(line) for line in folders["due"].events.read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "checkpoint"] == [4, 9, 12, 16, 20, 24]

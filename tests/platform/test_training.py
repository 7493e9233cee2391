"""Training on real Ray workers: the same losses for every ZeRO stage and number of workers, levels that keep their
periods under sharding, and what a run leaves behind."""

import hashlib
import json
import math
from dataclasses import replace

import mlflow
import pytest
import torch

from nestling.checkpoint import CheckpointError, load_final
from nestling.config import ConfigError, load
from nestling.data import prepare
from nestling.evaluation import evaluate
from nestling.models import build
from nestling.tracking import RunFolder
from nestling.training import fit
from nestling.training.groups import parameter_groups
from nestling.training.run import TrainingError, _on_device
from nestling.training.schedule import rate_factor

STEPS = 24
TINY = [
    "model.width=32",
    "model.layers=1",
    "model.heads=2",
    "model.chunk_size=16",
    "levels=[{width: 32, period: 1}, {width: 32, period: 3, optimizer: sgd, learning_rate: 0.05}]",
    "data.sequence_length=32",
    "training.batch_tokens=256",
    f"training.steps={STEPS}",
    "training.warmup_steps=4",
    "training.log_every=1",
    "training.evaluate_every=10",
    "evaluation.tokens=512",
    "evaluation.final_tokens=2048",
]


#: Levels that also move inside each sequence, the outer gradient passing through.
META = ["continuum.drive=meta", "continuum.periods=[4, 16]", "continuum.rates=[1.0, 1.0]"]


@pytest.fixture(scope="session")
def job(texts, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return lambda *overrides: load(
        "jobs/quickstart.yaml", [*TINY, f"data.source={texts}", f"run.dir={runs}", *overrides]
    )


def partitioning(usual):
    """DeepSpeed's settings with every parameter cut up: ZeRO 3 leaves ones as small as these whole otherwise."""

    def settings(*arguments):
        made = usual(*arguments)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    return settings


def probe(settings):
    """A worker: trains one job after another, a ZeRO stage each, and looks at every weight after every step."""
    import ray.train

    from nestling.config import from_yaml
    from nestling.data import Corpus
    from nestling.training import engine
    from nestling.training.engine import full_weights
    from nestling.training.loop import Training

    torch.set_num_threads(1)
    usual = engine.engine_settings
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    results = {}
    for label, job in settings["jobs"].items():
        engine.engine_settings = partitioning(usual) if "partitioned" in label else usual
        training = Training(from_yaml(job), Corpus.open(settings["corpus"]), torch.device("cpu"), rank, world)
        losses, hashes, norms = [], [], []
        for _ in range(STEPS):
            losses.append(training.step())
            record = training.record()
            norms.append(record["train/gradient_norm"])
            weights = full_weights(training.engine, keep=True)
            hashes.append({name: hashlib.sha256(w.numpy().tobytes()).hexdigest() for name, w in weights.items()})
        kept = sum(s["accumulator"].numel() for s in training.levels.state.values() if "accumulator" in s)
        results[label] = {"losses": losses, "hashes": hashes, "norms": norms, "accumulated": kept, "last": record}
    return results


@pytest.fixture(scope="module")
def probes(ray_local, job, tmp_path_factory):
    """Losses, hashes and norms of every ZeRO stage on one and on two workers."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from nestling.config import to_yaml
    from nestling.training.run import complete

    corpus = prepare(job().data, job().run.dir + "/cache")

    def run(workers):
        plain = {f"zero{stage}": [f"training.zero_stage={stage}"] for stage in range(4)}
        changed = {
            "accumulated": ["training.micro_batch=2", "training.zero_stage=2"],
            "checkpointed": ["training.activation_checkpointing=true", "training.zero_stage=3"],
            "partitioned": ["training.zero_stage=3", "training.micro_batch=2"],
            "bfloat16": ["training.precision=bfloat16", "training.zero_stage=0"],
            "bfloat16 zero2": ["training.precision=bfloat16", "training.zero_stage=2"],
        }
        plain |= {f"meta zero{stage}": [f"training.zero_stage={stage}", *META] for stage in range(3)}
        changed["meta accumulated"] = ["training.micro_batch=2", "training.zero_stage=2", *META]
        jobs = plain | changed if workers == 2 else plain
        settings = {
            "corpus": str(corpus.folder),
            "jobs": {
                name: to_yaml(complete(job(f"training.workers={workers}", *overrides)))
                for name, overrides in jobs.items()
            },
        }
        trainer = TorchTrainer(
            probe,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(name="probe", storage_path=str(tmp_path_factory.mktemp("probe"))),
        )
        return trainer.fit().return_value

    return {workers: run(workers) for workers in (1, 2)}


def relative(losses, reference):
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


def test_every_stage_and_number_of_workers_gives_the_same_losses(probes):
    reference = probes[1]["zero0"]["losses"]
    assert reference[-1] < reference[0] - 0.5  # it learns, so that equal losses say something
    for workers, stages in probes.items():
        for label, result in stages.items():
            if "bfloat16" not in label and "meta" not in label:
                assert relative(result["losses"], reference) < 1e-4, (workers, label)


def test_levels_that_move_inside_a_sequence_train_alike_everywhere(probes):
    reference = probes[1]["meta zero0"]["losses"]
    assert reference[-1] < reference[0] - 0.5
    assert relative(reference, probes[1]["zero0"]["losses"]) > 1e-3  # they did move
    labels = [(workers, label) for workers in probes for label in probes[workers] if label.startswith("meta")]
    assert len(labels) == 7
    for workers, label in labels:
        assert relative(probes[workers][label]["losses"], reference) < 1e-4, (workers, label)


def test_bfloat16_trains_close_to_float32_and_alike_in_every_stage(probes):
    reference = probes[2]["zero2"]["losses"]
    assert relative(probes[2]["bfloat16 zero2"]["losses"], reference) < 0.02
    assert probes[2]["bfloat16"]["losses"] == probes[2]["bfloat16 zero2"]["losses"]


def test_gradient_norms_agree(probes):
    reference = probes[1]["zero0"]["norms"]
    assert max(reference) > 1  # so that clipping took part
    for label in ("zero0", "zero1", "zero2", "zero3"):
        assert relative(probes[2][label]["norms"], reference) < 1e-3, label


@pytest.mark.parametrize("label", ["zero0", "zero1", "zero2", "zero3", "bfloat16"])
def test_a_level_changes_once_a_period_under_sharding(probes, label):
    hashes = probes[2][label]["hashes"]
    slow = [name for name in hashes[0] if ".feed_forward.1." in name and "norm" not in name]
    assert slow
    for name in slow:
        changes = [step for step in range(2, STEPS + 1) if hashes[step - 1][name] != hashes[step - 2][name]]
        assert changes == [step for step in range(2, STEPS + 1) if step % 3 == 0], name
    fast = [name for name in hashes[0] if ".feed_forward.0.into" in name]
    for name in fast:
        assert len({step[name] for step in hashes}) == STEPS
    assert probes[2][label]["last"]["levels/level2/updates"] == STEPS // 3


def test_accumulators_are_sharded(probes):
    whole = probes[2]["zero0"]["accumulated"]
    for label in ("zero1", "zero2", "zero3"):
        assert probes[2][label]["accumulated"] <= whole / 2 + 64, label  # ZeRO pads its partitions


@pytest.fixture(scope="module")
def finished(ray_local, job):
    """One whole run on two workers."""
    config = job("training.workers=2", "training.zero_stage=2", "run.name=whole")
    folder, seen = RunFolder.create(config.run.dir, config.run.name), []
    return folder, fit(config, folder, seen.append), seen


def test_a_run_leaves_a_model_that_evaluates_to_the_same_figures(finished):
    folder, summary, _ = finished
    during = json.loads(folder.evaluation.read_text())
    after = evaluate(folder)
    assert after["heldout_loss"] == pytest.approx(during["heldout_loss"], rel=1e-4)
    assert after["heldout_bits_per_byte"] == pytest.approx(summary.heldout_bits_per_byte, rel=1e-4)
    for key in ("writes_off_bits_per_byte", "second_copy_bits_per_byte", "eta", "alpha"):
        assert after[key] == pytest.approx(during[key], rel=1e-3), key
    assert after["writes_off_bits_per_byte"] != after["writes_on_bits_per_byte"]
    assert len(after["bits_per_byte_by_position"]) == 8
    assert summary.unigram_bits_per_byte == after["unigram_bits_per_byte"]


def test_the_log_and_mlflow_hold_every_step_once(finished):
    folder, summary, seen = finished
    records = folder.records()
    assert [record["step"] for record in records] == list(range(1, STEPS + 1)) == [r["step"] for r in seen]
    # Record by record, the seconds of the steps are what the whole run took, without what lies between steps.
    spent = sum(256 / record["train/tokens_per_second"] for record in records)
    assert 0.3 < spent * summary.tokens_per_second / (STEPS * 256) < 1
    client = mlflow.MlflowClient(summary.tracking_uri)
    run_id = folder.info()["mlflow_run_id"]
    history = client.get_metric_history(run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(r["step"], r["train/loss"]) for r in records]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    for key in (
        "train/tokens",
        "train/tokens_per_second",
        "train/gradient_norm",
        "heldout/bits_per_byte",
        "heldout/loss",
    ):
        assert key in run.data.metrics
    assert run.data.metrics["levels/level2/updates"] == STEPS // 3
    for gate in ("eta", "alpha"):
        assert 0 < run.data.metrics[f"memory/layer0/{gate}"] < 1
    assert run.data.params["levels.1.period"] == "3"
    assert {"config.yaml", "loss.png"} <= {file.path for file in client.list_artifacts(run_id)}
    assert folder.info()["status"] == "finished"


def test_the_model_comes_back(finished):
    folder, _, _ = finished
    model, tokenizer, config = load_final(folder)
    assert config.model.vocab_size == tokenizer.vocab_size == 257
    assert not model.training


def test_an_unfinished_run_has_no_model(job):
    folder = RunFolder.create(job().run.dir, "empty")
    with pytest.raises(CheckpointError, match="has no weights: its status is 'stopped'"):
        load_final(folder)


def test_a_diverging_run_says_so(ray_local, job):
    config = job("training.learning_rate=1e30", "training.clip=0", "run.name=diverges")
    folder = RunFolder.create(config.run.dir, config.run.name)
    with pytest.raises(TrainingError, match=r"step 6 .* 5 steps in a row .* that of head.weight .*: lower training"):
        fit(config, folder)
    assert folder.info()["status"] == "failed"
    assert "there is no checkpoint to go back to" in folder.info()["error"]


def test_every_parameter_is_in_one_level(job):
    config = job(
        "levels=[{width: 32, period: 1}, {width: 32, period: 3}, "
        "{parameters: [embedding*, head*], period: 5, name: words}, {parameters: ['*.memories.*'], name: memories}]"
    )
    model = build(replace(config.model, vocab_size=257))
    groups = parameter_groups(model, config)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert {group["name"]: group["period"] for group in groups} == {
        "level1": 1,
        "level2": 3,
        "words": 5,
        "memories": 1,
        "base": 1,
    }
    words = [id(p) for group in groups if group["name"] == "words" for p in group["params"]]
    assert sorted(words) == sorted([id(model.embedding.weight), id(model.head.weight)])


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_nested_levels_are_inside_the_next_one(job, variant):
    levels = "levels=[{width: 8}, {parameters: [head*], period: 2}, {width: 8, period: 3}, {width: 8, period: 9}]"
    config = job(f"model.level_variant={variant}", levels)
    groups = parameter_groups(build(replace(config.model, vocab_size=257)), config)
    inside = {"level1": "level3", "level3": "level4"} if variant == "nested" else {}
    assert {group["name"]: group.get("slower") for group in groups} == {
        name: inside.get(name) for name in ("level1", "level2", "level3", "level4", "base")
    }


def test_a_level_of_nothing_is_refused(job):
    config = job("levels=[{parameters: [embeding*]}]")
    with pytest.raises(ConfigError, match=r"level level1: no parameter .* matches \['embeding\*'\]"):
        parameter_groups(build(replace(config.model, vocab_size=257)), config)


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cpu"), (2, "cuda")])
def test_auto_is_a_gpu_only_if_every_worker_gets_one(job, monkeypatch, gpus, device):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    assert _on_device(job("training.workers=2")).training.device == device
    assert _on_device(job("training.workers=2", "training.device=cpu")).training.device == "cpu"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules(job, schedule):
    training = job(f"training.schedule={schedule}", "training.steps=100", "training.warmup_steps=10").training
    factors = [rate_factor(step, training) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    decayed = 20 if schedule == "wsd" else 90
    assert training.final_learning_rate < factors[-1] < training.final_learning_rate + 2 / decayed
    assert all(a >= b for a, b in zip(factors[9:], factors[10:], strict=False))
    middle = {"cosine": 0.5 * (1 + math.cos(math.pi * 0.5)), "linear": 0.5, "wsd": 1.0}[schedule]
    low = training.final_learning_rate
    assert factors[55] == pytest.approx(middle if schedule == "wsd" else low + (1 - low) * middle)

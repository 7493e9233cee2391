"""What a checkpoint costs a training: `python tests/benchmarks/checkpointing.py [--json FILE] [--repeats 5]`.

A HOPE of about 100 million parameters with a slow level, on two workers with ZeRO 2, trains until all of its optimizer
state is there, saves several times and comes back in a fresh engine. Blocking is what `save` takes from the training (a
look for values that are not finite, agreeing on the save, and copying the bytes into files); hashing, syncing and the
commit happen beside the training. Memory is how far the resident set rises above what it was, at its peak during the
save. Target: blocking under 2 seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory_ops import chip

JOB = [
    *("model.width=768", "model.layers=8", "model.heads=12", "training.workers=2", "training.zero_stage=2"),
    "levels=[{width: 3072, period: 1}, {width: 3072, period: 4}]",
    *("data.sequence_length=64", "training.batch_tokens=128", "training.steps=4", "model.vocab_size=257"),
]


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    import ray.train

    from nestling.checkpoint import Store
    from nestling.config import from_yaml
    from nestling.data import Corpus
    from nestling.training.keeper import Keeper
    from nestling.training.loop import Training

    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config, corpus = from_yaml(settings["job"]), Corpus.open(settings["corpus"])
    training = Training(config, corpus, torch.device("cpu"), rank, world)
    while training.done < config.training.steps:
        training.step()
    store = Store(settings["place"])
    keeper = Keeper(training, store, None)
    saves = []
    for _ in range(settings["repeats"]):
        before = reset_peak()
        began = time.perf_counter()
        keeper.save({})
        blocking = time.perf_counter() - began
        extra = peak() - before
        keeper.close()
        total = time.perf_counter() - began
        stages = dict(keeper.stages)
        saves.append({"blocking": blocking, "extra_bytes": extra, "whole": total, **stages})
    parameters = sum(shape.numel() for shape in training.shapes.values())
    del training
    fresh = Training(config, corpus, torch.device("cpu"), rank, world)
    began = time.perf_counter()
    Keeper(fresh, store, None).restore()
    restore = time.perf_counter() - began
    size = sum(file.stat().st_size for file in Path(settings["place"]).rglob("*") if file.is_file())
    return {"parameters": parameters, "checkpoint_bytes": size, "saves": saves, "restore": restore}


def reset_peak() -> int:
    """Resident bytes now; the peak starts again from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from nestling.config import load, to_yaml
    from nestling.data import prepare

    with tempfile.TemporaryDirectory() as folder:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        job = load("jobs/quickstart.yaml", [*JOB, f"run.dir={folder}"])
        corpus = prepare(job.data, Path(folder) / "cache")
        settings = {
            "job": to_yaml(job),
            "corpus": str(corpus.folder),
            "place": f"{folder}/checkpoints",
            "repeats": options.repeats,
        }
        trainer = TorchTrainer(
            worker,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="benchmark", storage_path=folder),
        )
        result = trainer.fit().return_value
        ray.shutdown()

    print(f"{chip()}, two workers of one thread; torch {torch.__version__}, Python {platform.python_version()}")
    print(
        f"{result['parameters']:,} parameters, a checkpoint of {result['checkpoint_bytes'] / 2**20:,.0f} MiB; "
        "seconds on rank 0:"
    )
    for stage in ("blocking", "write", "hash", "sync", "commit", "whole"):
        values = [save[stage] for save in result["saves"]]
        print(f"{stage:>9} {statistics.median(values):6.2f}  (from {min(values):.2f} to {max(values):.2f})")
    extra = max(save["extra_bytes"] for save in result["saves"])
    print(f"memory beside the model's: {extra / 2**20:.1f} MiB; restoring in a fresh engine: {result['restore']:.2f} s")
    if options.json:
        facts = {"chip": chip(), "torch": torch.__version__, "python": platform.python_version()}
        options.json.write_text(json.dumps(facts | result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The driver's side of a run: check, prepare the data, start the workers, watch them, sum up.

What can fail cheaply fails first: the tracking server before Ray, the data before the workers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestling.cluster import connected
from nestling.config import JobConfig, to_mapping, to_yaml
from nestling.data import Corpus, Feed, prepare
from nestling.models import build
from nestling.tracking import RunFolder, TrackedRun, finish, followed, start

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Summary:
    """How a run ended; the keys of `nestling train --json`."""

    run_id: str
    status: str
    steps: int
    tokens: int
    train_loss: float
    heldout_bits_per_byte: float
    unigram_bits_per_byte: float
    tokens_per_second: float
    checkpoint: str | None
    run_dir: str
    tracking_uri: str


class TrainingError(RuntimeError):
    """The workers failed; the message is the first cause."""


def fit(config: JobConfig, folder: RunFolder, on_progress: Progress | None = None) -> Summary:
    """Train the job in `folder` to its end.

    Args:
        config: the checked job.
        folder: a fresh run folder.
        on_progress: called in another thread with each record of the log as it appears.

    Raises:
        TrackingError, ClusterError, DataError, TrainingError: what cannot be reached, found or done, and how to fix it.
        KeyboardInterrupt: passed on after the run was marked as interrupted.
    """
    status, tracked = "failed", None
    try:
        _check_levels(config)
        tracked = start(to_mapping(config), folder, config.tracking.uri, config.tracking.experiment)
        wanted = config.training.workers
        with connected(wanted, wanted if config.training.device == "cuda" else 0):
            config = _on_device(config)
            corpus = prepare(config.data, Path(config.run.dir) / "cache")
            config = _complete(config, corpus)
            folder.config.write_text(to_yaml(config))
            corpus.tokenizer.save(folder.tokenizer)
            with followed(folder, on_progress):
                result = _train(config, corpus, folder, tracked)
        summary = _sum_up(folder, tracked, result)
        status = "finished"
        return summary
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Exception as error:
        folder.update(error=str(error))
        raise
    finally:
        folder.update(status=status)
        if tracked is not None:
            finish(tracked, folder, status, _figure(folder))


def _check_levels(config: JobConfig) -> None:
    """Find out before anything starts whether every level has parameters; the model is built without its numbers."""
    import torch

    from nestling.training.groups import parameter_groups

    with torch.device("meta"):
        parameter_groups(build(replace(config.model, vocab_size=config.model.vocab_size or 2)), config)


def _on_device(config: JobConfig) -> JobConfig:
    """Decide what `training.device=auto` means on this cluster: a GPU for each worker if there are enough."""
    import ray

    training = config.training
    if training.device != "auto":
        return config
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if 0 < gpus < training.workers:
        log.warning(
            "the cluster has %d GPUs for %d workers, so training runs on CPUs; training.workers=%d would use the GPUs",
            gpus,
            training.workers,
            gpus,
        )
    return replace(config, training=replace(training, device="cuda" if gpus >= training.workers else "cpu"))


def _complete(config: JobConfig, corpus: Corpus) -> JobConfig:
    """Fill in the vocabulary and where the data is; check that there is at least one batch before workers start."""
    length, training = config.data.sequence_length, config.training
    Feed(corpus.train, length, training.batch_tokens // length, config.seed)
    data = config.data
    if not data.source.startswith("embedded:"):
        data = replace(data, source=str(Path(data.source).expanduser().resolve()))
    return replace(config, data=data, model=replace(config.model, vocab_size=corpus.tokenizer.vocab_size))


def _train(config: JobConfig, corpus: Corpus, folder: RunFolder, tracked: TrackedRun) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from nestling.training.worker import train_worker

    entry: Any = train_worker  # Ray's annotation leaves out that a worker may return something
    trainer = TorchTrainer(
        entry,
        train_loop_config={
            "config": to_yaml(config),
            "folder": str(folder.path),
            "corpus": str(corpus.folder.resolve()),
            "tracking_uri": tracked.uri,
            "mlflow_run_id": tracked.mlflow_run_id,
        },
        scaling_config=ScalingConfig(num_workers=config.training.workers, use_gpu=config.training.device == "cuda"),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder.path),
            failure_config=FailureConfig(max_failures=config.training.max_failures),
        ),
    )
    try:
        result: Any = trainer.fit()
        return result.return_value
    except TrainingFailedError as error:
        raise TrainingError(_first_cause(error)) from error
    except SystemExit as stop:  # Ray Train's answer to Ctrl-C
        raise KeyboardInterrupt from stop


def _first_cause(error: BaseException) -> str:
    """The message of the exception that a worker raised, without Ray's wrapping."""
    for failure in (getattr(error, "worker_failures", None) or {}).values():
        cause = getattr(failure, "cause", None) or failure
        return str(cause).strip().splitlines()[-1]
    return str(error).strip().splitlines()[-1]


def _sum_up(folder: RunFolder, tracked: TrackedRun, result: dict[str, Any]) -> Summary:
    evaluation = {"run_id": folder.run_id, **result.pop("evaluation")}
    folder.evaluation.write_text(json.dumps(evaluation, indent=2) + "\n")
    figures = {key: evaluation[key] for key in ("heldout_bits_per_byte", "unigram_bits_per_byte")}
    folder.update(**result, **figures)
    return Summary(
        run_id=folder.run_id,
        status="finished",
        checkpoint=None,
        run_dir=str(folder.path),
        tracking_uri=tracked.uri,
        **result,
        **figures,
    )


def _figure(folder: RunFolder) -> Path | None:
    from nestling.tracking.figures import loss_figure

    records = folder.records()
    if not records:
        return None
    info = folder.info()
    loss_figure(records, folder.figure, info.get("unigram_bits_per_byte"), f"{folder.name} ({folder.run_id})")
    return folder.figure

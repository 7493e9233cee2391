"""The driver's side of a run: check, prepare the data, start the workers, watch them, sum up.

What can fail cheaply fails first: the tracking server before Ray, the data before the workers. Starting and resuming
are one way: the workers take up the newest checkpoint that the run's folder has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from nestling.checkpoint import CheckpointError, Store, run_store
from nestling.cluster import connected
from nestling.config import JobConfig, to_mapping, to_yaml
from nestling.data import Corpus, DataError, Feed, absolute, prepare
from nestling.data.preparing import open_tokenizer
from nestling.models import build
from nestling.tracking import RunFolder, TrackedRun, finish, followed, start
from nestling.tracking.client import shown
from nestling.training.alone import form_group
from nestling.training.attended import attended, ending
from nestling.training.changes import CHANGED, take_up

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]


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
    tokens_per_second: float | None
    checkpoint: str
    run_dir: str
    tracking_uri: str
    skipped_steps: int
    data: str


#: Of a summary, what a run knows from its beginning.
KNOWN_AT_ONCE = {"run_id", "status", "run_dir", "tracking_uri"}


class TrainingError(RuntimeError):
    """The workers failed; the message is the first cause."""


@dataclass(frozen=True)
class Part:
    """How much of a run is worked off at once, and where, if not all of it by Ray Train's workers.

    Attributes:
        until: a step after which the run is evaluated, saved and interrupted as if somebody had asked for it; the next
            `fit` goes on from there.
        in_process: train in this process, which is the only worker then, and not in one that Ray Train starts.
    """

    until: float = math.inf
    in_process: bool = False


#: All that is left of a run, by its workers.
WHOLE = Part()


@dataclass(frozen=True)
class Work:
    """What the workers are to do.

    Attributes:
        entry: what each of them calls, with the settings of every training and these.
        settings: what is sent to them.
        figures: what is known of the summary already.
    """

    entry: Callable[[dict[str, Any]], dict[str, Any]]
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]


def fit(
    config: JobConfig,
    folder: RunFolder,
    on_progress: Progress | None = None,
    on_event: Progress | None = None,
    part: Part = WHOLE,
) -> Summary:
    """Train the job in `folder` to its end, from the newest good checkpoint in it if there is one.

    The first Ctrl-C or SIGTERM saves a checkpoint and ends the run, the second ends it at once.

    Args:
        config: the checked job; of a run that goes on, what `resumed_job` gives.
        folder: the run's folder.
        on_progress: called in another thread with each record of the log as it appears.
        on_event: called in the same way with what happens besides: failures, checkpoints, skipped steps.
        part: how much of it now, and where.

    Raises:
        RunBusyError: the run is being trained already.
        TrackingError, ClusterError, DataError, TrainingError: what cannot be reached, found or done, and how to fix it.
        KeyboardInterrupt: passed on after the run was marked as interrupted.
    """
    known = {field.name for field in fields(Summary)} - KNOWN_AT_ONCE
    return Summary(**drive(config, folder, _on_corpus, known, on_progress, on_event, part))


def _on_corpus(config: JobConfig, folder: RunFolder, begun: bool) -> Work:
    from nestling.training.worker import train_worker

    corpus = _corpus(config, folder, begun)
    corpus.tokenizer.save(folder.tokenizer)
    line = corpus.line(config.data.sequence_length)
    return Work(train_worker, {"corpus": str(corpus.folder.resolve())}, {"data": line})


def drive(
    config: JobConfig,
    folder: RunFolder,
    prepare: Callable[[JobConfig, RunFolder, bool], Work],
    results: Iterable[str],
    on_progress: Progress | None,
    on_event: Progress | None,
    part: Part,
    readers: int = 1,
) -> dict[str, Any]:
    """A run from its claim to its summary, whatever its workers do; see `fit`.

    Args:
        prepare: gets the complete job, the folder, and whether the run has begun; Ray is running.
        results: names of figures that a run that goes on does not know yet.
        readers: tasks of Ray Data that read while the workers work.
    """
    with folder.claim():
        folder.update(**dict.fromkeys(results), status="running", error=None, finished=None)
        folder.stop.unlink(missing_ok=True)
        status, store, tracked = "failed", None, None
        try:
            if folder.config.exists():
                config = take_up(folder, config)
            check_levels(config)
            config = complete(config)
            if not folder.config.exists():  # from here on there is something to resume
                folder.write_config(to_yaml(config))
            store = _reachable_store(config, folder)
            tracked = start(to_mapping(config), folder, config.tracking.uri, config.tracking.experiment)
            wanted = config.training.workers
            with connected(wanted, wanted if config.training.device == "cuda" else 0, readers):
                begun = [checkpoint.step for checkpoint in store.checkpoints()][:1] != [0]
                work = prepare(config, folder, begun)
                folder.write_config(to_yaml(config))
                with followed(folder, on_progress, on_event):
                    while (result := _train(_on_device(config), work, folder, tracked, part))["status"] == CHANGED:
                        config = take_up(folder, config)
                        tracked = start(to_mapping(config), folder, config.tracking.uri, config.tracking.experiment)
            result["checkpoint"] = _newest(store)
            result |= work.figures
            status = result.pop("status")
            return _sum_up(folder, tracked, status, result)
        except KeyboardInterrupt:
            status = "interrupted"
            _note(folder, checkpoint=_newest(store))
            raise
        except Exception as error:
            status = "failed"
            _note(folder, error=str(error), checkpoint=_newest(store))
            raise
        finally:
            _note(folder, status=status)
            if tracked is not None:
                try:
                    finish(tracked, folder, status, _figure(folder))
                except OSError as error:
                    log.warning("the end of the run cannot be prepared for MLflow: %s", error)


def check_levels(config: JobConfig) -> None:
    """Find out before anything starts whether every level has parameters; the model is built without its numbers."""
    import torch

    from nestling.training.groups import parameter_groups

    with torch.device("meta"):
        parameter_groups(build(replace(config.model, vocab_size=config.model.vocab_size or 2)), config)


def _reachable_store(config: JobConfig, folder: RunFolder) -> Store:
    """Where the run's checkpoints go; CheckpointError before anything starts if that cannot be used."""
    place = config.checkpoint.dir or str(folder.path)
    try:
        store = run_store(config, folder)
        if not store.checkpoints() and any(event["kind"] == "checkpoint" for event in folder.happened()):
            problem = "; ".join(store.damaged()) or "there is none now"
            raise CheckpointError(
                f"run {folder.run_id} has saved checkpoints in {shown(place)}, but none can be used ({problem}); "
                "put them back, or start a new run"
            )
        if "://" not in place:
            Path(place).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint.dir: checkpoints cannot be kept in {shown(place)}: {shown(str(error))}; "
            "name a folder or bucket that can be written"
        ) from error
    return store


def _note(folder: RunFolder, **fields: Any) -> None:
    """Write down how the run ended; a full disk must not hide it."""
    try:
        folder.update(**fields)
    except OSError as error:
        log.warning("run.json cannot be written: %s", error)


def _newest(store: Store | None) -> str | None:
    """Where the newest checkpoint is, as far as that can be found out at the end of a run."""
    try:
        return next((store.location(checkpoint) for checkpoint in store.checkpoints()), None) if store else None
    except OSError:
        return None


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


def complete(config: JobConfig) -> JobConfig:
    """Fill in the vocabulary, and make all places mean the same in the workers, which run in folders of their own."""
    data, stream, checkpoint, model = config.data, config.stream, config.checkpoint, config.model
    mix = data.mix and [replace(part, source=absolute(part.source)) for part in data.mix]
    sources = stream.sources and [replace(part, source=absolute(part.source)) for part in stream.sources]
    tokenizer = data.tokenizer if data.tokenizer == "bytes" else str(Path(data.tokenizer).expanduser().resolve())
    data = replace(data, source=absolute(data.source), mix=mix, tokenizer=tokenizer)
    if checkpoint.dir is not None and "://" not in checkpoint.dir:
        checkpoint = replace(checkpoint, dir=str(Path(checkpoint.dir).expanduser().resolve()))
    if model.vocab_size is None:
        model = replace(model, vocab_size=open_tokenizer(data).vocab_size)
    stream = replace(stream, sources=sources)
    return replace(config, data=data, stream=stream, checkpoint=checkpoint, model=model)


def _corpus(config: JobConfig, folder: RunFolder, begun: bool) -> Corpus:
    """The prepared data; of a run that has begun, exactly what it began with. There is at least one batch in it."""
    cache, before = Path(config.run.dir) / "cache", folder.info().get("corpus") if begun else None
    if before and (cache / before).is_dir() and folder.info().get("data_digest") == _digest(config):
        return Corpus.open(cache / before)
    corpus = prepare(config.data, cache)
    if before and corpus.folder.name != before:
        raise DataError(
            f"data.source: {config.data.source} does not hold what run {folder.run_id} began with, so its position in "
            "it means nothing; put the old content back (data.source may name another place), or start a new run"
        )
    length, training = config.data.sequence_length, config.training
    Feed(corpus, length, training.batch_tokens // length, config.seed)
    folder.update(corpus=corpus.folder.name, data_digest=_digest(config))
    return corpus


def _digest(config: JobConfig) -> str:
    """What tells one section `data` from another."""
    return hashlib.sha256(repr(config.data).encode()).hexdigest()


def _train(config: JobConfig, work: Work, folder: RunFolder, tracked: TrackedRun, part: Part) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    entry: Any = work.entry  # Ray's annotation leaves out that a worker may return something
    settings = {
        "config": to_yaml(config),
        "folder": str(folder.path),
        **work.settings,
        "part": part,
        "tracking_uri": tracked.uri,
        "mlflow_run_id": tracked.mlflow_run_id,
    }
    if part.in_process:
        form_group()
        return attended(partial(entry, settings), folder)
    failures = config.training.max_failures
    trainer = TorchTrainer(
        entry,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=config.training.workers, use_gpu=config.training.device == "cuda"),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder.path),
            failure_config=FailureConfig(max_failures=failures),
            callbacks=[ending(folder, failures)],
        ),
    )
    try:
        result: Any = attended(trainer.fit, folder)
        return result.return_value
    except TrainingFailedError as error:
        raise TrainingError(_first_cause(error)) from error


def _first_cause(error: BaseException) -> str:
    """The message of the exception that a worker raised, without Ray's wrapping."""
    for failure in (getattr(error, "worker_failures", None) or {}).values():
        cause = getattr(failure, "cause", None) or failure
        return str(cause).strip().splitlines()[-1]
    return str(error).strip().splitlines()[-1]


def _sum_up(folder: RunFolder, tracked: TrackedRun, status: str, result: dict[str, Any]) -> dict[str, Any]:
    error, evaluation = result.pop("error", None), result.pop("evaluation", None)
    if evaluation is not None:
        evaluation = {"run_id": folder.run_id, **evaluation}
        folder.evaluation.write_text(json.dumps(evaluation, indent=2) + "\n")
        result |= {key: evaluation[key] for key in ("heldout_bits_per_byte", "unigram_bits_per_byte")}
    folder.update(**result)
    if status == "interrupted":
        raise KeyboardInterrupt
    if status == "failed":
        raise TrainingError(error)
    known = {"run_id": folder.run_id, "status": status, "run_dir": str(folder.path), "tracking_uri": tracked.uri}
    return known | result


def _figure(folder: RunFolder) -> Path | None:
    from nestling.tracking.figures import FADING, loss_figure, stream_figure

    records = folder.records()
    if not records:
        return None
    info = folder.info()
    if FADING in records[-1]:
        drifts = sorted({event["step"] for event in folder.happened() if event["kind"] == "drift"})
        keys = dict.fromkeys(key for record in records for key in record if key.startswith("probe/"))
        probes = [key for key in keys if key.count("/") == 2]
        stream_figure(records, folder.figure, drifts, f"{folder.name} ({folder.run_id})", probes)
        return folder.figure
    loss_figure(records, folder.figure, info.get("unigram_bits_per_byte"), f"{folder.name} ({folder.run_id})")
    return folder.figure

"""A run's weights as a model: from `model.safetensors` once it has finished, from its newest checkpoint before."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nestling.checkpoint.errors import CheckpointError
from nestling.checkpoint.grown import grown
from nestling.checkpoint.pieces import WEIGHT, write_tensors
from nestling.checkpoint.place import below
from nestling.checkpoint.store import OpenCheckpoint, Store
from nestling.config import JobConfig, from_yaml
from nestling.data import Tokenizer
from nestling.models import build
from nestling.models.skeleton import LanguageModel
from nestling.tracking import RunFolder

log = logging.getLogger(__name__)


def run_store(config: JobConfig, folder: RunFolder) -> Store:
    """Where the checkpoints of a run lie: `checkpoint.dir`, or `checkpoints` in its folder."""
    local = folder.path / "checkpoints"
    if config.checkpoint.dir is None:
        return Store(local)
    return Store(below(config.checkpoint.dir, folder.path.name), scratch=local)


def export_weights(store: Store, config: JobConfig, path: Path) -> int:
    """Write the float32 weights of the newest good checkpoint as one safetensors file, a parameter in memory at a time.

    Args:
        config: the job, which says what parameters there are.
        path: the file; it is either the old one or the whole new one. Its folder holds the draft.

    Returns:
        The checkpoint's step.
    """
    found = grown(newest_good(store), config)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in build(config.model).named_parameters()}
    tensors = {name: (torch.float32, shape) for name, shape in sorted(shapes.items())}
    draft = path.with_suffix(".tmp")
    write_tensors(draft, tensors, (found.pieces.read(WEIGHT + name) for name in tensors))
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)
    return found.checkpoint.step


def load_final(folder: RunFolder, device: str = "cpu") -> tuple[LanguageModel, Tokenizer, JobConfig]:
    """The model in eval mode and float32, its tokenizer and its job: as trained in the end, or as in the newest good
    checkpoint of a run that has not finished.

    Raises:
        CheckpointError: the run has neither, or a file of it is missing or altered.
    """
    try:
        _check_there(folder)
        config = from_yaml(folder.config.read_text())
        tokenizer = Tokenizer.load(folder.tokenizer, config.data.separator)
        weights = open_weights(folder, config)
        model = build(config.model).to(device, torch.float32)
        parameters = dict(model.named_parameters())
        _check_fit(folder, weights, parameters)
        for name, parameter in parameters.items():
            parameter.data.copy_(weights.read(name).view(parameter.shape))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"run {folder.run_id} in {folder.path} cannot be read: {error}") from error
    return model.eval(), tokenizer, config


def write_weights(folder: RunFolder, path: Path) -> int:
    """Write the weights that `load_final` gives to a file; returns their optimizer step.

    Raises:
        CheckpointError: the run has none, or they are damaged.
    """
    _check_there(folder)
    if _finished(folder):
        shutil.copyfile(folder.weights, path)
        return int(folder.info()["steps"])
    config = from_yaml(folder.config.read_text())
    return export_weights(run_store(config, folder), config, path)


def trained_step(folder: RunFolder) -> int | None:
    """The optimizer step of the weights that `load_final` gives; None if the run has none."""
    if _finished(folder):
        return int(folder.info()["steps"])
    if not folder.config.exists():
        return None
    checkpoints = run_store(from_yaml(folder.config.read_text()), folder).checkpoints()
    return checkpoints[0].step if checkpoints else None


@dataclass(frozen=True)
class Weights:
    """Float32 weights that are read one by one, flattened: from the final file, or from a checkpoint."""

    source: str
    sizes: dict[str, int]
    read: Callable[[str], Tensor]


def _finished(folder: RunFolder) -> bool:
    """Whether the run has its final weights, and not those of an earlier end from which it has gone on."""
    return folder.status() == "finished" and folder.weights.exists()


def open_weights(folder: RunFolder, config: JobConfig) -> Weights:
    """The weights that `load_final` gives, to be read one by one.

    Raises:
        CheckpointError: there is no good checkpoint.
    """
    if _finished(folder):
        file = safe_open(folder.weights, framework="pt")
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return Weights(str(folder.weights), sizes, lambda name: file.get_tensor(name).flatten())
    store = run_store(config, folder)
    found = grown(newest_good(store), config)
    log.info("taking the checkpoint of step %d", found.checkpoint.step)
    sizes = {n.removeprefix(WEIGHT): size for n, size in found.pieces.sizes.items() if n.startswith(WEIGHT)}
    return Weights(store.location(found.checkpoint), sizes, lambda name: found.pieces.read(WEIGHT + name))


def _check_there(folder: RunFolder) -> None:
    if not _finished(folder) and trained_step(folder) is None:
        raise CheckpointError(
            f"run {folder.run_id} ({folder.name}) has no weights: its status is {folder.status()!r} and it has no "
            "checkpoint; wait for one, resume it, or name another run (nestling runs lists them)"
        )


def _check_fit(folder: RunFolder, weights: Weights, parameters: Mapping[str, Tensor]) -> None:
    if weights.sizes != {name: parameter.numel() for name, parameter in parameters.items()}:
        raise CheckpointError(
            f"{weights.source} does not hold the weights of the model in {folder.config}: names or sizes differ; "
            "put back the file that the run wrote"
        )


def newest_good(store: Store) -> OpenCheckpoint:
    """The newest checkpoint without damage.

    Raises:
        CheckpointError: there is none; the message says what is wrong with those that there are.
    """
    damage = store.damaged()
    for checkpoint in store.checkpoints():
        if not (problems := store.problems(checkpoint)):
            return store.open(checkpoint)
        log.warning("the checkpoint of step %d is damaged: %s", checkpoint.step, problems[0])
        damage.append(problems[0])
    raise CheckpointError(f"there is no good checkpoint: {'; '.join(damage) or 'none at all'}")

"""The end of a run as files that hold no code: `model.safetensors`, `config.yaml`, `tokenizer.json`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestling.checkpoint.errors import CheckpointError
from nestling.config import JobConfig, from_yaml
from nestling.data import Tokenizer
from nestling.models import build
from nestling.models.skeleton import LanguageModel
from nestling.tracking import RunFolder


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write the weights so that `path` is either the old file or the whole new one."""
    draft = path.with_suffix(".tmp")
    save_file(weights, draft)
    draft.chmod(0o644)  # the library makes it readable by its owner alone
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)


def load_final(folder: RunFolder, device: str = "cpu") -> tuple[LanguageModel, Tokenizer, JobConfig]:
    """The trained model in eval mode and float32, its tokenizer and its job.

    Raises:
        CheckpointError: the run has not finished, or a file of it is missing or altered.
    """
    if not folder.weights.exists():
        status = folder.info().get("status")
        raise CheckpointError(
            f"run {folder.run_id} ({folder.name}) has no weights: its status is {status!r} and {folder.weights} does "
            "not exist; wait for it to finish, or name another run (nestling runs lists them)"
        )
    try:
        config = from_yaml(folder.config.read_text())
        tokenizer = Tokenizer.load(folder.tokenizer, config.data.separator)
        weights = load_file(folder.weights, device=device)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"run {folder.run_id} in {folder.path} cannot be read: {error}") from error
    model = build(config.model).to(device, torch.float32)
    expected = dict(model.named_parameters())
    if weights.keys() != expected.keys() or any(weights[name].shape != expected[name].shape for name in weights):
        raise CheckpointError(
            f"{folder.weights} does not hold the weights of the model in {folder.config}: names or shapes differ; "
            "put back the file that the run wrote"
        )
    model.load_state_dict(weights, strict=False)  # a tied head has no entry of its own
    return model.eval(), tokenizer, config

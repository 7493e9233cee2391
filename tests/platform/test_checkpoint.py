"""The files of a finished run: read back as they were written, refused with the reason when they are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestling.checkpoint import (
    WEIGHT,
    CheckpointError,
    Piece,
    Saver,
    Store,
    export_weights,
    load_final,
    run_store,
    trained_step,
)
from nestling.config import JobConfig, to_yaml
from nestling.config.schema import LevelConfig
from nestling.data import Tokenizer
from nestling.models import HopeConfig, build
from nestling.models.skeleton import LanguageModel
from nestling.tracking import RunFolder


@pytest.fixture
def job() -> JobConfig:
    model = HopeConfig(vocab_size=257, width=8, layers=1, heads=1)
    return JobConfig(model=model, levels=[LevelConfig(width=8)])


@pytest.fixture
def folder(tmp_path: Path, job: JobConfig) -> RunFolder:
    """A finished run with random weights (seed 5)."""
    folder = RunFolder.create(tmp_path, "done")
    torch.manual_seed(5)
    save_file(dict(build(job.model).named_parameters()), folder.weights)
    folder.config.write_text(to_yaml(job))
    Tokenizer.bytes().save(folder.tokenizer)
    folder.update(status="finished")
    return folder


def rewrite(folder: RunFolder, **changes: Any) -> None:
    """Change some weights; None takes one out."""
    weights = load_file(folder.weights) | changes
    save_file({name: weight for name, weight in weights.items() if weight is not None}, folder.weights)


def test_what_was_written_comes_back(folder: RunFolder, job: JobConfig) -> None:
    torch.manual_seed(5)
    written = dict(build(job.model).named_parameters())
    model, tokenizer, config = load_final(folder)
    assert config == job and tokenizer.vocab_size == 257 and not model.training
    read = dict(model.named_parameters())
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in read)


def test_a_tied_head_is_one_tensor(tmp_path: Path, job: JobConfig) -> None:
    job = replace(job, model=replace(job.model, tie_head=True))
    folder = RunFolder.create(tmp_path, "tied")
    written = build(job.model)
    save_file(dict(written.named_parameters()), folder.weights)
    folder.config.write_text(to_yaml(job))
    Tokenizer.bytes().save(folder.tokenizer)
    folder.update(status="finished")
    model = load_final(folder)[0]
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, written.head.weight)


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_run_without_weights_says_how_it_stands(folder: RunFolder, status: str) -> None:
    folder.weights.unlink()
    folder.update(status=status)
    with pytest.raises(
        CheckpointError, match=f"has no weights: its status is '{status}' and it has no checkpoint; wait"
    ):
        load_final(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"head.weight": torch.zeros(256, 8)},
        {"head.weight": None},
        {"head.weight": None, "heat.weight": torch.zeros(257, 8)},
        {"more": torch.zeros(1)},
    ],
    ids=["narrower", "missing", "renamed", "one more"],
)
def test_weights_of_another_model_are_refused(folder: RunFolder, changes: dict[str, Any]) -> None:
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match="does not hold the weights of the model in .* put back the file") as info:
        load_final(folder)
    assert str(folder.weights) in str(info.value) and str(folder.config) in str(info.value)


def test_a_config_of_another_model_is_refused(folder: RunFolder, job: JobConfig) -> None:
    folder.config.write_text(to_yaml(replace(job, model=replace(job.model, width=16))))
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        load_final(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_refused(folder: RunFolder, kept: int) -> None:
    folder.weights.write_bytes(folder.weights.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"run {folder.run_id} in .* cannot be read: "):
        load_final(folder)


@pytest.mark.parametrize("text", ["model: [", "model: {name: hope, widht: 8}", "training: {steps: -1}"])
def test_an_altered_config_is_refused(folder: RunFolder, text: str) -> None:
    folder.config.write_text(text)
    with pytest.raises(CheckpointError, match=f"run {folder.run_id} in .* cannot be read: "):
        load_final(folder)


@pytest.mark.parametrize("name", ["config", "tokenizer"])
def test_a_missing_file_is_named(folder: RunFolder, name: str) -> None:
    path = getattr(folder, name)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"cannot be read: .*{path.name}"):
        load_final(folder)


def test_an_altered_tokenizer_is_refused(folder: RunFolder) -> None:
    folder.tokenizer.write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read: .*not a tokenizer.json"):
        load_final(folder)


def test_a_run_under_way_gives_the_weights_of_its_newest_good_checkpoint(folder: RunFolder, job: JobConfig) -> None:
    folder.weights.unlink()
    folder.update(status="interrupted")
    store = run_store(job, folder)
    models = {}
    for step in (10, 20, 30):
        models[step] = save(store, step, job)
    assert trained_step(folder) == 30
    assert torch.equal(load_final(folder)[0].head.weight, models[30].head.weight)
    (shard,) = (folder.path / "checkpoints/step-00000030").rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert torch.equal(load_final(folder)[0].head.weight, models[20].head.weight)


def test_a_checkpoint_becomes_one_file(folder: RunFolder, job: JobConfig) -> None:
    store = run_store(job, folder)
    model = save(store, 10, job)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert export_weights(store, job, folder.weights) == 10
    exported = load_file(folder.weights)
    assert {name: weight.shape for name, weight in exported.items()} == shapes
    assert all(torch.equal(exported[name], parameter) for name, parameter in model.named_parameters())
    assert folder.weights.stat().st_mode & 0o777 == 0o644
    assert not list(folder.path.glob("*.tmp"))


def save(store: Store, step: int, job: JobConfig) -> LanguageModel:
    """A checkpoint with the weights of a model of its own, in two pieces each."""
    torch.manual_seed(step)
    model = build(job.model)
    pieces = []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        half = len(flat) // 2
        pieces += [Piece(WEIGHT + name, 0, flat[:half]), Piece(WEIGHT + name, half, flat[half:])]
    saver = Saver(store, 0, 1, 5, 0, lambda *_: None, lambda *_: None)
    saver.write(step, "token", pieces, {})
    saver.commit()
    assert saver.wait()
    return model

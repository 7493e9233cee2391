"""The files of a finished run: read back as they were written, refused with the reason when they are not."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestling.checkpoint import CheckpointError, load_final, save_weights
from nestling.checkpoint import final as final_module
from nestling.config import JobConfig, to_yaml
from nestling.config.schema import LevelConfig
from nestling.data import Tokenizer
from nestling.models import HopeConfig, build
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
    save_weights(dict(build(job.model).named_parameters()), folder.weights)
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
    save_weights(dict(written.named_parameters()), folder.weights)
    folder.config.write_text(to_yaml(job))
    Tokenizer.bytes().save(folder.tokenizer)
    model = load_final(folder)[0]
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, written.head.weight)


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_run_without_weights_says_how_it_stands(folder: RunFolder, status: str) -> None:
    folder.weights.unlink()
    folder.update(status=status)
    with pytest.raises(CheckpointError, match=f"has no weights: its status is '{status}' and .*wait for it to finish"):
        load_final(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"head.weight": torch.zeros(256, 8)},
        {"head.weight": torch.zeros(257 * 8)},
        {"head.weight": None},
        {"head.weight": None, "heat.weight": torch.zeros(257, 8)},
        {"more": torch.zeros(1)},
    ],
    ids=["narrower", "flat", "missing", "renamed", "one more"],
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


def test_a_failing_write_leaves_the_old_weights(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full half-way: what was there stays whole."""

    def half(weights: dict[str, torch.Tensor], path: Path) -> None:
        save_file(weights, path)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    before = folder.weights.read_bytes()
    monkeypatch.setattr(final_module, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        save_weights({"head.weight": torch.zeros(257, 8)}, folder.weights)
    assert folder.weights.read_bytes() == before
    load_final(folder)


def test_weights_are_replaced_whole_and_readable_by_others(folder: RunFolder) -> None:
    save_weights({"new": torch.ones(3)}, folder.weights)
    assert torch.equal(load_file(folder.weights)["new"], torch.ones(3))
    assert folder.weights.stat().st_mode & 0o777 == 0o644
    assert not list(folder.path.glob("*.tmp"))

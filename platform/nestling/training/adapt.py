"""A pretrained model becomes a run: ad-hoc level stacking (arXiv:2512.24695, Sec. 7.3).

Every decoder layer's MLP joins a level of the Continuum Memory System, MLP_0^(f_i) := MLP_pretrained_i; nothing else
changes, so the function is the same to the bit of its weights. The run looks like one that has finished at step 0: it
can be evaluated and exported at once, and trained further from its checkpoint of step 0.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors import safe_open

from nestling.checkpoint import WEIGHT, run_store
from nestling.checkpoint.alone import WeightsHash, commit_tensors
from nestling.checkpoint.pieces import write_tensors
from nestling.checkpoint.pretrained import Pretrained, copy_companions
from nestling.config import ConfigError, JobConfig, from_yaml, to_mapping, to_yaml
from nestling.data import DataError, Tokenizer, check_source
from nestling.data.preparing import open_tokenizer
from nestling.tracking import RunFolder, finish, start
from nestling.training.guard import Guard
from nestling.training.keeper import FORMAT

#: What a job of a pretrained model has other than by default; its weights are too good for a beginner's rate.
DEFAULTS = {"training": {"learning_rate": 1e-4}}


def stacked(layers: int, periods: Sequence[int], unit: str, interleaved: bool) -> list[dict[str, Any]]:
    """The levels that the MLPs of `layers` decoder layers join, one for each period.

    Contiguous groups, the first layers in the first level, as even as can be with the larger groups first; or
    interleaved: layer j in level j mod the number of levels.

    Raises:
        ConfigError: more levels than layers.
    """
    count = len(periods)
    if not 1 <= count <= layers:
        raise ConfigError(f"--levels: got {count} periods, needs 1 to {layers}: every level takes one layer or more")
    groups = [
        [layer for layer in range(layers) if (layer % count if interleaved else layer * count // layers) == place]
        for place in range(count)
    ]
    return [{"period": period, "unit": unit, "layers": group} for period, group in zip(periods, groups, strict=True)]


def adapted_job(
    pretrained: Pretrained, levels: list[dict[str, Any]], name: str, overrides: Sequence[str]
) -> tuple[JobConfig, Tokenizer]:
    """The job of an adapted run, and its tokenizer: the pretrained one, or bytes for a model that came without.

    Raises:
        ConfigError: an override that is wrong, or changes the model or the levels' layers.
        DataError: the tokenizer cannot be used, or the data are not there.
    """
    given: dict[str, Any] = {"run": {"name": name}, "model": asdict(pretrained.config), "levels": levels, **DEFAULTS}
    if pretrained.tokenizer is not None:
        given["data"] = {"tokenizer": str(pretrained.tokenizer)}
    config = from_yaml(json.dumps(given), overrides)
    if asdict(config.model) | {"level_layers": []} != asdict(pretrained.config):
        raise ConfigError("model: is what the pretrained model says; its keys cannot be changed here")
    if [level.layers for level in config.levels] != [level["layers"] for level in levels]:
        raise ConfigError("levels: the layers of each level follow from --levels; other keys of levels can be changed")
    if config.data.tokenizer == "bytes" and (pretrained.folder / "tokenizer.model").exists():
        raise DataError(
            f"data.tokenizer: {pretrained.folder} has a tokenizer.model and no tokenizer.json; make one with "
            "transformers (AutoTokenizer.from_pretrained(PATH).save_pretrained(PATH))"
        )
    if config.data.mix is None:
        check_source(config.data.source)
    tokenizer = open_tokenizer(config.data)
    if tokenizer.vocab_size > (pretrained.config.vocab_size or 0):
        raise DataError(
            f"data.tokenizer: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's "
            f"{pretrained.config.vocab_size}; give the model's own with data.tokenizer=FILE"
        )
    return config, tokenizer


def adapt(pretrained: Pretrained, config: JobConfig, tokenizer: Tokenizer) -> RunFolder:
    """Make the run; it is whole, or not there at all.

    Raises:
        TrackingError: MLflow cannot be used.
        LayoutError: a weight is not finite.
    """
    folder = RunFolder.create(config.run.dir, config.run.name)
    try:
        with folder.claim():
            _fill(folder, pretrained, config, tokenizer)
            folder.update(status="finished")
            tracked = start(to_mapping(config), folder, config.tracking.uri, config.tracking.experiment)
            finish(tracked, folder, "finished")
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    return folder


def _fill(folder: RunFolder, pretrained: Pretrained, config: JobConfig, tokenizer: Tokenizer) -> None:
    folder.write_config(to_yaml(config))
    tokenizer.save(folder.tokenizer)
    folder.pretrained.mkdir()
    copy_companions(pretrained.folder, folder.pretrained)
    shapes, digest = pretrained.shapes, WeightsHash()
    draft = folder.weights.with_suffix(".tmp")
    entries = {name: (torch.float32, shape) for name, shape in shapes.items()}
    write_tensors(draft, entries, digest.through(shapes, pretrained.read()))
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(folder.weights)
    store = run_store(config, folder)
    with safe_open(folder.weights, framework="pt") as weights:
        checkpoint = commit_tensors(
            store,
            0,
            {WEIGHT + name: (torch.float32, shape.numel()) for name, shape in shapes.items()},
            (weights.get_tensor(name) for name in shapes),
            {"state.json": json.dumps(_beginning(), indent=1), "config.yaml": to_yaml(config)},
        )
    folder.event("adapted", f"the weights of {pretrained.folder} were taken over", source=str(pretrained.folder))
    folder.update(
        base={"name": pretrained.name, "sha256": digest.hexdigest(), "source": str(pretrained.folder)},
        steps=0,
        tokens=0,
        checkpoint=store.location(checkpoint),
    )


def _beginning() -> dict[str, Any]:
    """The state of a training that has taken no step."""
    return {
        "format": FORMAT,
        "step": 0,
        "passed_over": 0,
        "loss": None,
        "updates": {},
        "guard": Guard(0).state(),
        "layout": {},
        "optimizer": {},
        "lineage": [],
    }

"""A model in Hugging Face's layout: a folder of `config.json`, safetensors and a tokenizer, read and written.

Tensors are read one parameter at a time, so a model needs no more memory than its largest matrix. Everything is checked
before anything is read: the configuration, and name, shape and dtype of every tensor.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nestling.checkpoint.final import open_weights, trained_step
from nestling.checkpoint.layouts import LayoutError, config_json, model_config, tensor_names
from nestling.checkpoint.pieces import write_tensors
from nestling.config import JobConfig, from_yaml
from nestling.data import Tokenizer
from nestling.models import build
from nestling.models.config import AttentionConfig, HopeAttentionConfig
from nestling.tracking import RunFolder

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
#: Small files that a folder may have besides; an adapted run keeps them for the way back.
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_INDEX = f"{WEIGHTS}.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
#: Buffers that old versions of transformers stored with the weights; they follow from the configuration.
_BUFFER = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Pretrained:
    """A checked folder.

    Attributes:
        folder: where it is.
        config: the model that it holds.
        shapes: of every parameter of that model, sorted by name.
    """

    folder: Path
    config: HopeAttentionConfig
    shapes: Mapping[str, torch.Size]
    _files: Mapping[str, Path]

    @property
    def name(self) -> str:
        """What people call it: the folder's name."""
        return self.folder.name

    @property
    def run_name(self) -> str:
        """The same as the name of a run."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-._") or "adapted"

    @property
    def tokenizer(self) -> Path | None:
        """Its `tokenizer.json`, if there is one."""
        path = self.folder / TOKENIZER
        return path if path.is_file() else None

    def read(self) -> Iterator[Tensor]:
        """The parameters in float32, in the order of `shapes`.

        Raises:
            LayoutError: a weight is not finite.
        """
        sources = tensor_names(self.config)
        for name in self.shapes:
            parameter = torch.cat([self._tensor(tensor) for tensor in sources[name]])
            if not parameter.isfinite().all():
                raise LayoutError(f"{self.folder}: {', '.join(sources[name])} holds values that are not finite")
            yield parameter

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name).float()


def open_pretrained(folder: str | Path) -> Pretrained:
    """Look through a folder in Hugging Face's layout; nothing is written and hardly anything read.

    Raises:
        LayoutError: it is no such folder, or holds what cannot be represented; the message names it.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise LayoutError(f"{folder} {problem}; give a folder in Hugging Face's layout: {CONFIG} and safetensors")
    try:
        config = model_config(_mapping(folder / CONFIG))
        files = _files(folder)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in sorted(build(config).named_parameters())}
        _check_tensors(config, shapes, files)
    except LayoutError as error:
        raise LayoutError(f"{folder}: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise LayoutError(f"{folder} cannot be read: {error}") from error
    return Pretrained(folder, config, shapes, files)


def write_pretrained(
    folder: Path, config: AttentionConfig, description: Mapping[str, Any], read: Callable[[str], Tensor]
) -> None:
    """Write `config.json` and `model.safetensors` (float32) into a folder.

    Args:
        config: the model.
        description: what `config.json` is to say.
        read: gives a parameter's weights by its name here, flat or in shape.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build(config).named_parameters()}
    sources = tensor_names(config)
    entries = {
        tensor: (torch.float32, torch.Size([rows, *shape[1:]]))
        for name, shape in shapes.items()
        for tensor, rows in sources[name].items()
    }
    parts = (
        part for name, shape in shapes.items() for part in read(name).view(shape).split(list(sources[name].values()))
    )
    # Before version 5, transformers does not take a file without this note.
    write_tensors(folder / WEIGHTS, entries, parts, notes={"format": "pt"})
    stated = {key: value for key, value in description.items() if key != "torch_dtype"} | {"dtype": "float32"}
    (folder / CONFIG).write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def export_pretrained(run: RunFolder, out: Path) -> int:
    """Write a run's model into a folder that transformers loads, with the same logits; returns its optimizer step.

    An adapted run goes out with the `config.json` and tokenizer files that it came with, any other model as the family
    that has all it has. The tokenizer goes along.

    Raises:
        LayoutError: there is no such family; the message says why.
        CheckpointError: the run has no weights.
    """
    job, tokenizer = exportable_job(run), Tokenizer.load(run.tokenizer)
    assert isinstance(job.model, AttentionConfig)
    step = trained_step(run)
    weights = open_weights(run, job)
    if run.pretrained.is_dir():
        copy_companions(run.pretrained, out)
        description = _mapping(out / CONFIG)
    else:
        description = config_json(job.model, job.data.sequence_length, tokenizer.separator)
    write_pretrained(out, job.model, description, weights.read)
    shutil.copyfile(run.tokenizer, out / TOKENIZER)
    assert step is not None
    return step


def exportable_job(run: RunFolder) -> JobConfig:
    """The job of a run whose model a family holds; raises LayoutError as `export_pretrained` does."""
    job = from_yaml(run.config.read_text(encoding="utf-8"))
    if not isinstance(job.model, AttentionConfig):
        raise LayoutError(f"model.name={job.model.name}: transformers has no model with its parts")
    config_json(job.model, job.data.sequence_length, 0)
    return job


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the small files that are there; returns their names."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LayoutError(f"there is no {path.name}; give a folder in Hugging Face's layout")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LayoutError(f"{path.name} is no JSON: {error}; put back the whole file") from error
    if not isinstance(content, dict):
        raise LayoutError(f"{path.name} holds no mapping")
    return content


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index = folder / _INDEX
    if index.is_file():
        listed = _mapping(index).get("weight_map")
        if not isinstance(listed, dict) or not all(Path(file).name == file for file in listed.values()):
            raise LayoutError(f"{_INDEX} has no weight_map of files in this folder")
        shards = sorted({folder / file for file in listed.values()})
    else:
        shards = [folder / WEIGHTS]
    if missing := [path.name for path in shards if not path.is_file()]:
        raise LayoutError(f"{', '.join(missing)} is missing; weights must be in safetensors")
    files: dict[str, Path] = {}
    for path in shards:
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise LayoutError(f"{path.name} is no whole safetensors file: {error}; put back the whole file") from error
    return {name: path for name, path in files.items() if not name.endswith(_BUFFER)}


def _check_tensors(config: HopeAttentionConfig, shapes: Mapping[str, torch.Size], files: Mapping[str, Path]) -> None:
    sources = tensor_names(config)
    needed = {tensor: [rows, *shapes[name][1:]] for name in shapes for tensor, rows in sources[name].items()}
    if config.tie_head and "lm_head.weight" in files:
        _check_tied(files)
    strange = [name for name in files if name not in needed and not (config.tie_head and name == "lm_head.weight")]
    for problem, names in (("are missing", [n for n in needed if n not in files]), ("do not belong to it", strange)):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise LayoutError(f"the tensors {', '.join(names[:3])}{rest} {problem}")
    for name, shape in needed.items():
        with safe_open(files[name], framework="pt") as file:
            found = file.get_slice(name)
            if found.get_dtype() not in _DTYPES:
                raise LayoutError(f"{name}: has the dtype {found.get_dtype()}, needs one of {', '.join(_DTYPES)}")
            if found.get_shape() != shape:
                raise LayoutError(f"{name}: has the shape {found.get_shape()}, needs {shape} by {CONFIG}")


def _check_tied(files: Mapping[str, Path]) -> None:
    """A head that is stored beside the embedding although they are one must be the same, as transformers has it."""
    name = "model.embed_tokens.weight"
    if name not in files:
        return
    with safe_open(files["lm_head.weight"], framework="pt") as head, safe_open(files[name], framework="pt") as other:
        if not torch.equal(head.get_tensor("lm_head.weight"), other.get_tensor(name)):
            raise LayoutError(
                f"tie_word_embeddings: {CONFIG} says that lm_head.weight is the embedding, but another one is stored; "
                "set it to false to keep both"
            )

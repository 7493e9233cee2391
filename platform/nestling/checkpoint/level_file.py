"""One level's weights in a folder of their own: `level.safetensors`, and `manifest.json`, which says whose they are.

The manifest holds the sum of the weights' file and of itself, so that damage is found before anything is read from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nestling.checkpoint.errors import CheckpointError
from nestling.checkpoint.pieces import write_tensors

_FORMAT = 1
_WEIGHTS, _MANIFEST = "level.safetensors", "manifest.json"


@dataclass(frozen=True)
class Origin:
    """Where a level comes from.

    Attributes:
        base: `name` of the pretrained model below the run, and the `sha256` of its weights (`alone.WeightsHash`).
        level: the level's name.
        period, unit: how often it moved.
        steps, tokens: what the level had been through when it left the run, there and in runs before.
        rest_sha256: of all other weights of the run at that time.
    """

    base: Mapping[str, str]
    level: str
    period: int
    unit: str
    steps: int
    tokens: int
    rest_sha256: str


@dataclass(frozen=True)
class LevelFile:
    """A level that was read and found whole."""

    origin: Origin
    weights: Mapping[str, Tensor]


def write_level(
    folder: Path, origin: Origin, shapes: Mapping[str, torch.Size], tensors: Iterable[Tensor]
) -> dict[str, Any]:
    """Write a level into an empty folder; returns its manifest."""
    path = folder / _WEIGHTS
    write_tensors(path, {name: (torch.float32, shape) for name, shape in shapes.items()}, tensors)
    body = {
        "format": _FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **asdict(origin),
        "weights": {"file": path.name, "bytes": path.stat().st_size, "sha256": _file_sum(path)},
    }
    manifest = body | {"sha256": _sum(body)}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def read_level(folder: Path) -> LevelFile:
    """Read what `write_level` wrote.

    Raises:
        CheckpointError: it is not there, of another format, or not as it was written.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest.get("sha256") != _sum(body):
            raise ValueError(f"{_MANIFEST} was altered: its SHA-256 sum is not the one that was written")
        if body["format"] != _FORMAT:
            raise ValueError(f"it has the format {body['format']}, this version reads {_FORMAT}")
        written = body["weights"]
        path = folder / _WEIGHTS
        if written["bytes"] != path.stat().st_size or written["sha256"] != _file_sum(path):
            raise ValueError(f"{_WEIGHTS} was altered: its SHA-256 sum is not {written['sha256']}")
        origin = Origin(**{key: body[key] for key in Origin.__dataclass_fields__})
        with safe_open(path, framework="pt") as file:
            return LevelFile(origin, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not a whole level that `nestling memory export` wrote: {error}") from error


def _sum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

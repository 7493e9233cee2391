"""What a checkpoint consists of: `manifest.json`, written last, with a length and a SHA-256 sum for every file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"([\w-]+/)?[\w-][\w.-]*", re.ASCII)  # nothing that leads out of the checkpoint's folder


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        step: optimizer steps done when it was taken.
        name: its folder, `step-00000120`.
        manifest: its `manifest.json`: `files` ({path: {bytes, sha256}}), `metric`, `created` and `sha256` of all that.
    """

    step: int
    name: str
    manifest: Mapping[str, Any]

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Length (`bytes`) and `sha256` of each file by its path in the checkpoint's folder."""
        return self.manifest["files"]

    @property
    def metric(self) -> float | None:
        """What the best checkpoints are chosen by, lower is better; None if nothing was measured."""
        return self.manifest["metric"]

    @property
    def created(self) -> float:
        """When, in seconds since 1970."""
        return datetime.fromisoformat(self.manifest["created"]).timestamp()


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def is_folder_name(name: str) -> bool:
    """Whether a folder can be a checkpoint's."""
    return _FOLDER.fullmatch(name) is not None


def step_of(name: str) -> int:
    """The step of a checkpoint's folder."""
    return int(name.removeprefix("step-"))


def is_file_name(name: str) -> bool:
    """Whether a checkpoint can hold a file of this name."""
    return _FILE.fullmatch(name) is not None


def new_checkpoint(step: int, files: Mapping[str, Mapping[str, Any]], metric: float | None) -> Checkpoint:
    """The checkpoint of these files, now; a metric that is no finite number counts as none."""
    body = {
        "format": _FORMAT,
        "step": step,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "files": dict(files),
    }
    return Checkpoint(step, folder_name(step), body | {"sha256": _digest(body)})


def dump(checkpoint: Checkpoint) -> bytes:
    """The text of `manifest.json`."""
    return json.dumps(checkpoint.manifest, indent=1).encode() + b"\n"


def parse(name: str, data: bytes) -> Checkpoint:
    """The checkpoint in the folder `name` from the text of its manifest.

    Raises:
        ValueError: it is not what `dump` wrote for this folder; the message says what is wrong.
    """
    try:
        manifest = json.loads(data)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        altered = manifest["sha256"] != _digest(body)
        if not altered and manifest["format"] != _FORMAT:
            raise ValueError(f"it has format {manifest['format']}; this version of Nestling reads format {_FORMAT}")
        if altered or folder_name(manifest["step"]) != name or not all(map(is_file_name, manifest["files"])):
            raise ValueError("it was altered: its SHA-256 sum or its step is not the one that was written")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is not a checkpoint's manifest ({type(error).__name__}: {error})") from error
    return Checkpoint(manifest["step"], name, manifest)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

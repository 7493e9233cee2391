"""`nestling export`: the files of a trained model in a folder of their own."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.jobs.arguments import AsJson, Run, RunDir, trained_run
from nestling.jobs.output import WRONG_USAGE, Stop, verb


class Format(StrEnum):
    """How a model is written."""

    #: Weights in safetensors, configuration and tokenizer beside them.
    SAFETENSORS = "safetensors"
    #: The layout of Hugging Face transformers.
    HF = "hf"


@verb("run_id", "step", "files", "sha256")
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    overrides: RunDir = None,
    format: Annotated[Format, typer.Option(help="How the model is written.")] = Format.SAFETENSORS,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Write a trained model's weights, configuration and tokenizer to a folder."""
    if format is Format.HF:
        raise Stop("--format hf: not available for these models yet; use --format safetensors", WRONG_USAGE)
    folder = trained_run(run, overrides)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Stop(f"--out: {out} exists and is not an empty folder; give a new one", WRONG_USAGE)
    from nestling.checkpoint import write_weights

    with _new_folder(out.resolve()) as draft:
        step = write_weights(folder, draft / folder.weights.name)
        for file in (folder.config, folder.tokenizer):
            shutil.copyfile(file, draft / file.name)
    names = [folder.weights.name, folder.config.name, folder.tokenizer.name]
    with (out / folder.weights.name).open("rb") as weights:
        sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
    if not as_json:
        print("\n".join(str(out / name) for name in names))
        print(f"sha256 of {folder.weights.name}: {sha256}")
    return {"run_id": folder.run_id, "step": step, "files": names, "sha256": sha256}


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A draft whose files stand in `out` at the end: a new folder appears with all of them, one that is there gets the
    first last."""
    exists = out.is_dir()
    draft = (out if exists else out.parent) / f".{out.name}.{secrets.token_hex(4)}"
    draft.mkdir(parents=True)
    try:
        yield draft
        if exists:
            for file in sorted(draft.iterdir(), reverse=True):
                file.rename(out / file.name)
            draft.rmdir()
        else:
            draft.rename(out)
    except BaseException:
        shutil.rmtree(draft)
        raise

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

from nestling.jobs.arguments import AsJson, Run, RunDir, need_writable, trained_run
from nestling.jobs.output import WRONG_USAGE, Stop, verb
from nestling.tracking.runs import RunFolder


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
    folder = trained_run(run, overrides)
    with new_folder(out) as draft:
        step = _write_hf(folder, draft) if format is Format.HF else _write(folder, draft)
        names = sorted((file.name for file in draft.iterdir()), key=lambda name: (name != folder.weights.name, name))
    with (out / folder.weights.name).open("rb") as weights:
        sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
    if not as_json:
        print("\n".join(str(out / name) for name in names))
        print(f"sha256 of {folder.weights.name}: {sha256}")
    return {"run_id": folder.run_id, "step": step, "files": names, "sha256": sha256}


def _write(folder: RunFolder, draft: Path) -> int:
    from nestling.checkpoint import write_weights  # torch takes seconds

    step = write_weights(folder, draft / folder.weights.name)
    for file in (folder.config, folder.tokenizer):
        shutil.copyfile(file, draft / file.name)
    return step


def _write_hf(folder: RunFolder, draft: Path) -> int:
    from nestling.checkpoint.layouts import LayoutError
    from nestling.checkpoint.pretrained import export_pretrained

    try:
        return export_pretrained(folder, draft)
    except LayoutError as error:
        raise Stop(
            f"--format hf: run {folder.run_id} cannot be written so: {error}; use --format safetensors", WRONG_USAGE
        ) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A draft whose files stand in `out` at the end, which must be new or empty: a new folder appears with all of
    them, one that is there gets the first last."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Stop(f"--out: {out} exists and is not an empty folder; give a new one", WRONG_USAGE)
    need_writable(out, "--out", "give another folder")
    out = out.resolve()
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

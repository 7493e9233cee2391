"""`nestling export`: the files of a trained model in a folder of their own."""

from __future__ import annotations

import hashlib
import secrets
import shutil
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
    files = [folder.weights, folder.config, folder.tokenizer]
    _copy(files, out.resolve())
    with (out / folder.weights.name).open("rb") as weights:
        sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
    if not as_json:
        print("\n".join(str(out / file.name) for file in files))
        print(f"sha256 of {folder.weights.name}: {sha256}")
    names = [file.name for file in files]
    return {"run_id": folder.run_id, "step": folder.info().get("steps"), "files": names, "sha256": sha256}


def _copy(files: list[Path], out: Path) -> None:
    """Copies files into the folder `out`: a new one appears with all of them, one that is there gets the first last."""
    exists = out.is_dir()
    draft = (out if exists else out.parent) / f".{out.name}.{secrets.token_hex(4)}"
    draft.mkdir(parents=True)
    try:
        for file in files:
            shutil.copyfile(file, draft / file.name)
        if exists:
            for file in reversed(files):
                (draft / file.name).rename(out / file.name)
            draft.rmdir()
        else:
            draft.rename(out)
    except BaseException:
        shutil.rmtree(draft)
        raise

"""Arguments that verbs share, and the run that a reference on the command line means."""

from __future__ import annotations

import os
import shlex
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from nestling.config import ConfigError, JobConfig, RunConfig, from_yaml, pick
from nestling.config.load import parse_override
from nestling.jobs.output import WRONG_USAGE, Stop, say
from nestling.models.config import ContinuumConfig
from nestling.tracking.runs import RunFolder, find_run

Job = Annotated[str, typer.Argument(metavar="JOB", help="A job file, or the name of one in ./jobs.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run id, the beginning of one, a run's name, or 'latest'.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the job, such as training.steps=100.", show_default=False),
]
RunDir = Annotated[
    list[str] | None,
    typer.Argument(metavar="run.dir=DIR", help="Where runs are kept.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object on one line.")]

Fast = Annotated[
    bool,
    typer.Option("--fast/--no-fast", help="Begin with what `nestling learn --fast` has read, if there is anything."),
]


def runs_dir(overrides: list[str] | None) -> Path:
    """Where runs are kept; ConfigError for any key but run.dir."""
    return Path(pick(overrides or (), "run.dir").get("run.dir", RunConfig().dir)).expanduser()


def for_reading(overrides: list[str] | None, *others: str) -> tuple[list[str], list[str]]:
    """Overrides of a verb that reads text with a trained model: run.dir's, and those of continuum and `others`.

    Raises:
        ConfigError: any other key, or no value.
    """
    places = [override for override in overrides or () if override.startswith("run.dir=")]
    changes = [override for override in overrides or () if override not in places]
    pick(changes, *(f"continuum.{field.name}" for field in fields(ContinuumConfig)), *others)
    return places, changes


def job_for_reading(folder: RunFolder, changes: list[str]) -> JobConfig:
    """The job of a run, with what `for_reading` has let through.

    It is read whole and in one process, so that it does not matter how training was spread.

    Raises:
        ConfigError: settings of continuum that do not fit the run's levels, or that would do nothing.
    """
    whole = ("training.zero_stage=0", "training.activation_checkpointing=false")
    config = from_yaml(folder.config.read_text(encoding="utf-8"), [*whole, *changes])
    given = [key for key, _ in map(parse_override, changes) if key.startswith("continuum.")]
    if config.continuum.drive == "schedule" and set(given) - {"continuum.drive"}:
        raise ConfigError(f"{given[0]}: does nothing with continuum.drive=schedule; add continuum.drive=stream")
    return config


def say_fast(read: list[str] | None) -> list[str] | None:
    """Tells the person of the documents whose fast state is used, and returns them."""
    if read:
        say(f"every text begins with the fast state after reading {', '.join(read)}; --no-fast leaves it out")
    return read


def need_writable(folder: Path, given: str, fix: str) -> None:
    """Stops unless files can be written to `folder`, or to where it would be made; nothing is made here.

    Args:
        folder: the folder to come, or one that is there.
        given: what the person wrote it in, such as "run.dir".
        fix: what to do if it cannot be.
    """
    folder = folder.expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise Stop(f"{given}: got {folder}, needs a folder, and {there} is none; {fix}", WRONG_USAGE)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = f"{there} is not one ({error.strerror})"
        raise Stop(
            f"{given}: got {folder}, needs a place that can be written, and {reason}; {fix}", WRONG_USAGE
        ) from error


def place_of(folder: RunFolder) -> str:
    """The argument that names where runs are kept, if that is not the default; for commands that people may copy."""
    runs = folder.path.parent
    return "" if runs == Path(RunConfig().dir).expanduser().resolve() else f" run.dir={shlex.quote(str(runs))}"


def found_run(reference: str, overrides: list[str] | None) -> RunFolder:
    """The run that `reference` means."""
    try:
        return find_run(runs_dir(overrides), reference)
    except LookupError as error:
        raise Stop(str(error.args[0]), WRONG_USAGE) from error


def trained_run(reference: str, overrides: list[str] | None) -> RunFolder:
    """The run that `reference` means, which must have weights: its final ones, or a checkpoint."""
    folder = found_run(reference, overrides)
    if folder.status() == "finished" and folder.weights.is_file():
        return folder
    from nestling.checkpoint import trained_step  # torch takes seconds

    if trained_step(folder) is None:
        raise Stop(
            f"run {folder.run_id} ({folder.name}, {folder.status()}) has no weights: {folder.weights} is missing and "
            "there is no checkpoint; choose another run (nestling runs)",
            WRONG_USAGE,
        )
    say(f"run {folder.run_id} ({folder.name}) is {folder.status()}, so its newest good checkpoint is taken")
    return folder

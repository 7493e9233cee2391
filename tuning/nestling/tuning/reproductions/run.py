"""One reproduction from its folder to its table: trials, the lines they are kept in, the figure, MLflow, the docs.

Every trial's outcome is a line of `trials.jsonl` as soon as it is there, so that what an interruption or a failure
leaves behind can be read.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nestling.cluster import connected
from nestling.tracking import RunFolder, TrackedRun, finish, start
from nestling.tracking.client import connect, reason
from nestling.tuning.reproductions.engine import Failure, Progress, chosen, run_trials
from nestling.tuning.reproductions.experiment import Experiment, Trial
from nestling.tuning.reproductions.figure import bars
from nestling.tuning.reproductions.table import Row, markdown, rows

log = logging.getLogger(__name__)

#: MLflow experiment of all reproductions.
MLFLOW_EXPERIMENT = "reproductions"


@dataclass(frozen=True)
class Result:
    """What a reproduction came to.

    The files are in `docs` as well as in the folder if that was given and no trial failed; `not_kept` says why not.
    """

    rows: list[Row]
    seconds: float
    figure: Path
    table: Path
    failures: list[Failure]
    not_kept: str | None = None


def make_folder(runs_dir: Path, name: str) -> RunFolder:
    """A new folder `reproductions/NAME-ID` in the runs folder."""
    return RunFolder.create(runs_dir / "reproductions", name)


def make_docs(docs: Path) -> None:
    """Make the folder that is to get the table, and try to write there. Raises OSError: before the work, not after."""
    docs.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=docs).close()


def reproduce(
    experiment: Experiment,
    folder: RunFolder,
    *,
    seeds: int,
    uri: str | None,
    command: str,
    docs: Path | None,
    tell: Callable[[Progress], None],
) -> Result:
    """Run an experiment.

    Args:
        experiment: what to run.
        folder: where everything is written; see `make_folder`.
        seeds: trials of each arm.
        uri: MLflow's address; None for the default of the runs folder.
        command: what the person typed; it stands above the table.
        docs: a folder that gets `reproduce-NAME.md`, `.png` and `.json` if no trial failed; see `make_docs`.
        tell: called with each trial that ended.

    Raises:
        TrackingError: MLflow does not answer.
        ClusterError: Ray cannot be reached.
    """
    with folder.claim():
        began = time.monotonic()
        folder.write_config(_plan(experiment, seeds, command))
        run: TrackedRun | None = None
        try:
            settings = {"name": experiment.name, "seeds": seeds, "command": command}
            run = start(settings, folder, uri, MLFLOW_EXPERIMENT, runs_dir=folder.path.parent.parent)
            ended = _run(experiment, folder, seeds, tell)
            made = rows(experiment, ended)
            seconds = time.monotonic() - began
            files = _write(experiment, ended, made, folder.path, command, seconds, seeds)
            _record(run, made, files)
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            folder.update(status=status)
            if run is not None:
                finish(run, folder, status)
            raise
        failures = [each for each in ended if isinstance(each, Failure)]
        status = "failed" if failures else "finished"
        folder.update(status=status, tokens=sum(t.outcome.tokens for t in ended if isinstance(t, Trial)))
        finish(run, folder, status, files[".png"])
        not_kept = None
        if docs is not None:
            files, not_kept = _keep(files, docs, failures)
        return Result(made, seconds, files[".png"], files[".md"], failures, not_kept)


def _keep(files: dict[str, Path], docs: Path, failures: list[Failure]) -> tuple[dict[str, Path], str | None]:
    """Where the files are now, and why they are not in `docs`: what is incomplete does not replace what is whole."""
    if failures:
        return files, f"{docs} was left as it is, because {len(failures)} trials failed; the table is {files['.md']}"
    try:
        return {suffix: Path(shutil.copy(file, docs / file.name)) for suffix, file in files.items()}, None
    except OSError as error:
        return files, f"{docs} did not take the files ({error}); the table is {files['.md']}"


def _run(
    experiment: Experiment, folder: RunFolder, seeds: int, tell: Callable[[Progress], None]
) -> list[Trial | Failure]:
    with (folder.path / "trials.jsonl").open("a", buffering=1) as file, connected():

        def keep(progress: Progress) -> None:
            file.write(json.dumps(asdict(progress.ended)) + "\n")
            tell(progress)

        return run_trials(experiment, seeds, keep)


def _plan(experiment: Experiment, seeds: int, command: str) -> str:
    """Every arm with its settings, for people who want to know exactly what was run."""
    lines = [f"command: {json.dumps(command)}", f"seeds: {seeds}", "arms:"]
    for arm in experiment.arms:
        lines += [f"- task: {json.dumps(arm.task)}", f"  model: {json.dumps(arm.model)}", "  candidates:"]
        lines += [f"    {json.dumps(label)}: {json.dumps(repr(work))}" for label, work in arm.candidates.items()]
    return "\n".join(lines) + "\n"


def _write(
    experiment: Experiment,
    ended: Sequence[Trial | Failure],
    made: list[Row],
    folder: Path,
    command: str,
    seconds: float,
    seeds: int,
) -> dict[str, Path]:
    """The table, the figure and the numbers, by suffix."""
    files = {suffix: folder / f"reproduce-{experiment.name}{suffix}" for suffix in (".md", ".png", ".json")}
    worked = sum(trial.seconds for trial in ended if isinstance(trial, Trial))
    setting = (
        f"{'seed 0' if seeds == 1 else f'seeds 0 to {seeds - 1}'}, {seconds / 60:.1f} minutes on {_machine()}; its "
        f"trials took {worked / 60:.1f} minutes of a core"
    )
    trials = [trial for arm in experiment.arms for trial in chosen(arm, ended)]
    files[".md"].write_text(markdown(experiment, made, command, setting, trials), encoding="utf-8")
    numbers = {"name": experiment.name, "command": command, "seconds": round(seconds, 1), "machine": _machine()}
    files[".json"].write_text(json.dumps(numbers | {"rows": made}, indent=1) + "\n", encoding="utf-8")
    if experiment.draw is not None:
        experiment.draw(trials, str(files[".png"]))
    else:
        bars(made, str(files[".png"]))
    return files


def _machine() -> str:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores ({platform.machine()}), torch {torch.__version__}"


def _record(run: TrackedRun, made: Sequence[Row], files: dict[str, Path]) -> None:
    """Rows as metrics, and the files; MLflow away now is told, and spoils nothing."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(_key(row, kind), row[kind], now, 0)
        for row in made
        for kind in ("ours", "spread")
        if row[kind] is not None
    ]
    try:
        client = connect(run.uri)
        client.log_batch(run.mlflow_run_id, metrics=metrics)
        for file in (files[".md"], files[".json"]):
            client.log_artifact(run.mlflow_run_id, str(file))
    except Exception as error:  # MLflow raises its own errors, SQLAlchemy's, urllib's and plain ones
        log.warning("MLflow did not take the rows (%s); they are in %s", reason(error), files[".json"])


def _key(row: Row, kind: str) -> str:
    """A metric's name: MLflow allows letters, digits and _-. :/ in it."""
    text = "/".join((row["task"], row["model"], row["metric"], kind))
    return "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in text)

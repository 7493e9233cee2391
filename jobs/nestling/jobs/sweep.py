"""`nestling sweep`: runs of a job that differ in what a sweep file says, and which of them are worth their cost."""

from __future__ import annotations

import json
import shlex
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestling.config import ConfigError, JobConfig, RunConfig, load
from nestling.config.load import changed, read_job
from nestling.jobs.arguments import AsJson, need_writable, runs_dir
from nestling.jobs.output import (
    FAILED,
    INTERRUPTED,
    WRONG_USAGE,
    Stop,
    chatter_to,
    describe,
    in_columns,
    say,
    verb,
)
from nestling.jobs.trials import TrialsProgress
from nestling.tracking.runs import RunBusyError, RunFolder, find_run

if TYPE_CHECKING:
    from nestling.tuning.sweeps.plan import Plan
    from nestling.tuning.sweeps.run import Result

KEYS = ("sweep", "parent_run_id", "trials", "completed", "failed", "best", "report", "answer", "run_dir")


@verb(*KEYS)
def sweep(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="A sweep file, such as tuning/levels.yaml.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the sweep (seeds=5) or its job.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The file's quick settings.")] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with a sweep: its id, its name or 'latest'.")
    ] = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Run a sweep: what varies, how long and how often stands in FILE."""
    from nestling.tuning.sweeps.plan import make_folder, make_plan, open_plan

    if resume is not None:
        places = [*([file] if file else []), *(overrides or [])]
        if quick or any(not each.startswith("run.dir=") for each in places):
            raise Stop(
                "--resume: goes on with the sweep as it was; leave out FILE, --quick and all but run.dir", WRONG_USAGE
            )
        folder = found_sweep(resume, places)
        plan = open_plan(folder)
    else:
        if file is None:
            raise Stop("FILE: is missing; give a sweep file, such as tuning/levels.yaml, or --resume NAME", WRONG_USAGE)
        config, given, job = _read(file, overrides or [], quick)
        plan = make_plan(config, given, _command(file, overrides or [], quick))
        place = Path(job.run.dir).expanduser()
        need_writable(place, "run.dir", "choose another place")
        folder = make_folder(place, plan)
    return run(plan, folder, as_json)


def run(plan: Plan, folder: RunFolder, as_json: bool) -> dict[str, Any]:
    """Run a sweep in its folder, and tell the person how it goes and ends."""
    from nestling.tuning.sweeps.run import run_sweep

    config = plan.sweep
    say(f"{config.question or config.name}\nsweep {folder.run_id} in {folder.path}; Ray's output: {folder.ray_log}")
    arms = f"{len(plan.fixed)} arms" if plan.fixed is not None else f"{config.budget.trials} arms, drawn by Optuna"
    say(f"{arms} x {config.seeds} seeds, {config.budget.amount:,.0f} {config.budget.unit} each")
    if plan.refused:
        say(f"{len(plan.refused)} points of the space are left out; the first: {plan.refused[0]}")
    try:
        with chatter_to(folder.ray_log), TrialsProgress(plan, folder) as progress:
            result = run_sweep(plan, folder, progress)
    except RunBusyError as error:
        raise Stop(str(error), WRONG_USAGE) from error
    except KeyboardInterrupt as error:
        raise _stop(plan, folder, "interrupted", INTERRUPTED) from error
    except Exception as error:
        with folder.ray_log.open("a") as log:
            traceback.print_exception(error, file=log)
        raise _stop(plan, folder, f"failed: {describe(error)}", FAILED) from error
    known = _known(plan, folder, result)
    if not as_json:
        print(_report(folder, result))
    if missing := result.trials - result.completed - len(result.failed):
        say(f"Optuna found no more arms that are possible and different: {missing} trials fewer than asked for")
    for each in result.failed:
        say(f"failed: {each.arm}, seed {each.seed}: {each.error}", style="red")
    if not result.completed:
        raise Stop(f"all {len(result.failed)} trials failed", FAILED, known)
    return known


def found_sweep(reference: str, overrides: list[str]) -> RunFolder:
    """The sweep that `reference` means."""
    try:
        return find_run(runs_dir(overrides) / "sweeps", reference)
    except LookupError as error:
        raise Stop(str(error.args[0]), WRONG_USAGE) from error


def _read(file: str, overrides: list[str], quick: bool) -> tuple[Any, dict[str, Any], JobConfig]:
    """The sweep, its job as mappings, and that job checked as a whole: its data, its tokenizer, its tracking."""
    from nestling.tuning.sweeps import load_sweep

    config = load_sweep(file, overrides, quick)
    given = changed(read_job(config.job), config.overrides)
    given.setdefault("run", {}).setdefault("dir", RunConfig().dir)
    try:
        job = load(config.job, [f"{key}={_text(value)}" for key, value in config.overrides.items()])
    except ConfigError as error:
        raise ConfigError(f"job {config.job}: {error}") from error
    return config, given, job


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _command(file: str, overrides: list[str], quick: bool) -> str:
    return shlex.join(["nestling", "sweep", file, *overrides, *["--quick"] * quick])


def _known(plan: Plan, folder: RunFolder, result: Result) -> dict[str, Any]:
    return {
        "sweep": folder.run_id,
        "parent_run_id": result.parent_run_id,
        "trials": result.trials,
        "completed": result.completed,
        "failed": len(result.failed),
        "best": result.found.best,
        "report": result.found.page,
        "answer": result.found.answer,
        "run_dir": folder.path,
    }


def _stop(plan: Plan, folder: RunFolder, how: str, code: int) -> Stop:
    from nestling.tuning.sweeps.outcome import Lines

    ended = list(Lines(folder).outcomes().values())
    failed = sum(each.state == "failed" for each in ended)
    known = {
        "sweep": folder.run_id,
        "parent_run_id": folder.info().get("mlflow_run_id"),
        "trials": plan.trials,
        "completed": len(ended) - failed,
        "failed": failed,
        "run_dir": folder.path,
    }
    lines = [f"sweep {folder.run_id} {how}; {len(ended)} of {plan.trials} trials have ended"]
    lines += [f"log: {folder.ray_log}", f"go on: nestling sweep --resume {folder.run_id}{place_of_sweep(folder)}"]
    return Stop("\n".join(lines), code, known)


def place_of_sweep(folder: RunFolder) -> str:
    """The argument that names where a sweep's runs are kept, if that is not the default."""
    runs = folder.path.parent.parent
    return "" if runs == Path(RunConfig().dir).expanduser().resolve() else f" run.dir={shlex.quote(str(runs))}"


def _report(folder: RunFolder, result: Result) -> str:
    place = place_of_sweep(folder)
    lines = {
        "sweep": f"{folder.run_id} ({folder.name}), {result.completed} of {result.trials} trials",
        "answer": result.found.answer,
        "page": str(result.found.page or ""),
        "trials": str(folder.path / "trials.jsonl"),
        "best": f"nestling best {folder.run_id}{place}",
        "curves": f"nestling ui{place}",
    }
    return in_columns({label: text for label, text in lines.items() if text})

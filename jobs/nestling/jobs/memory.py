"""`nestling memory`: one level of an adapted model leaves a run by itself, and enters another copy of the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.jobs.arguments import AsJson, Run, RunDir, found_run, trained_run
from nestling.jobs.export import new_folder
from nestling.jobs.output import WRONG_USAGE, Stop, in_columns, say, verb
from nestling.tracking.runs import RunBusyError

memory = typer.Typer(
    name="memory", help="Take a level's weights out of a run, or put them into another.", no_args_is_help=True
)


@memory.command("export")
@verb("run_id", "level", "steps", "tokens", "files", "sha256")
def export(
    run: Run,
    level: Annotated[str, typer.Option(help="Name of the level, or its number: 1 is the first, and so the fastest.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    overrides: RunDir = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Write one level's weights, and whose they are, to a folder."""
    folder = trained_run(run, overrides)
    from nestling.training.exchange import export_level  # torch takes seconds

    with new_folder(out) as draft:
        manifest = export_level(folder, level, draft)
        files = sorted(file.name for file in draft.iterdir())
    result = {key: manifest[key] for key in ("level", "period", "unit", "steps", "tokens", "base")}
    if not as_json:
        base = manifest["base"]
        lines = {
            "level": f"{manifest['level']} of run {folder.run_id}, which has read {manifest['tokens']:,} tokens",
            "base": f"{base['name']}, SHA-256 {base['sha256']}",
            "files": ", ".join(str(out / name) for name in files),
            "load": f"nestling memory load RUN {out}",
        }
        print(in_columns(lines))
    return {"run_id": folder.run_id, **result, "files": files, "sha256": manifest["weights"]["sha256"]}


@memory.command("load")
@verb("run_id", "level", "period", "period_before", "step", "checkpoint", "rest")
def load(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `nestling memory export` wrote.")],
    overrides: RunDir = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Put a level into a run that was adapted from the same base."""
    target = found_run(run, overrides)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise Stop(
            f"DIR: got {folder}, which {problem}; needs a folder that "
            "`nestling memory export RUN --level N --out DIR` wrote",
            WRONG_USAGE,
        )
    from nestling.training.exchange import load_level

    try:
        result = {"run_id": target.run_id, **load_level(target, folder)}
    except RunBusyError as error:
        raise Stop(str(error), WRONG_USAGE) from error
    if result["period"] != result["period_before"]:
        say(
            f"the level moved every {result['period_before']} where it comes from, and every {result['period']} here; "
            "adapt the base with the same --levels to keep its period"
        )
    if result["rest"] == "other":
        say("the rest of this model is not what the level was trained with; evaluate before you rely on it")
    if not as_json:
        print(in_columns({"level": f"{result['level']} of run {target.run_id}", "saved": result["checkpoint"]}))
    return result

"""`nestling adapt`: a pretrained model in Hugging Face's layout becomes a run whose levels move at periods."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.config import ConfigError
from nestling.jobs.arguments import AsJson, Overrides, need_writable, place_of
from nestling.jobs.output import WRONG_USAGE, Stop, in_columns, say, verb


class Unit(StrEnum):
    """What periods are counted in."""

    STEPS = "steps"
    TOKENS = "tokens"


class Assign(StrEnum):
    """Which layers a level takes."""

    #: The first layers join the first level, the last ones the last.
    CONTIGUOUS = "contiguous"
    #: Layer j joins level j mod the number of levels.
    INTERLEAVED = "interleaved"


@verb("run_id", "parameters", "levels")
def adapt(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder with config.json and safetensors.")],
    overrides: Overrides = None,
    levels: Annotated[str, typer.Option(help="Periods of the levels, fastest first.")] = "1,4,16",
    unit: Annotated[Unit, typer.Option(help="What periods are counted in.")] = Unit.STEPS,
    assign: Annotated[Assign, typer.Option(help="Which layers a level takes.")] = Assign.CONTIGUOUS,
    name: Annotated[str | None, typer.Option(help="Name of the run; that of the folder if not given.")] = None,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Make a continual learner of a pretrained Llama, Qwen2, Qwen3 or Mistral model, with the same logits."""
    periods = _periods(levels)
    say(f"reading {path}")
    from nestling.checkpoint.layouts import LayoutError
    from nestling.checkpoint.pretrained import open_pretrained
    from nestling.data import DataError
    from nestling.training.adapt import adapt as make_run
    from nestling.training.adapt import adapted_job, stacked

    try:
        pretrained = open_pretrained(path)
        stack = stacked(pretrained.config.layers, periods, unit.value, assign is Assign.INTERLEAVED)
        config, tokenizer = adapted_job(pretrained, stack, name or pretrained.run_name, overrides or ())
    except (LayoutError, DataError) as error:
        raise Stop(str(error), WRONG_USAGE) from error
    if config.data.tokenizer == "bytes":
        say(f"{path} has no tokenizer.json, so a token is a byte; name another with data.tokenizer=FILE")
    need_writable(Path(config.run.dir), "run.dir", "choose another folder with run.dir=DIR")
    folder = make_run(pretrained, config, tokenizer)
    result = {
        "run_id": folder.run_id,
        "parameters": sum(shape.numel() for shape in pretrained.shapes.values()),
        "levels": [
            {
                "name": level.name,
                "period": level.period,
                "unit": level.unit,
                "layers": level.layers,
            }
            for level in config.levels
        ],
        "run_dir": folder.path,
    }
    if not as_json:
        print(in_columns(_report(result, place_of(folder))))
    return result


def _periods(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ConfigError(f"--levels: got {text!r}, needs periods of at least 1 with commas between, such as 1,4,16")
    periods = [int(part) for part in parts]
    if periods != sorted(periods):
        fastest_first = ",".join(map(str, sorted(periods)))
        raise ConfigError(f"--levels: got {text!r}, needs the fastest first: --levels {fastest_first}")
    return periods


def _report(result: dict[str, Any], place: str) -> dict[str, str]:
    run_id = result["run_id"]
    lines = {"run": f"{run_id}, {result['parameters']:,} parameters, in {result['run_dir']}"}
    for level in result["levels"]:
        layers = ", ".join(map(str, level["layers"]))
        lines[level["name"]] = f"moves every {level['period']} {level['unit']}: the MLPs of layers {layers}"
    lines["rest"] = "attention, norms, embedding and head move at every step"
    lines["train"] = f"nestling resume {run_id} data.source=TEXTS training.steps=1000{place}"
    lines["hf"] = f"nestling export {run_id} --out DIR --format hf{place}"
    return lines

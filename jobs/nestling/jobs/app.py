"""The `nestling` command: its verbs, one module each, and what holds for all of them.

Verbs import torch, Ray and MLflow only when they run, so that help, configuration errors and lists of runs come at
once.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from nestling.jobs.config import config
from nestling.jobs.doctor import doctor
from nestling.jobs.evaluate import evaluate
from nestling.jobs.export import export
from nestling.jobs.generate import generate
from nestling.jobs.output import log_to_terminal
from nestling.jobs.runs import runs
from nestling.jobs.train import train
from nestling.jobs.ui import ui

app = typer.Typer(
    name="nestling",
    help="Train models that keep learning.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or configuration (nothing was started), 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False) -> None:
    log_to_terminal(logging.DEBUG if debug else logging.INFO)


for _verb in (train, evaluate, generate, export, runs, ui, config, doctor):
    app.command()(_verb)


def main() -> None:
    app()


if __name__ == "__main__":
    main()

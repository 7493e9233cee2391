"""Standard output, standard error, exit codes and the log file of a verb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: A program with one verb that, like Ray, prints on every way there is, and then ends as it is told.
PROGRAM = """
import logging, os, subprocess, sys
from pathlib import Path
import typer
from nestling.config import ConfigError
from nestling.jobs.arguments import AsJson
from nestling.jobs.output import Stop, chatter_to, log_to_terminal, say, verb

def noise():
    print("from python")
    print("to standard error", file=sys.stderr)
    os.write(1, b"from a library\\n")
    subprocess.run(["echo", "from a child"])

@verb("number", "text")
def main(end: str, log: Path, as_json: AsJson = False):
    log_to_terminal(logging.INFO)
    noise()
    with chatter_to(log):
        noise()
        say("to the person")
        logging.getLogger("nestling.some.where").warning("a warning")
    if end == "interrupt":
        raise KeyboardInterrupt
    if end != "result":
        raise {"stop": Stop("stopped", 1, {"number": 3}), "config": ConfigError("wrong key"), "bug": KeyError("x")}[end]
    return {"number": float("nan"), "text": "ä", "more": [1, float("inf"), {"path": Path("a")}]}

typer.run(main)
"""


def run(end: str, log: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, end, str(log), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_json_has_standard_output_to_itself(tmp_path: Path) -> None:
    ended = run("result", tmp_path / "log", "--json")
    assert ended.returncode == 0
    assert ended.stdout.count("\n") == 1
    assert json.loads(ended.stdout) == {"number": None, "text": "ä", "more": [1, None, {"path": "a"}]}
    for line in ("from python", "to standard error", "from a library", "from a child"):
        assert ended.stderr.count(line) == 1


def test_chatter_goes_to_the_log_and_words_to_the_person(tmp_path: Path) -> None:
    ended = run("result", tmp_path / "log")
    noise = {"from python", "to standard error", "from a library", "from a child"}
    assert set((tmp_path / "log").read_text().splitlines()) == noise
    assert set(ended.stdout.splitlines()) == noise - {"to standard error"}
    assert ended.stderr.splitlines() == ["to standard error", "to the person", "WARNING: a warning"]


@pytest.mark.parametrize(
    ("end", "code", "message", "number"),
    [
        ("stop", 1, "stopped", 3),
        ("config", 2, "wrong key", None),
        ("bug", 1, "KeyError: 'x'", None),
        ("interrupt", 130, "interrupted", None),
    ],
)
def test_ends(tmp_path: Path, end: str, code: int, message: str, number: int | None) -> None:
    ended = run(end, tmp_path / "log", "--json")
    assert ended.returncode == code
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    result = json.loads(ended.stdout)
    assert (result["number"], result["text"]) == (number, None)
    assert message in result["error"]

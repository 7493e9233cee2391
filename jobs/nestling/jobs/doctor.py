"""`nestling doctor`: what is installed and on which hardware, what will run, and what to fix.

Nothing is started and nothing is written for good: it takes seconds, most of them to import torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.table import Table

from nestling.config import ConfigError
from nestling.jobs.arguments import AsJson, RunDir, runs_dir
from nestling.jobs.output import FAILED, Stop, print_table, verb
from nestling.tracking.client import resolve_uri, shown

GIB = 2**30
#: What a small job needs: Ray itself takes about 1 GiB, each worker 0.6 GiB.
LEAST_MEMORY, LEAST_DISK = 2 * GIB, 1 * GIB
#: Seconds in which a server has to take a connection.
ANSWER_SECONDS = 3.0


@dataclass
class Check:
    """One thing looked at; `fix` says what to do, and is None if it is ok."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None

    def __post_init__(self) -> None:
        if self.ok:
            self.fix = None


@verb("ok", "checks")
def doctor(overrides: RunDir = None, as_json: AsJson = False) -> dict[str, Any]:
    """Check the installation and the machine, and say what to fix."""
    folder = runs_dir(overrides)
    checks = [*_installation(), *_machine(), *_servers(folder), *_folder(folder)]
    result = {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]}
    if not as_json:
        print_table(_table(checks))
    if not result["ok"]:
        raise Stop("not ready: " + ", ".join(check.name for check in checks if not check.ok), FAILED, result)
    return result


def _installation() -> Iterator[Check]:
    """Python and every package against what Nestling's own metadata asks for."""
    nestling = importlib.metadata.metadata("nestling")
    python = SpecifierSet(nestling["Requires-Python"] or "")
    version = platform.python_version()
    yield Check("python", version in python, f"{version} (needs {python})", f"install a Python {python}")
    for line in importlib.metadata.requires("nestling") or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Requirement) -> Check:
    name, needed = requirement.name, str(requirement.specifier) or "any version"
    fix = f"pip install '{name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, f"not installed (needs {needed})", fix)
    # A local version such as 2.13.0+cpu is the same release.
    fits = requirement.specifier.contains(version, prereleases=True)
    return Check(name, fits, f"{version} (needs {needed})", fix)


def _machine() -> Iterator[Check]:
    import torch

    from nestling.memory.backends import chosen

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cpu", True, f"{cores} logical cores, {platform.machine()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fix = "use a machine with more memory: Ray takes about 1 GiB, each worker 0.6 GiB"
    yield Check("memory", memory >= LEAST_MEMORY, f"{memory / GIB:.1f} GiB", fix)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Check("gpu", True, ", ".join(names) or "none: training runs on the CPU")
    device = "cuda" if names else "cpu"
    yield Check("memory backend", True, chosen("auto", torch.empty(0, device=device), None))
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    yield Check("c++ compiler", True, compiler or "none (not required)")


def _servers(folder: Path) -> Iterator[Check]:
    """Whether the Ray cluster and the tracking server that the environment names take a connection."""
    if address := os.environ.get("RAY_ADDRESS"):
        fix = "start a cluster with `ray start --head`, or unset RAY_ADDRESS to run on this machine alone"
        url = address if "://" in address else f"//{address}"
        yield _answers("ray cluster", f"RAY_ADDRESS={address}", url, ("", "ray"), fix)
    try:
        uri = resolve_uri(None, folder)
    except ConfigError as error:
        yield Check("tracking", False, str(error), "choose another folder with run.dir=DIR, or set MLFLOW_TRACKING_URI")
    else:
        fix = "start that server, or unset MLFLOW_TRACKING_URI"
        yield _answers("tracking", shown(uri), uri, ("http", "https"), fix)


def _answers(name: str, detail: str, url: str, schemes: tuple[str, ...], fix: str) -> Check:
    """Connects to the host and port of a URL of one of these schemes; of others nothing is known."""
    try:
        place = urlsplit(url)
        port = place.port or {"http": 80, "https": 443}.get(place.scheme)
        if place.scheme in schemes and place.hostname and port:
            socket.create_connection((place.hostname, port), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:  # ValueError: not a port
        return Check(name, False, f"{detail} does not answer: {error}", fix)
    return Check(name, True, detail)


def _folder(folder: Path) -> Iterator[Check]:
    """Disk and permission where runs are kept, or where the folder would be made."""
    folder = folder.resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    yield Check("disk", free >= LEAST_DISK, f"{free / GIB:.1f} GiB free for {folder}", "free some space")
    fix = "choose another folder with run.dir=DIR or NESTLING_RUNS"
    try:
        with tempfile.TemporaryFile(dir=existing):
            yield Check("runs folder", True, f"{folder} can be written")
    except OSError as error:
        yield Check("runs folder", False, f"{folder} cannot be written: {error}", fix)


def _table(checks: list[Check]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        table.add_row("ok" if check.ok else "FIX", check.name, check.detail, "" if check.ok else check.fix)
    return table

"""The rules of the house: which room imports which, what stands in a room, and that the package holds together.

The rooms share the package `nestling` without owning it (PEP 420), and one of them is named like the standard library's
`platform`; a stray file would break either silently, so these tests look for it.
"""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: a room imports from itself and from the rooms before it.
ROOMS: dict[str, set[str]] = {
    "models": {"memory", "optim", "models", "tasks"},
    "platform": {"config", "data", "training", "checkpoint", "tracking", "evaluation", "cluster"},
    "tuning": {"tuning"},
    "jobs": {"jobs"},
}
ORDER = list(ROOMS)
ROOM_OF = {package: room for room, packages in ROOMS.items() for package in packages}
LIBRARIES_OF_MODELS = {"torch", "triton", "nestling"}
ALLOWED_BESIDE = {"models": [], "platform": [], "tuning": ["*.yaml"], "jobs": ["*.yaml"]}


def imported(source: str, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a source file of `package` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            # `from nestling import memory` names its packages on the right.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(room: str, source: str, package: list[str]) -> list[str]:
    """What the file imports and must not."""
    found = []
    for line, name in imported(source, package):
        top, *rest = name.split(".")
        if top == "nestling":
            target = ROOM_OF.get(rest[0]) if rest else None
            if target is None:
                found.append(f"line {line}: {name} is in no room; import one of nestling.{sorted(ROOM_OF)}")
            elif ORDER.index(target) > ORDER.index(room):
                found.append(f"line {line}: {name} is in {target}/, which {room}/ must not import")
        elif room == "models" and top not in LIBRARIES_OF_MODELS | sys.stdlib_module_names:
            found.append(f"line {line}: {name}: models/ imports torch, triton and the standard library only")
    return found


@pytest.mark.parametrize("room", ORDER)
def test_arrows_go_one_way(room: str) -> None:
    wrong = []
    for file in sorted((ROOT / room).rglob("*.py")):
        package = list(file.relative_to(ROOT / room).parent.parts)
        for violation in violations(room, file.read_text(encoding="utf-8"), package):
            wrong.append(f"{file.relative_to(ROOT)}, {violation}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "source", "count"),
    [
        ("models", "import torch, math\nfrom nestling.memory.state import State\nimport triton.language as tl", 0),
        ("models", "import numpy", 1),
        ("models", "def f():\n    from ray import train", 1),
        ("models", "from nestling.config import load", 1),
        ("models", "from nestling import memory, config", 1),
        ("models", "import nestling", 1),
        ("models", "from . import chunked\nfrom .state import State\nfrom ..optim import Levels", 0),
        ("models", "from ..config.schema import JobConfig", 1),
        ("platform", "import ray\nfrom nestling.models import build\nfrom nestling.tracking.runs import RunFolder", 0),
        ("platform", "from nestling.tuning.sweeps import sweep\nimport nestling.jobs.app", 2),
        ("tuning", "import nestling.training\nimport nestling.jobs", 1),
        ("jobs", "import nestling.tuning, nestling.training, nestling.models, nestling.jobs.output", 0),
    ],
)
def test_the_scan_sees_each_kind_of_import(room: str, source: str, count: int) -> None:
    package = ["nestling", sorted(ROOMS[room])[0]]
    assert len(violations(room, source, package)) == count


@pytest.mark.parametrize("room", ORDER)
def test_only_allowed_things_stand_in_a_room(room: str) -> None:
    standing = {path.name for path in (ROOT / room).iterdir()}
    assert "README.md" in standing
    strangers = standing - {"nestling", "README.md"}
    assert not [name for name in strangers if not any(fnmatch.fnmatch(name, ok) for ok in ALLOWED_BESIDE[room])]
    portion = {path.name for path in (ROOT / room / "nestling").iterdir() if path.name != "__pycache__"}
    assert portion <= ROOMS[room], f"{room}/nestling holds {sorted(ROOMS[room])} only (and no __init__.py)"
    assert all((ROOT / room / "nestling" / package / "__init__.py").is_file() for package in portion)


def test_infra_holds_no_package() -> None:
    assert (ROOT / "infra" / "README.md").is_file()
    assert not list((ROOT / "infra").rglob("__init__.py"))


def test_the_standard_library_keeps_platform() -> None:
    assert not list(ROOT.glob("*/__init__.py")) and not list(ROOT.glob("*/nestling/__init__.py"))
    program = "import platform; assert platform.system(); print(platform.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).is_relative_to(ROOT)


def test_the_portions_are_one_namespace() -> None:
    import nestling

    portions = {Path(path).resolve() for path in nestling.__path__}
    assert getattr(nestling, "__file__", None) is None
    assert portions == {ROOT / room / "nestling" for room in ROOMS}


@pytest.mark.slow
def test_the_wheel_holds_all_four_portions(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(ROOT)]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("nestling-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(file.relative_to(ROOT / room)) for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"nestling"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "nestling = nestling.jobs.app:main" in zipfile.ZipFile(wheel).read(entry_points).decode()

"""docs/equations.md against the code: every name and every test in it exists, and no equation is missing."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "equations.md"
#: What the page has to cover: the paper's numbered equations, its algorithm and definitions, ad-hoc level stacking
#: (which has no number), and the long-term memory of Titans.
NEEDED = {
    *map(str, range(1, 122)),
    *(f"Def. {number}" for number in range(1, 8)),
    *(f"TI {number}" for number in range(8, 16)),
    "Alg. 1",
    "Sec. 7.3",
}
FIVE = ["equation", "what it is", "implemented by", "held by", "printed otherwise"]
THREE = ["equation", "what it is", "why it is not here"]


class Row(NamedTuple):
    """One line of a table: its cells under their headings, and the equations of the first."""

    cells: dict[str, str]
    equations: list[str]


def rows(text: str) -> Iterator[Row]:
    headings: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            headings = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not headings:
            headings = cells
        elif not set("".join(cells)) <= {"-"}:
            named = dict(zip(headings, cells, strict=True))
            yield Row(named, list(equations(named["equation"])))


def equations(cell: str) -> Iterator[str]:
    """ "Def. 3-4, 19-20, Alg. 1" as Def. 3, Def. 4, 19, 20, Alg. 1."""
    for part in cell.split(", "):
        match = re.fullmatch(r"((?:Def\.|TI|Alg\.|Sec\.) )?([\d.]+)(?:-(\d+))?", part)
        assert match, f"{part!r} is no equation; write 5, 5-7, Def. 1, TI 8, Alg. 1 or Sec. 7.3"
        prefix, first, last = match.groups(default="")
        numbers = range(int(first), int(last) + 1) if last else [first]
        yield from (f"{prefix}{number}" for number in numbers)


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def names(row: Row) -> list[str]:
    return [text for text in quoted(row.cells.get("implemented by", "")) if text.startswith("nestling.")]


@cache
def definitions(file: Path) -> set[str]:
    """Names that a file defines at its top, and those of its classes as "Class.name"."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def exists(name: str) -> bool:
    """Whether `module` or `module:name` can be imported; outside of models/, whether its file defines the name."""
    module, _, attribute = name.partition(":")
    place = Path(*module.split("."))
    if not any((ROOT / "models" / path).is_file() for path in (place.with_suffix(".py"), place / "__init__.py")):
        files = [file for file in ROOT.glob(f"*/{place}.py")]
        return bool(files) and attribute in definitions(files[0])
    found = importlib.import_module(module)
    for part in filter(None, attribute.split(".")):
        found = getattr(found, part, None)
    return found is not None


def is_test(name: str) -> bool:
    file, _, function = name.partition("::")
    return (ROOT / file).is_file() and function.startswith("test_") and function in definitions(ROOT / file)


ROWS = list(rows(PAGE.read_text(encoding="utf-8")))


def test_no_equation_is_missing() -> None:
    covered = {equation for row in ROWS for equation in row.equations}
    assert NEEDED <= covered, f"docs/equations.md lacks {sorted(NEEDED - covered)}"
    assert not {equation for equation in covered - NEEDED if not equation.startswith("Sec.")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.cells["equation"])
def test_a_row_names_what_exists(row: Row) -> None:
    if list(row.cells) == THREE:
        assert row.cells["why it is not here"]
        return
    assert list(row.cells) == FIVE
    assert names(row) and not [name for name in names(row) if not exists(name)]
    tests = quoted(row.cells["held by"])
    assert tests and not [name for name in tests if not is_test(name)]


def test_what_is_there_is_not_said_to_be_missing() -> None:
    implemented, missing = (
        {equation for row in ROWS if list(row.cells) == kind for equation in row.equations} for kind in (FIVE, THREE)
    )
    assert not {equation for equation in implemented & missing if not equation.startswith("Sec.")}


def test_the_checks_see_what_is_wrong() -> None:
    assert exists("nestling.memory.rule:Rule.step") and exists("nestling.training.nested:nested_view")
    assert not exists("nestling.memory.rule:Rule.stop") and not exists("nestling.training.nested:nest")
    assert not exists("nestling.training.nestled:nested_view")
    assert not is_test("tests/test_equations.py::test_nothing") and not is_test("tests/test_nothing.py::test_nothing")
    assert not is_test("tests/test_equations.py::equations")
    assert list(equations("Def. 3-4, 19-20, Alg. 1")) == ["Def. 3", "Def. 4", "19", "20", "Alg. 1"]
    with pytest.raises(AssertionError, match="no equation"):
        list(equations("19 to 20"))

"""The embedded corpora: real text, the same every time, from nowhere else than it says."""

from __future__ import annotations

import subprocess
import sys
import unicodedata

import pytest

from nestling.data import DOMAINS, DataError, open_source
from nestling.data.embedded import FILE_LIMIT, PACKAGE_LIMIT, SHORTEST_DOCSTRING, _package_files


def test_english_is_the_language_reference_and_long_docstrings() -> None:
    documents = list(DOMAINS["english"]())
    size = sum(len(text.encode()) for _, text in documents)
    assert 1_200_000 < size < 2_500_000
    assert all(len(text) > SHORTEST_DOCSTRING for _, text in documents)
    names = [name for name, _ in documents]
    assert any(name.endswith("topics.py#specialnames") for name in names)
    assert any(name.endswith("argparse.py") for name in names)
    assert documents == list(DOMAINS["english"]())


@pytest.mark.parametrize("domain", ["english", "python"])
def test_only_the_standard_library_is_read(domain: str) -> None:
    parts = DOMAINS[domain].parts()
    assert parts == sorted(parts, key=lambda part: part.split("/")) and len(parts) > 300
    assert not any({"site-packages", "dist-packages", "test", "tests"} & set(part.split("/")) for part in parts)


def test_reading_imports_no_module() -> None:
    code = (
        "import sys; from nestling.data import DOMAINS; list(DOMAINS['english']()); "
        "assert not {'antigravity', 'turtle', 'this', 'pydoc_data.topics'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "", result.stderr


def test_unicode_names_every_character() -> None:
    lines = "".join(text for _, text in DOMAINS["unicode"]()).split("\n")[:-1]
    assert len(lines) > 9000
    assert all(unicodedata.lookup(line[2:]) == line[0] for line in lines if line[0].isalpha())


@pytest.mark.parametrize("domain", ["python", "cxx", "js"])
def test_code_domains_hold_text_within_their_limits(domain: str) -> None:
    documents = list(DOMAINS[domain]())
    size = sum(len(text.encode()) for _, text in documents)
    assert len(documents) > 50
    assert 1_000_000 < size
    if domain != "python":
        assert size <= PACKAGE_LIMIT and max(len(text.encode()) for _, text in documents) <= FILE_LIMIT


def test_a_missing_package_is_named() -> None:
    with pytest.raises(
        DataError, match="embedded:cxx is read from the package `no_such_package`, which is missing: pip install"
    ):
        _package_files("cxx", {"no_such_package": "*.h"})


def test_an_unknown_domain_names_the_nearest() -> None:
    with pytest.raises(
        DataError,
        match="no embedded domain 'englisch', did you mean 'english'\\?; there are english, python, unicode, cxx, js",
    ):
        open_source("embedded:englisch")

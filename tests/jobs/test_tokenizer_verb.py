"""`nestling tokenizer` as a person runs it, and a corpus prepared with what it wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nestling.config import DataConfig
from nestling.data import prepare
from nestling.jobs.app import app


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [{"body": f"row {number}: " + "a word and another word " * 20} for number in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def nestling(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tokenizer", *arguments])


def result(ended: Result) -> dict[str, Any]:
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_tokenizer_is_trained_and_used(ray_local: None, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "tokenizer.json"
    ended = nestling(str(texts), "--vocab-size", "300", "--column", "body", "--out", str(out), "--json")
    assert ended.exit_code == 0, ended.output
    found = result(ended)
    assert list(found) == ["tokenizer", "vocab_size", "documents", "bytes", "bytes_per_token", "sha256"]
    assert (found["tokenizer"], found["vocab_size"]) == (str(out), 300)
    assert found["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    data = DataConfig(source=str(texts), column="body", tokenizer=str(out))
    (part,) = prepare(data, tmp_path / "cache").parts
    assert (part.train.documents, part.train.bytes) == (found["documents"], found["bytes"])
    text_tokens = len(part.heldout.tokens) - part.heldout.documents
    assert found["bytes_per_token"] == pytest.approx(part.heldout.bytes / text_tokens)


def test_what_a_person_reads(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = nestling(str(texts), "--vocab-size", "280", "--column", "body", "data.heldout_percent=50")
    assert ended.exit_code == 0 and Path("tokenizer.json").is_file()
    assert "use it with data.tokenizer=tokenizer.json" in ended.stdout
    assert "without the 50 % of its documents that a job would hold out" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--vocab-size", "256"], 2, "--vocab-size': Input should be greater than or equal to 257"),
        (["--vocab-size", "9000", "--column", "body"], 1, "tokens and no more, fewer than 9000; ask for"),
        (["--vocab-size", "300"], 1, "SOURCE: {texts}/rows.jsonl: line 1 has no column 'text', it has 'body'"),
        (["--vocab-size", "300", "data.heldout_percent=0"], 2, "data.heldout_percent: got 0.0, needs a value above 0"),
        (["--vocab-size", "300", "data.source=x"], 2, "data.source: unknown key; the nearest known one is data.he"),
        (["--vocab-size", "300", "--out", "{texts}/rows.jsonl"], 2, "rows.jsonl exists; give the name of a new file"),
    ],
)
def test_mistakes(texts: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    arguments = [argument.format(texts=texts) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out.json")]
    ended = nestling(str(texts), *arguments, "--json")
    assert ended.exit_code == code
    assert message.format(texts=texts) in result(ended)["error"]
    assert not (tmp_path / "out.json").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    ended = nestling(str(tmp_path / "none"), "--vocab-size", "300", "--json")
    assert ended.exit_code == 2 and f"SOURCE: {tmp_path}/none does not exist; give a text" in result(ended)["error"]

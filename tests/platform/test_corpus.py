"""Prepared corpora: what they hold, what is held out, that they are found again, and what is said when they fail."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from nestling.config import MixConfig
from nestling.data import Corpus, DataError, Tokens, digests, open_source, prepare, preparing
from nestling.data.digests import digest
from nestling.data.split import BUCKETS, bucket


@dataclass
class Settings:
    source: str
    tokenizer: str = "bytes"
    column: str = "text"
    mix: list[MixConfig] | None = None
    separator: str | None = None
    heldout_percent: float = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short files, some of them equal, and one that is cut into many documents."""
    root = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (root / f"{number:02}.txt").write_text(f"Text number {number % 30}: " + "häß " * (number % 30))
    (root / "long.txt").write_text("".join(f"Paragraph {number}.\n\n" for number in range(5000)))
    return root


@pytest.fixture(scope="module")
def corpus(ray_local: None, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(Settings(str(folder)), tmp_path_factory.mktemp("cache"))


def texts_of(corpus: Corpus, side: Tokens) -> list[str]:
    """Cut the tokens at the separators."""
    assert side.tokens[-1] == corpus.tokenizer.separator
    ends = np.flatnonzero(side.tokens == corpus.tokenizer.separator)
    starts = [0, *(ends[:-1] + 1)]
    return [corpus.tokenizer.decode(side.tokens[start:end]) for start, end in zip(starts, ends, strict=True)]


def test_every_document_is_there_once_in_order_with_a_separator_after_it(corpus: Corpus, folder: Path) -> None:
    source = open_source(str(folder))
    documents = [document.text for shard in source.shards for document in source.read(shard)]
    heldout = [text for text in documents if bucket(text) < 0.2 * BUCKETS]
    assert texts_of(corpus, corpus.parts[0].heldout) == heldout
    assert texts_of(corpus, corpus.parts[0].train) == [text for text in documents if bucket(text) >= 0.2 * BUCKETS]
    assert (corpus.parts[0].train.documents, corpus.parts[0].heldout.documents) == (
        len(documents) - len(heldout),
        len(heldout),
    )


def test_what_is_held_out_is_never_trained_on(corpus: Corpus) -> None:
    train, heldout = texts_of(corpus, corpus.parts[0].train), texts_of(corpus, corpus.parts[0].heldout)
    assert len(train) > len(set(train))  # the source does hold equal documents
    assert heldout and not set(train) & set(heldout)


def test_the_manifest_tells_the_truth(corpus: Corpus) -> None:
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    for name, side in (("train", corpus.parts[0].train), ("heldout", corpus.parts[0].heldout)):
        raw = "".join(texts_of(corpus, side)).encode()
        shares = [count / len(raw) for count in Counter(raw).values()]
        assert side.bytes == len(raw)
        assert side.unigram_bits_per_byte == pytest.approx(-sum(share * math.log2(share) for share in shares))
        assert manifest[name]["sha256"] == hashlib.sha256(side.tokens.tobytes()).hexdigest()
        assert isinstance(side.tokens, np.memmap) and side.tokens.dtype == np.uint16 and not side.tokens.flags.writeable


def test_bits_per_byte(corpus: Corpus) -> None:
    side = corpus.parts[0].heldout
    whole_text = 3.0 * side.bytes * math.log(2)  # nats, if each byte costs three bits
    assert corpus.bits_per_byte(whole_text / len(side.tokens)) == pytest.approx(3.0)
    assert corpus.bits_per_byte(1.0, "train") != corpus.bits_per_byte(1.0, "heldout")


def test_a_second_prepare_does_not_touch_ray(corpus: Corpus, folder: Path) -> None:
    code = f"""
        import sys, time
        from nestling.config import DataConfig
        from nestling.data import prepare
        start = time.perf_counter()
        settings = DataConfig(source={str(folder)!r}, heldout_percent=20.0)
        corpus = prepare(settings, {str(corpus.folder.parent)!r})
        assert str(corpus.folder) == {str(corpus.folder)!r}, corpus.folder
        assert "ray" not in sys.modules
        assert time.perf_counter() - start < 1
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in corpus.folder.parent.iterdir()} <= {corpus.folder.name, "digests.json"}


def test_other_settings_make_another_corpus(corpus: Corpus, folder: Path) -> None:
    other = prepare(Settings(str(folder), heldout_percent=50), corpus.folder.parent)
    assert other.folder != corpus.folder
    assert other.parts[0].heldout.documents > corpus.parts[0].heldout.documents
    assert set(texts_of(corpus, corpus.parts[0].heldout)) < set(texts_of(other, other.parts[0].heldout))


def test_a_tokenizer_file(ray_local: None, folder: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"?": 0, "[END]": 70_000, "Text": 2, "number": 3}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    settings = Settings(str(folder), str(tmp_path / "tokenizer.json"), separator="[END]")
    corpus = prepare(settings, tmp_path / "cache")
    assert corpus.parts[0].train.tokens.dtype == np.int32
    assert np.count_nonzero(corpus.parts[0].train.tokens == 70_000) == corpus.parts[0].train.documents
    (tmp_path / "tokenizer.json").unlink()
    assert Corpus.open(corpus.folder).tokenizer.separator == 70_000


def test_the_chance_line_of_a_tokenizer_is_that_of_its_tokens(ray_local: None, folder: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train([str(path) for path in sorted(folder.rglob("*.txt"))], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    side = prepare(Settings(str(folder), str(tmp_path / "tokenizer.json")), tmp_path / "cache").parts[0].train
    text = Counter(int(token) for token in side.tokens if token != 0)  # the first special token has the id 0
    nats = -sum(count * math.log(count / text.total()) for count in text.values())
    assert side.unigram_bits_per_byte == pytest.approx(nats / math.log(2) / side.bytes)
    assert (
        side.unigram_bits_per_byte
        < 0.95 * prepare(Settings(str(folder)), tmp_path).parts[0].train.unigram_bits_per_byte
    )


def test_of_a_few_documents_the_lowest_hash_is_held_out(ray_local: None, tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name)
    ordered = sorted(names, key=bucket)
    corpus = prepare(Settings(str(tmp_path), heldout_percent=0.01), tmp_path / ".cache")
    assert texts_of(corpus, corpus.parts[0].heldout) == ordered[:1]
    corpus = prepare(Settings(str(tmp_path), heldout_percent=99.99), tmp_path / ".cache")
    assert texts_of(corpus, corpus.parts[0].train) == ordered[-1:]


def test_errors_leave_nothing_behind(ray_local: None, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "single.txt").write_text("short")
    with pytest.raises(
        DataError, match=r"single\.txt is a single document of 5 bytes, so nothing can be held out; give more text"
    ):
        prepare(Settings(str(tmp_path / "single.txt")), cache)
    (tmp_path / "blank.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match=r"blank\.txt holds no text, only white space"):
        prepare(Settings(str(tmp_path / "blank.txt")), cache)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "good.txt").write_text("good")
    (tmp_path / "mixed" / "rows.jsonl").write_text('{"text": "good"}\n{"body": "no"}\n')
    with pytest.raises(DataError) as caught:
        prepare(Settings(str(tmp_path / "mixed")), cache)
    assert str(caught.value) == (
        f"data.source: {tmp_path}/mixed/rows.jsonl: line 2 has no column 'text', it has 'body'; "
        "set `column` to the one with the text"
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"data\.tokenizer: there is no file"):
        prepare(replace(Settings(str(folder)), tokenizer="none.json"), cache)
    assert list(cache.iterdir()) == []


def test_a_damaged_corpus_is_named(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold a prepared corpus .*; delete it and start again"):
        Corpus.open(tmp_path)
    damaged = shutil.copytree(corpus.folder, tmp_path / "damaged")
    os.truncate(damaged / "train.npy", 4096)
    with pytest.raises(DataError, match="damaged does not hold a prepared corpus"):
        Corpus.open(damaged)


def test_the_byte_tokenizer_has_its_own_separator(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.separator: got '<s>', but the byte tokenizer has a separator of its own"):
        prepare(Settings(str(folder), separator="<s>"), tmp_path)


def test_counts_of_what_was_left_out_and_replaced(
    ray_local: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("x" * 11)
    (texts / "b.txt").write_bytes(b"na\xefve \xff")
    (texts / "c.txt").write_text("")
    (texts / "d.txt").write_text(" \n")
    (texts / "e.jsonl").write_text('{"text": "ten bytes!"}\n{"text": null}\n{"text": "other"}\n')
    corpus = prepare(Settings(str(texts), heldout_percent=50), tmp_path / "cache")
    remarks = "3 empty ones left out, 2 undecodable bytes replaced"
    assert corpus.line(10) == f"4 documents ({remarks}, 2 longer than a sequence)"
    assert corpus.line(11) == f"4 documents ({remarks})"
    counts = corpus.parts[0].counts
    assert (counts.documents, counts.empty, counts.replaced) == (4, 3, 2)
    assert counts.longer_than(4) == 4 and counts.longer_than(5) == 3
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("nestling"))
    assert "data.source: bytes that are not UTF-8 became U+FFFD: 2, " in warning
    assert f"the first one in {texts}/b.txt: byte 2" in warning
    found = [text for side in (corpus.parts[0].train, corpus.parts[0].heldout) for text in texts_of(corpus, side)]
    assert sorted(found) == ["na\ufffdve \ufffd", "other", "ten bytes!", "x" * 11]


@pytest.fixture(scope="module")
def mixed(ray_local: None, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": f"row {number} of a table"}) + "\n" for number in range(300)))
    mix = [MixConfig(str(folder), None, "texts", 3.0), MixConfig(str(rows), "body", "rows", 1.0)]
    return prepare(Settings("", mix=mix), tmp_path_factory.mktemp("cache"))


def test_a_mix_is_its_parts(mixed: Corpus, folder: Path) -> None:
    assert [(part.name, part.weight) for part in mixed.parts] == [("texts", 0.75), ("rows", 0.25)]
    alone = prepare(Settings(str(folder)), mixed.folder.parent)
    np.testing.assert_array_equal(alone.parts[0].train.tokens, mixed.parts[0].train.tokens)
    assert all(text.startswith("row ") for text in texts_of(mixed, mixed.parts[1].heldout))
    again = Corpus.open(str(mixed.folder))
    assert [part.name for part in again.parts] == ["texts", "rows"]
    moved = shutil.copytree(mixed.folder.parent, folder.parent / "moved")
    assert len(Corpus.open(moved / mixed.folder.name).parts) == 2
    assert mixed.line(10_000).startswith("texts: ") and "; rows: 300 documents, 0.25 of the mix" in mixed.line(10_000)


def test_other_weights_need_no_new_reading(mixed: Corpus, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((mixed.folder / "mix.json").read_text())
    rows = json.loads((mixed.folder.parent / manifest[1]["folder"] / "manifest.json").read_text())["source"]
    mix = [MixConfig(str(folder), None, "texts", 1.0), MixConfig(rows, "body", "rows", 1.0)]
    monkeypatch.setattr(preparing, "connected", None)  # Ray is not needed
    other = prepare(Settings("", mix=mix), mixed.folder.parent)
    assert other.folder != mixed.folder and [part.weight for part in other.parts] == [0.5, 0.5]


def test_bits_per_byte_of_a_mix_are_all_nats_over_all_bytes(mixed: Corpus) -> None:
    losses = [2.0, 3.0]
    sides = [part.heldout for part in mixed.parts]
    nats = 0.75 * 2.0 + 0.25 * 3.0
    size = sum(weight * side.bytes / len(side.tokens) for weight, side in zip((0.75, 0.25), sides, strict=True))
    assert mixed.bits_per_byte(losses) == pytest.approx(nats / size / math.log(2))
    assert mixed.bits_per_byte(2.5) == pytest.approx(mixed.bits_per_byte([2.5, 2.5]))
    lines = [side.unigram_bits_per_byte for side in sides]
    assert min(lines) < mixed.unigram_bits_per_byte() < max(lines)


def test_an_error_in_a_mix_names_its_part(ray_local: None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    mix = [MixConfig(str(folder), name="a"), MixConfig(str(tmp_path / "rows.jsonl"), name="b")]
    with pytest.raises(DataError, match=r"data\.mix\.1\.source: .*rows\.jsonl: line 1 has no column 'text'"):
        prepare(Settings("", mix=mix), tmp_path / "cache")


def test_files_are_read_again_only_if_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    read: list[str] = []

    def counting(path: str) -> str:
        read.append(path)
        return digest(path)

    monkeypatch.setattr(digests, "digest", counting)

    def look(content: str | None = None, age: float = 100) -> str:
        if content is not None:
            path.write_text(content)
            os.utime(path, (time.time() - age,) * 2)
        memory = digests.Digests(tmp_path / "cache")
        found = memory(str(path))
        memory.save()
        assert found == digest(str(path))
        return found

    first = look("one")
    assert look() == first and len(read) == 1
    assert look("two", age=99) != first and len(read) == 2
    look("new", age=0)  # may change again within its time stamp: not remembered
    look()
    assert len(read) == 4
    (tmp_path / "cache" / "digests.json").write_text("[broken")
    look("old")
    look()
    assert len(read) == 5
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["digests.json"]


def test_what_a_killed_process_left_is_removed_after_a_day(ray_local: None, folder: Path, tmp_path: Path) -> None:
    for name, age in (("old", 25), ("young", 23)):
        draft = tmp_path / f".draft-{name}"
        draft.mkdir()
        (draft / "train.npy").write_text("half")
        for path in (draft / "train.npy", draft):
            os.utime(path, (time.time() - age * 3600,) * 2)
    prepare(Settings(str(folder)), tmp_path)
    assert sorted(path.name for path in tmp_path.glob(".draft-*")) == [".draft-young"]

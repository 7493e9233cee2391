"""Tokenizers: ids, round trips, text that comes token by token, and what is said when one does not fit."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from nestling.data import DataError, Source, TextStream, Tokenizer, open_source, split
from nestling.data.bpe import train_tokenizer

TEXT = "The naïve café costs 3 € – 漢字 😀 and 👩‍👩‍👧 too.\n" * 3
BYTES = Tokenizer.bytes()


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE whose file also holds a truncation, as many published ones do."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.enable_truncation(8)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(bpe_file: Path) -> Tokenizer:
    return Tokenizer.load(bpe_file)


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [stream.push(token_id) for token_id in ids] + [stream.flush()]


def test_a_byte_is_its_own_id() -> None:
    assert BYTES.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert BYTES.encode("aé").dtype == np.int32
    assert (BYTES.separator, BYTES.vocab_size) == (256, 257)


@given(st.text(max_size=200))
def test_the_saved_byte_tokenizer_gives_the_same_ids_in_the_library(text: str) -> None:
    library = tokenizers.Tokenizer.from_str(BYTES.definition)
    ids = BYTES.encode(text)
    assert ids.tolist() == library.encode(text).ids
    assert BYTES.decode(ids) == library.decode(ids.tolist()) == text


def test_every_byte_is_in_the_saved_vocabulary(tmp_path: Path) -> None:
    BYTES.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.get_vocab_size() == 257
    for byte in range(128, 256):
        assert library.decode([0x61, byte]) == bytes([0x61, byte]).decode(errors="replace")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.definition == BYTES.definition
    assert again.encode(TEXT).tolist() == list(TEXT.encode())


def test_a_text_cannot_forge_a_separator(bpe: Tokenizer) -> None:
    for tokenizer in (BYTES, bpe):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.separator not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_bpe_round_trip_without_truncation(bpe: Tokenizer) -> None:
    ids = bpe.encode(TEXT)
    assert 8 < len(ids) < len(TEXT.encode())
    assert bpe.decode(ids) == TEXT
    assert bpe.decode([bpe.separator, *ids, bpe.separator]) == TEXT


@given(st.lists(st.integers(0, 256), max_size=60))
def test_a_byte_stream_says_what_decode_says(ids: list[int]) -> None:
    texts = [list(group) for group in _split(ids)]
    assert "".join(pieces(BYTES.stream(), ids)) == "".join(map(BYTES.decode, texts))


def _split(ids: list[int]) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for token_id in ids:
        if token_id == 256:
            groups.append([])
        else:
            groups[-1].append(token_id)
    return groups


def test_a_stream_never_shows_half_a_character(bpe: Tokenizer) -> None:
    for tokenizer in (BYTES, bpe):
        shown = pieces(tokenizer.stream(), tokenizer.encode(TEXT).tolist())
        assert "".join(shown) == TEXT
        assert not any("\ufffd" in piece for piece in shown)
        assert "" in shown  # some token was only the beginning of a character


def test_flush_shows_what_stayed_incomplete(bpe: Tokenizer) -> None:
    for tokenizer in (BYTES, bpe):
        stream = tokenizer.stream()
        start = tokenizer.encode("\U0010ffff")[:2].tolist()
        assert [stream.push(token_id) for token_id in start] == ["", ""]
        assert set(stream.flush()) == {"\ufffd"}
        assert stream.flush() == ""
        assert "".join(pieces(stream, tokenizer.encode("ok").tolist())) == "ok"
        assert "".join(pieces(stream, [*start, tokenizer.separator, *tokenizer.encode("ok")])).strip("\ufffd") == "ok"


def test_a_stream_of_nonsense_stays_quick(bpe: Tokenizer) -> None:
    broken = int(bpe.encode("\U0010ffff")[-1])
    stream = bpe.stream()
    start = time.perf_counter()
    assert "".join(stream.push(broken) for _ in range(16_000)).strip("\ufffd") == ""
    assert time.perf_counter() - start < 5


def test_encoding_bytes_is_fast() -> None:
    text = TEXT * 100_000
    start = time.perf_counter()
    ids = BYTES.encode(text)
    assert len(ids) / (time.perf_counter() - start) > 20e6


def test_a_tokenizer_travels_to_other_processes(bpe: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(bpe))
    assert again.separator == bpe.separator
    assert again.encode(TEXT).tolist() == bpe.encode(TEXT).tolist()


def test_a_chosen_separator(bpe_file: Path) -> None:
    tokenizer = Tokenizer.load(bpe_file, separator="e")
    assert tokenizer.separator == tokenizer.encode("e")[0]
    assert tokenizer.decode(tokenizer.encode("here")) == "hr"  # a separator is no text


def test_errors_say_what_is_wrong(bpe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"there is no file .*/none\.json; give the path of a tokenizer\.json, or `bytes`"
    ):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"no token '<nope>'; name one that it has with data\.separator"):
        Tokenizer.load(bpe_file, separator="<nope>")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "broken.json")
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match=r"none of <\|endoftext\|>, .*; name the token .* with data\.separator"):
        Tokenizer.load(tmp_path / "words.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Rows that share their words; every row that would be held out has a word of its own, which no other has."""
    rows = [f"the quick brown fox number {number} jumps over the lazy dog" for number in range(400)]
    rows = [f"{row} Zyzzyva" if split.bucket(f"{row} Zyzzyva") < split.threshold(20) else row for row in rows]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": row}) + "\n" for row in [*rows, "", None]))
    return open_source(str(path), "body")


def test_a_trained_tokenizer(source: Source, tmp_path: Path) -> None:
    trained = train_tokenizer(source, 300, heldout_percent=20)
    trained.tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.vocab_size, again.separator_name, again.separator) == (300, "<|endoftext|>", 0)
    assert again.decode(again.encode(TEXT)) == TEXT  # whatever it was trained on
    assert len(again.encode("the quick brown fox")) < 8
    texts = [document.text for shard in source.shards for document in source.read(shard) if document.text]
    kept = [text for text in texts if split.bucket(text) >= split.threshold(20)]
    assert (trained.documents, trained.bytes) == (len(kept), sum(len(text.encode()) for text in kept))
    heldout = [text for text in texts if split.bucket(text) < split.threshold(20)]
    tokens = sum(len(again.encode(text)) for text in heldout)
    assert heldout and trained.bytes_per_token == pytest.approx(sum(map(len, heldout)) / tokens)


def test_held_out_text_does_not_reach_the_tokenizer(source: Source) -> None:
    """A word that only held-out documents have gives no token, though it is more frequent than many others."""
    vocabulary = json.loads(train_tokenizer(source, 400, heldout_percent=20).tokenizer.definition)["model"]["vocab"]
    assert not [token for token in vocabulary if "Zy" in token]
    assert "\u0120jumps" in vocabulary


def test_training_a_tokenizer_is_deterministic(source: Source, tmp_path: Path) -> None:
    code = (
        "import hashlib, sys; from nestling.data import open_source; from nestling.data.bpe import train_tokenizer\n"
        "print(train_tokenizer(open_source(sys.argv[1], 'body'), 350, 10.0).tokenizer.definition)"
    )
    command = [sys.executable, "-c", code, source.spec]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second != ""


def test_a_source_too_small_for_a_tokenizer(source: Source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a vocabulary of 256 tokens is too small, needs at least 257"):
        train_tokenizer(source, 256, 10)
    with pytest.raises(DataError, match=r"rows\.jsonl gives \d+ tokens and no more, fewer than 9000; ask") as error:
        train_tokenizer(source, 9000, 10)
    most = int(str(error.value).rpartition("ask for ")[2].partition(",")[0])
    assert train_tokenizer(source, most, 10).tokenizer.vocab_size == most
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(DataError, match="fewer than two different documents; give more text"):
        train_tokenizer(open_source(str(tmp_path / "one.txt")), 300, 10)
    for name in ("two", "three"):
        (tmp_path / f"{name}.txt").write_text(f"{name} documents")
    assert train_tokenizer(open_source(str(tmp_path)), 257, 0.01).documents == 2  # one is held out all the same

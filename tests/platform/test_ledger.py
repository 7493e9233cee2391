"""The ledger proves what was trained on, and shows every way in which it can be wrong."""

import json
import math

import pytest

from nestling.checkpoint.ledger import Ledger, Lines, verify
from nestling.evaluation.prequential import Prequential


def line(window, start, end, partition="p", step=None):
    return {
        **{"window_id": window, "partition": partition, "start": start, "end": end},
        **{"step": window if step is None else step, "n_records": end - start, "n_dead": 1, "n_late": 0},
    }


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([line(0, 0, 5), line(0, 0, 3, "q"), line(1, 5, 9)])
    return ledger


def test_a_sound_ledger(ledger):
    found = verify(ledger.path, ledger.state())
    assert found.ok and (found.intervals, found.records, found.dead) == (3, 12, 3)


@pytest.mark.parametrize(
    ("more", "problem", "gaps", "overlaps"),
    [(line(2, 10, 12), "a gap", 1, 0), (line(2, 8, 12), "an overlap", 0, 1), (line(4, 9, 12), "does not follow", 0, 0)],
)
def test_gaps_overlaps_and_missing_windows_are_found(ledger, more, problem, gaps, overlaps):
    ledger.append([more])
    found = verify(ledger.path, ledger.state())
    assert not found.ok and problem in found.problems[0] and (found.gaps, found.overlaps) == (gaps, overlaps)


def test_a_first_interval_that_does_not_begin_where_its_partition_does(ledger):
    assert verify(ledger.path, ledger.state(), lambda _: 0).ok
    assert verify(ledger.path, ledger.state(), lambda _: 1).overlaps == 2
    ledger.append([line(2, 7, 9, "r")])
    assert verify(ledger.path, ledger.state(), lambda _: 0).gaps == 1


def test_the_snapshot_must_stand_where_the_ledger_ends(ledger):
    position = {"window": 2, "offsets": {"p": 9, "q": 3}}
    assert verify(ledger.path, ledger.state(), lambda _: 0, position).ok
    for wrong in ({"window": 3}, {"offsets": {"p": 9, "q": 4}}, {"offsets": {"p": 9}}):
        assert not verify(ledger.path, ledger.state(), lambda _: 0, position | wrong).ok


def test_a_line_that_lacks_something_is_named_and_no_crash(ledger):
    text = ledger.path.read_text().replace('"n_records": 3, ', "")
    ledger.path.write_text(text)
    found = verify(ledger.path, ledger.state() | {"bytes": len(text)})
    assert not found.ok and "line 2 cannot be read: KeyError" in found.problems[0]


def test_a_ledger_whose_last_line_was_altered_is_not_taken_up(ledger):
    state = ledger.state()
    ledger.path.write_text(ledger.path.read_text().replace('"end": 9', '"end": 8'))
    with pytest.raises(ValueError, match="the line that the snapshot names last is another one"):
        Ledger(ledger.path).load(state)


@pytest.mark.parametrize("what", ["altered", "left out", "put in", "cut off"])
def test_no_line_can_be_changed(ledger, what):
    lines = ledger.path.read_text().splitlines()
    if what == "altered":
        lines[0] = lines[0].replace('"n_records": 5', '"n_records": 6')
    elif what == "left out":
        del lines[1]
    elif what == "put in":
        lines.insert(1, lines[1])
    else:
        lines.pop()
    ledger.path.write_text("\n".join(lines) + "\n")
    assert not verify(ledger.path, ledger.state()).ok


def test_what_stands_behind_the_snapshot_does_not_count_and_is_cut_off(ledger):
    state = ledger.state()
    ledger.append([line(7, 700, 701)])
    assert verify(ledger.path, state).ok
    again = Ledger(ledger.path)
    again.load(state)
    again.append([line(2, 9, 12)])
    assert verify(ledger.path, again.state()).ok
    assert [json.loads(text)["window_id"] for text in ledger.path.read_text().splitlines()] == [0, 0, 1, 2]


def test_a_file_that_is_shorter_than_the_snapshot_knows(tmp_path):
    lines = Lines(tmp_path / "lines")
    with pytest.raises(ValueError, match="has 0 bytes, the snapshot knows 9"):
        lines.rewind(9)


def test_the_prequential_losses_by_hand():
    prequential = Prequential(fading=0.5)
    assert prequential.bits_per_byte is None
    for bits in (8.0, 4.0, 2.0):
        prequential.add({"a": bits * math.log(2) * 10}, {"a": 10})
    figures = prequential.metrics()
    assert figures["prequential/bits_per_byte"] == pytest.approx(14 / 3, abs=1e-12)
    assert figures["prequential/code_length_bytes"] == pytest.approx(140 / 8, abs=1e-12)
    faded = (2 + 4 / 2 + 8 / 4) / (1 + 1 / 2 + 1 / 4)
    assert figures["prequential/fading_bits_per_byte"] == pytest.approx(faded, abs=1e-12)
    assert figures["prequential/a/bits_per_byte"] == pytest.approx(faded, abs=1e-12)
    for _ in range(100):
        prequential.add({"b/c": math.log(2) * 10}, {"b/c": 10})
    figures = prequential.metrics()
    assert figures["prequential/windowed_bits_per_byte"] == pytest.approx(1.0, abs=1e-12)
    assert figures["prequential/b_c/bits_per_byte"] == pytest.approx(1.0, abs=1e-12)
    for number in range(200):  # a stream may have a domain for every user
        prequential.add({f"user {number}": 1.0}, {f"user {number}": 3})
    assert len([name for name in prequential.metrics() if name.endswith("/bits_per_byte")]) <= 103
    again = Prequential(fading=0.5)
    again.load(json.loads(json.dumps(prequential.state())))
    for each in (prequential, again):
        each.add({"a": 1.0}, {"a": 3})
    assert again.metrics() == prequential.metrics()

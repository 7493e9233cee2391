"""Windows: bounded, planned once, complete in themselves; and what a batch of them holds."""

import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from nestling.config.stream import StreamConfig
from nestling.data import IGNORED, DataError, Tokenizer
from nestling.data.streams import (
    Interval,
    Opening,
    Planner,
    Position,
    Record,
    Rules,
    StreamSource,
    WindowFolder,
    reader,
)
from nestling.data.streams.content import batches, read_window
from nestling.data.streams.reader import Next, Reading, ReadingFailed
from nestling.data.streams.windows import Arrivals, Plan
from nestling.training.needed_windows import NeededWindows
from nestling.training.whereabouts import PARTITIONS, whereabouts


class Lists(StreamSource):
    """Partitions that are lists of texts in memory, each with its event time."""

    name = "lists"

    def __init__(self, **partitions):
        self.partitions = partitions
        self.finite = True

    def ends(self, offsets):
        return {name: len(texts) for name, texts in self.partitions.items()}

    def ended(self, offsets):
        return self.finite and all(offsets.get(name, 0) >= len(texts) for name, texts in self.partitions.items())

    def read(self, interval):
        for offset in range(interval.start, interval.end):
            text, at = self.partitions[interval.partition][offset]
            yield Record(interval.partition, offset, offset + 1, text, str(offset), at, interval.partition)


def texts(count, size=10, at=0.0):
    return [(f"{n:0{size}}", at + n) for n in range(count)]


def planned(source, folder, position=None, **settings):
    """All windows of a source that ends, as the planner writes them."""
    config = StreamConfig(**{"window_bytes": 35, "windows_ahead": 100, "poll_every": 0.01, "close_after": 0} | settings)
    windows = WindowFolder(folder)
    windows.begin()
    planner = Planner(source, windows, config, position or Position())
    planner.run(lambda: False)
    plans, number = [], (position or Position()).window
    while (plan := windows.plan(number)) is not None:
        plans.append(plan)
        number += 1
    assert windows.ended(number) == ""
    return plans


def abut(plans):
    ends = {}
    for plan in plans:
        for interval in plan.intervals:
            assert ends.get(interval.partition, 0) == interval.start < interval.end
            ends[interval.partition] = interval.end
    return ends


def test_windows_abut_and_hold_no_more_than_they_should(tmp_path):
    source = Lists(a=texts(23), b=texts(9))
    plans = planned(source, tmp_path)
    assert abut(plans) == {"a": 23, "b": 9}
    sizes = [sum(10 * (i.end - i.start) for i in plan.intervals) for plan in plans]
    assert all(size == 40 for size in sizes[:-1]) and 0 < sizes[-1] <= 40


def test_the_lag_is_what_the_source_holds_beyond_what_was_learnt(tmp_path):
    source = Lists(a=texts(23), b=texts(9))
    windows = WindowFolder(tmp_path)
    windows.begin()
    planner = Planner(source, windows, StreamConfig(window_bytes=35, close_after=0, poll_every=0.01), Position())
    planner.run(lambda: windows.plan(1) is not None)
    lag = planner.lag({"a": 4})
    assert lag == {"a": 19, "b": 9}
    assert whereabouts({"a": 4}, lag) == {
        **{"stream/position_total": 4, "stream/lag_total": 28, "stream/lag_worst": 19},
        **{"stream/position/a": 4, "stream/lag/a": 19, "stream/lag/b": 9},
    }
    many = {f"{number}": number for number in range(PARTITIONS + 1)}
    assert whereabouts(many, many).keys() == {"stream/position_total", "stream/lag_total", "stream/lag_worst"}
    (name,) = (key for key in whereabouts({"/" + "x" * 999: 1}, {}) if key.startswith("stream/position/"))
    assert len(name) < 250 and name.count("/") == 2  # as MLflow takes it


def test_a_planned_window_stays_though_more_has_come(tmp_path):
    source = Lists(a=texts(5))
    before = planned(source, tmp_path)
    source.partitions["a"] = texts(50)
    source.partitions["0"] = texts(50)  # would come first
    after = planned(source, tmp_path)
    assert after[: len(before)] == before and len(after) > len(before)
    abut(after)
    # And without what was written down it would have come differently.
    assert planned(source, tmp_path / "other")[: len(before)] != before


def test_a_partition_that_grows_without_end_does_not_keep_others_waiting():
    source = Lists(a=texts(10), b=texts(10))
    arrivals = Arrivals(source, {})
    seen = []
    for _ in range(12):
        arrivals.look()
        intervals, _ = arrivals.propose(30)
        assert arrivals.propose(30)[0] == intervals  # proposing changes nothing
        arrivals.accept(intervals)
        assert len(arrivals._queue) <= 4
        seen += [interval.partition for interval in intervals]
        source.partitions["a"] = source.partitions["a"] + texts(10)
    assert "b" in seen[:6] and seen[-1] == "a"


def test_no_window_is_planned_further_ahead_than_configured(tmp_path):
    config = StreamConfig(window_bytes=10, windows_ahead=3, poll_every=0.01)
    source, windows, stop = Lists(a=texts(10_000)), WindowFolder(tmp_path), threading.Event()
    windows.begin()
    planner = Planner(source, windows, config, Position())
    thread = threading.Thread(target=planner.run, args=(stop.is_set,))
    thread.start()
    try:
        for consumed in (0, 1, 5):
            planner.consumed = consumed
            deadline = time.monotonic() + 5
            while windows.plan(consumed + 3) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert windows.plan(consumed + 3) is not None and windows.plan(consumed + 4) is None
    finally:
        stop.set()
        thread.join()
    assert windows.ended(10_000) == ""


def test_a_small_window_is_closed_after_a_while(tmp_path):
    config = StreamConfig(window_bytes=1000, close_after=0.3, poll_every=0.01)
    source, windows, stop = Lists(a=texts(2)), WindowFolder(tmp_path), threading.Event()
    source.finite = False
    windows.begin()
    thread = threading.Thread(target=Planner(source, windows, config, Position()).run, args=(stop.is_set,))
    thread.start()
    try:
        time.sleep(0.1)
        assert windows.plan(0) is None
        source.partitions["a"] = texts(3)  # comes before the window is closed, and so into it
        time.sleep(0.6)
        assert windows.plan(0) == Plan(0, (Interval("a", 0, 3),))
    finally:
        stop.set()
        thread.join()


def test_an_error_of_the_source_ends_the_stream_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("nestling.data.streams.windows._RETRIES", (0.01, 0.01))

    class Gone(Lists):
        def ends(self, offsets):
            raise DataError("the disk is gone")

    windows = WindowFolder(tmp_path)
    windows.begin()
    Planner(Gone(), windows, StreamConfig(), Position()).run(lambda: False)
    with pytest.raises(DataError, match="the disk is gone"):
        windows.wait(0)


def test_a_source_that_answers_again_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("nestling.data.streams.windows._RETRIES", (0.01, 0.01))
    answers = [False, True, False, False, True]

    class Shaky(Lists):
        def ends(self, offsets):
            if answers and not answers.pop(0):
                raise DataError("no answer from the broker")
            return super().ends(offsets)

    assert abut(planned(Shaky(a=texts(23)), tmp_path)) == {"a": 23}


def test_a_plan_that_is_gone_or_damaged_is_no_reason_to_wait(tmp_path):
    windows = WindowFolder(tmp_path)
    planned(Lists(a=texts(23)), tmp_path)
    (tmp_path / "00000002.json").unlink()
    with pytest.raises(DataError, match=r"00000002.json is gone, though the window after it is planned"):
        windows.wait(2)
    (tmp_path / "00000003.json").write_text("")
    with pytest.raises(DataError, match=r"00000003.json is damaged"):
        windows.wait(3)
    (tmp_path / "00000003.json").unlink()
    # Planned anew from the gap on, whatever stands behind it.
    again = planned(Lists(a=texts(23)), tmp_path, Position(2, {"a": 8}), window_bytes=45)
    assert [plan.number for plan in again] == [2, 3, 4] and again[0].intervals[0].start == 8


def test_every_token_is_predicted_once_and_every_byte_counted():
    tokenizer = Tokenizer.bytes()
    records = [
        Record("a", 0, 1, "héllo", "", None, "x"),
        Record("a", 1, 2, "line\n", "", None, "y", whole=False),
        Record("a", 2, 3, "more text that is long", "", None, "x"),
    ]
    made = batches(records, tokenizer, length=4, rows=3)
    targets = np.concatenate([batch.targets.flatten() for batch in made])
    flat = np.concatenate([np.frombuffer(b, np.uint8).astype(int) for b in (b"h\xc3\xa9llo",)]).tolist() + [256]
    flat += [*b"line\n", *b"more text that is long", 256]
    assert targets[: len(flat)].tolist() == flat and (targets[len(flat) :] == IGNORED).all()
    inputs = np.concatenate([batch.inputs.flatten() for batch in made])
    assert inputs[0] == 256 and inputs[1 : len(flat)].tolist() == flat[:-1]
    sizes = {}
    for batch in made:
        for name, size in zip(batch.names, batch.bytes, strict=True):
            sizes[name] = sizes.get(name, 0) + size
        names = np.array(batch.names)[batch.domains[batch.targets != IGNORED]]
        assert set(names) <= set(batch.names)
    assert sizes == {"x": 6 + 22, "y": 5}
    assert batches([], tokenizer, 4, 3) == []


def test_late_records_are_told_by_what_earlier_windows_saw():
    source = Lists(a=[("new", 100.0), ("old", 50.0), ("older", 10.0)])
    first = read_window(source, Plan(0, (Interval("a", 0, 2),)), Rules(lateness=60.0), {})
    assert (len(first.trained), first.latest) == (2, {"lists": 100.0})
    second = read_window(source, Plan(1, (Interval("a", 2, 3),)), Rules(lateness=60.0), first.latest)
    assert [record.text for record in second.late] == ["older"] and second.trained == []
    assert second.counted[0].late == 1 and second.latest == {"lists": 100.0}
    trained = read_window(source, Plan(1, (Interval("a", 2, 3),)), Rules(60.0, aside=False), first.latest)
    assert len(trained.trained) == 1 and trained.counted[0].late == 1 and trained.late == []


def test_what_is_held_out_goes_by_its_text_alone():
    source = Lists(a=texts(500), b=texts(500)[::-1])
    content = read_window(source, Plan(0, (Interval("a", 0, 500), Interval("b", 0, 500))), Rules(held_percent=10), {})
    held = {record.text for record in content.held}
    assert 25 < len(held) < 80 and len(content.held) == 2 * len(held)  # the same texts in both partitions
    assert held.isdisjoint(record.text for record in content.trained)
    assert [counted.held for counted in content.counted] == [len(held), len(held)]
    assert content.summary()["held"][0] == {"domain": "a", "text": content.held[0].text}
    none = read_window(source, content.plan, Rules(), {})
    assert not none.held and len(none.trained) == 1000


def test_a_reader_begins_at_any_window(tmp_path):
    source = Lists(a=texts(23))
    planned(source, tmp_path)
    reading = Reading(source, tmp_path, Rules(), Tokenizer.bytes(), 8, 4)

    def read(window):
        return [item for table in reading.tables(window, {}) for item in reading._parsed(table)]

    whole, later = read(0), read(2)
    openings = [place for place, item in enumerate(whole) if isinstance(item, Opening)]
    assert [whole[place].summary["window"] for place in openings] == list(range(6))
    assert [after - before - 1 for before, after in pairwise(openings)] == [whole[p].batches for p in openings[:-1]]
    assert len(later) == len(whole) - openings[2]
    for one, two in zip(whole[openings[2] :], later, strict=True):
        if isinstance(one, Opening):
            assert one == two
        else:
            assert (one.targets == two.targets).all() and (one.inputs == two.inputs).all() and one.bytes == two.bytes


def test_a_reader_leaves_off_between_two_windows_and_says_how_to_go_on(tmp_path, monkeypatch):
    source = Lists(a=texts(23))  # four a window
    planned(source, tmp_path)
    reading = Reading(source, tmp_path, Rules(), Tokenizer.bytes(), 8, 4)
    whole = list(reading.tables(0, {}))
    monkeypatch.setattr(reader, "WINDOWS", 2)
    first = list(reading.tables(0, {}))
    assert first[:-1] == whole[:2]
    assert list(reading._parsed(first[-1])) == [Next(window=2, latest={"lists": 7.0})]


def test_what_goes_wrong_in_a_reader_reaches_whoever_follows_it(tmp_path):
    source = Lists(a=texts(23))
    planned(source, tmp_path)
    source.partitions["a"] = texts(2)  # offsets that were there are gone
    reading = Reading(source, tmp_path, Rules(), Tokenizer.bytes(), 8, 4)
    with pytest.raises(ReadingFailed, match="IndexError"):
        [item for table in reading.tables(0, {}) for item in reading._parsed(table)]


def test_windows_that_no_snapshot_needs_are_forgotten(tmp_path):
    windows = WindowFolder(tmp_path)
    planned(Lists(a=texts(23)), tmp_path)
    windows.forget(3)
    assert windows.plan(2) is None and windows.plan(3) is not None


def test_a_step_that_is_saved_twice_keeps_the_plan_of_its_earlier_window(tmp_path):
    """The second of the two may have failed, and then the first is what a stream goes on from."""
    windows = WindowFolder(tmp_path)
    planned(Lists(a=texts(23)), tmp_path)
    needed = NeededWindows(windows)
    for step, window in ((10, 2), (10, 4), (20, 5)):  # windows 2 and 3 held nothing to train on
        needed.saving(step, window)
    needed.forget({10, 30})  # one of an earlier process
    assert windows.plan(0) is not None
    needed.forget({10, 20})
    assert windows.plan(1) is None and windows.plan(2) is not None
    needed.forget({20})
    assert windows.plan(4) is None and windows.plan(5) is not None

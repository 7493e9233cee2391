"""Several sources of one stream: windows of one source each, in turns, and a policy for each."""

from __future__ import annotations

import threading
from functools import partial

import pytest
from tests.platform.test_stream_windows import Lists, abut, planned, texts

from nestling.config import ConfigError, JobConfig, from_yaml, load, to_yaml
from nestling.config.stream import StreamConfig, StreamSourceConfig
from nestling.data.streams import Interval, Planner, Position, Rules, WindowFolder, open_stream
from nestling.data.streams.content import read_window
from nestling.data.streams.several import Part, Several
from nestling.data.streams.windows import Plan
from nestling.training.run import complete
from nestling.training.stream import _begin


def several(**sources):
    return Several(tuple(Part(name, source) for name, source in sources.items()))


def sources_of(plans):
    """The source of each window; every window has one."""
    names = [{interval.partition.split("/")[0] for interval in plan.intervals} for plan in plans]
    assert all(len(each) == 1 for each in names)
    return "".join(name for each in names for name in each)


def test_windows_are_of_one_source_and_sources_take_turns(tmp_path):
    source = several(a=Lists(x=texts(11), y=texts(9)), b=Lists(x=texts(7)), c=Lists(x=texts(4)))
    plans = planned(source, tmp_path)  # four records fill a window
    assert abut(plans) == {"a/x": 11, "a/y": 9, "b/x": 7, "c/x": 4}
    assert sources_of(plans) == "abcabaaa"
    # Whatever the stream stood at, the windows that are planned anew are the same.
    (tmp_path / "again").mkdir()
    offsets = {interval.partition: interval.end for plan in plans[:3] for interval in plan.intervals}
    assert planned(source, tmp_path / "again", Position(3, offsets)) == plans[3:]


def test_a_source_without_end_keeps_no_other_waiting(tmp_path):
    config = StreamConfig(window_bytes=35, windows_ahead=2, poll_every=0.01, close_after=1000)
    late = Lists(x=[])
    late.finite = False
    source, windows, stop = several(a=Lists(x=texts(100_000)), b=late), WindowFolder(tmp_path), threading.Event()
    windows.begin()
    planner = Planner(source, windows, config, Position())
    thread = threading.Thread(target=planner.run, args=(stop.is_set,))
    thread.start()

    def of(number):
        planner.consumed = max(0, number - 2)
        return sources_of([windows.wait(number)])

    try:
        assert [of(number) for number in range(5)] == list("aaaaa")
        late.partitions["x"] = texts(2)  # less than a window: it waits for more, and nobody waits for it
        assert [of(number) for number in range(5, 9)] == list("aaaa")
        config.close_after = 0
        came = [of(number) for number in range(9, 15)]
        assert came.count("b") == 1
        late.partitions["x"] = texts(50)
        assert "".join(of(number) for number in range(15, 27)).count("b") >= 5
    finally:
        stop.set()
        thread.join()


def test_names_times_and_what_is_held_out_are_each_sources_own():
    source = several(new=Lists(x=[("now", 1000.0)]), old=Lists(x=texts(200, at=10.0)))
    rules = Rules(lateness=60.0, held_percent=20.0, unlearnt=frozenset({"old"}))
    first = read_window(source, Plan(0, (Interval("new/x", 0, 1),)), rules, {})
    second = read_window(source, Plan(1, (Interval("old/x", 0, 200),)), rules, first.latest)
    assert (first.source, second.source) == ("new", "old") == (first.summary()["source"], second.summary()["source"])
    assert second.latest == {"new": 1000.0, "old": 209.0}
    assert not second.late and not second.held and len(second.trained) == 200  # a time of another source is no measure
    assert {record.partition for record in second.trained} == {"old/x"}
    third = read_window(source, Plan(2, (Interval("old/x", 0, 200),)), rules, {"old": 500.0})
    assert len(third.late) == 200


def test_a_record_without_a_domain_has_its_sources_name(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n{broken\n')
    config = JobConfig(
        stream=StreamConfig(
            sources=[
                StreamSourceConfig(str(tmp_path / "a.txt"), name="lasting"),
                StreamSourceConfig(str(tmp_path / "b.jsonl"), column="body", name="mood", levels=[]),
            ],
            settle_after=0,
        )
    )
    source = open_stream(config)
    read = {}
    for partition, end in source.ends({}).items():
        read[partition] = list(source.read(Interval(partition, source.begins(partition), end)))
    (one,), (two, broken) = read[f"lasting/{tmp_path}/a.txt"], read[f"mood/{tmp_path}/b.jsonl"]
    assert (one.text, one.domain, two.text, two.domain) == ("one\n", "lasting", "two", "mood")
    assert broken.partition == two.partition and broken.reason.startswith("no JSON")
    assert not source.ended({}) and source.cut(Interval(two.partition, 0, broken.end), 1) == (broken.offset, 3)


FIVE = "stream.sources=[{source: embedded:five-domains, name: lasting}, {source: 'python:builtins:hex', %s}]"


def test_the_job_of_several_sources(caplog, monkeypatch):
    config = load("jobs/five-domains.yaml", [FIVE % "levels: []"], streamed=True)
    assert config.stream.policies == {"lasting": None, "hex": []}
    assert "data.source is not used: stream.sources takes its place" in caplog.text
    assert from_yaml(to_yaml(config)) == config
    config.stream.sources[1].source = "texts/a"
    assert complete(config).stream.sources[1].source.endswith("/texts/a") != "texts/a"
    config.stream.sources[1].source = "kafka://here/topic"
    assert [_begin(config, name) for name in ("lasting/0", "hex/0")] == [0, None]
    single = partial(_begin, JobConfig())
    assert single("0") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stream.sources=[]"], "stream.sources: got an empty list, needs at least one source, for example"),
        (["stream.sources=[{source: a}, {source: b/a}]"], "stream.sources.1.name: 'a' is the name of stream.sources.0"),
        (["stream.sources=[{source: a, name: b/c}]"], "stream.sources.0.name: got 'b/c', needs letters"),
        (["stream.sources=[{name: a}]"], "stream.sources.0.source: is missing"),
        (["stream.sources=[{source: no/such/folder}]"], "no/such/folder does not exist"),
        (["stream.sources=[{source: embedded:english}]"], "stream.sources.0.source: got embedded:english, which ends"),
        (
            [FIVE % "levels: [slow]"],
            "stream.sources.1.levels: there is no level 'slow'; there are level1, ",
        ),
        ([FIVE % "levels: 3"], "stream.sources.1.levels: got 3, needs a list of texts or null"),
        ([FIVE % "weight: 3"], "stream.sources.1.weight: unknown key"),
        (
            [FIVE % "levels: [level1]", "model.level_variant=nested"],
            "with model.level_variant=nested a level is reset to what slower ones have learnt; needs all of level1, ",
        ),
        ([FIVE % "levels: []", "data.mix=[{source: embedded:english}]"], "data.mix: a stream reads its sources in"),
    ],
)
def test_sources_that_cannot_be(changes, message):
    with pytest.raises(ConfigError) as error:
        load("jobs/five-domains.yaml", changes, streamed=True)
    assert message in str(error.value)

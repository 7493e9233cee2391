"""What waits for MLflow on disk: order, positions, and what a kill leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nestling.tracking import outbox as outbox_module
from nestling.tracking.files import Locked
from nestling.tracking.outbox import Outbox, Row, is_waiting


def put(place: Path, *steps: int) -> None:
    outbox = Outbox(place, 0)
    for step in steps:
        outbox.put_metrics({"loss": step / 2}, step)
    outbox.close()


def waiting(place: Path) -> list[int]:
    outbox = Outbox(place, 0)
    entries, _ = outbox.next(1_000_000)
    outbox.close()
    return [entry["step"] for entry in entries]


def test_entries_come_in_order_and_in_groups(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, 0)
    for step in (1, 2, 3):
        outbox.put_metrics({"a": 1.0, "b (x)": 2.0}, step)
    outbox.put_checkpoint(3, "file:///3", {"a": 1.0})
    outbox.put_forgotten(1)
    outbox.put_metrics({"a": 1.0}, 4)
    groups = []
    while not outbox.empty:
        entries, end = outbox.next(3)
        groups.append([{key: value for key, value in entry.items() if key != "time"} for entry in entries])
        outbox.done(end, {})
    assert groups == [
        [{"metrics": {"a": 1.0, "b _x_": 2.0}, "step": 1}, {"metrics": {"a": 1.0, "b _x_": 2.0}, "step": 2}],
        [{"metrics": {"a": 1.0, "b _x_": 2.0}, "step": 3}],
        [{"checkpoint": "file:///3", "step": 3, "metrics": {"a": 1.0}}],
        [{"forget": 1}],
        [{"metrics": {"a": 1.0}, "step": 4}],
    ]
    assert outbox.next(3)[0] == [] and not is_waiting(tmp_path)


def test_a_step_of_a_metric_is_taken_once_whoever_puts_it(tmp_path: Path) -> None:
    put(tmp_path, 1, 2, 3, 2)
    put(tmp_path, 3, 2, 4)
    outbox = Outbox(tmp_path, 0)
    entries, end = outbox.next(100)
    outbox.done(end, {"loss": Row(4, entries[-1]["time"], 2.0)})
    outbox.close()
    put(tmp_path, 4, 5)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4] and waiting(tmp_path) == [5]


def test_times_rise_although_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    put(tmp_path, 2, 3)
    times = [json.loads(line)["time"] for line in (tmp_path / "queue.jsonl").read_text().splitlines()]
    assert times == sorted(set(times)) and times[-1] - times[0] == 2


def test_half_an_entry_is_cut_off(tmp_path: Path) -> None:
    put(tmp_path, 1, 2)
    with (tmp_path / "queue.jsonl").open("a") as file:
        file.write('{"metrics": {"loss"')
    put(tmp_path, 3)
    assert waiting(tmp_path) == [1, 2, 3]


def test_what_was_delivered_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "_COMPACT", 100)
    queue, position = tmp_path / "queue.jsonl", tmp_path / "position.json"
    put(tmp_path, 1, 2, 3)
    outbox = Outbox(tmp_path, 0)
    entries, end = outbox.next(100)
    outbox.put_metrics({"loss": 2.0}, 4)
    outbox.done(end, {"loss": Row(3, 1, 1.5)})
    before = position.read_bytes()
    assert queue.stat().st_size > 100  # there is still something in it
    outbox.done(outbox.next(100)[1], {"loss": Row(4, 2, 2.0)})
    assert queue.stat().st_size == 0 and not is_waiting(tmp_path)
    outbox.put_metrics({"loss": 2.5}, 5)
    outbox.put_metrics({"loss": 0.5}, 1)  # known although its entry is gone
    outbox.close()
    assert waiting(tmp_path) == [5]
    queue.write_bytes(b"")
    position.write_bytes(before)  # killed between emptying the file and noting it
    put(tmp_path, 6)
    assert waiting(tmp_path) == [6]


def test_one_process_at_a_time_has_it(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, 0)
    with pytest.raises(Locked, match=r"process \d+ on "):
        Outbox(tmp_path, 0.2)
    outbox.close()
    Outbox(tmp_path, 0).close()

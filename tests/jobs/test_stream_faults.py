"""A stream loses nothing: whatever is killed, weights, losses and ledger are those of a run that nothing happened to.

Every fault is real: a signal to a real process, a file changed on disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.jobs import streams
from tests.jobs.in_process import nestling, result
from tests.jobs.streams import JOB, STEPS, head, in_mlflow, lines, outcome, readers, resumed, truncate_newest, verified
from tests.jobs.test_faults import Run, events

from nestling.checkpoint import Piece, Saver, Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of 200 bytes, every twentieth of them broken."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("a", "b"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(150):
                good = json.dumps({"text": f"{name} record {number}: " + f"{number * 7919 % 1000} words " * 14})
                file.write((good if number % 20 != 13 else "{broken") + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def job(texts: Path, *more: str, **settings: Any) -> list[str]:
    """A stream of two sources: what a.jsonl holds is to last, what b.jsonl holds may write one level only."""
    lasting, mood = f"source: {texts}/a.jsonl, name: lasting", f"source: {texts}/b.jsonl, name: mood, levels: [level1]"
    return streams.job(texts, f"stream.sources=[{{{lasting}}}, {{{mood}}}]", *more, **settings)


def begin(runs: Path, texts: Path, *more: str, **settings: Any) -> Run:
    """The same in a process of its own."""
    return Run(runs, "stream", *job(texts, *more, **settings))


@pytest.fixture(scope="module")
def whole(ray_local: None, runs: Path, texts: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and outcome of a stream that nothing happened to; the others have fewer snapshots."""
    summary = result(runs, "stream", *job(texts, "training.checkpoint_every=2", "checkpoint.keep=100"))
    assert summary["status"] == "finished" and summary["steps"] == STEPS
    folder = Path(summary["run_dir"])
    found = outcome(folder)
    assert len(found["losses"]) == STEPS
    begun = f'"window_id": {summary["windows"]},'  # a window that the last step has left unfinished
    letters = found["letters"].splitlines()
    assert summary["dead_letters"] == sum(begun not in letter for letter in letters)
    proof = verified(runs, folder)
    assert (proof["gaps"], proof["overlaps"], proof["dead_letters"]) == (0, 0, summary["dead_letters"])
    assert proof["records"] == summary["records"] > 60 and summary["dead_letters"] >= 3
    first = json.loads(found["letters"].splitlines()[0])
    assert first["reason"].startswith("no JSON") and first["sha256"] == hashlib.sha256(b"{broken\n").hexdigest()
    assert (first["source"], first["partition"]) == ("lasting", f"lasting/{texts}/a.jsonl")
    return folder, found


@pytest.fixture(scope="module")
def undisturbed(whole: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return whole[1]


def test_a_mood_leaves_no_trace_in_levels_that_it_may_not_write(whole: tuple[Path, dict[str, Any]]) -> None:
    """Weights and optimizer state of each level, in two snapshots within one window."""
    from nestling.config import from_yaml
    from nestling.training.groups import level_members

    folder, found = whole
    sources = {line["window_id"]: line["source"] for line in found["ledger"]}
    assert list(sources.values())[:5] == ["lasting", "mood", "lasting", "mood", "lasting"]
    members = level_members(from_yaml((folder / "config.yaml").read_text()))
    level_of = {name: level for level, names in members.items() for name in names}
    store = Store(folder / "checkpoints")

    def kept(checkpoint: Any) -> tuple[int, dict[str, Any]]:
        """The window that a snapshot lies in, and all that it holds of each level."""
        saved = store.open(checkpoint)
        state = json.loads(saved.documents["state.json"])
        held: dict[str, Any] = {level: [state["optimizer"][name] for name in members[level]] for level in members}
        for name, size in saved.pieces.sizes.items():
            if level := level_of.get(name.partition("/")[2]):
                held[level].append((name, saved.pieces.read(name, 0, size).numpy().tobytes()))
        return state["stream"]["position"]["window"], held

    changed: dict[str, set[str]] = {"lasting": set(), "mood": set()}
    for (window, after), (earlier, before) in pairwise(map(kept, store.checkpoints())):  # the newest first
        if window == earlier and window in sources:
            changed[sources[window]] |= {level for level in members if after[level] != before[level]}
    assert changed == {"lasting": {"level1", "level2", "base"}, "mood": {"level1"}}


def test_the_reader_a_worker_and_the_head_of_ray_are_killed(
    runs: Path, texts: Path, undisturbed: dict[str, Any]
) -> None:
    run = begin(runs, texts)
    folder = run.reaches(12)
    (reader,) = readers(run)
    reader.kill()
    run.until(lambda: len(events(folder, "resumed")) == 1)
    run.reaches(24)
    run.workers()[0].kill()
    killed = time.monotonic()
    run.until(lambda: len(events(folder, "resumed")) == 2)
    assert time.monotonic() - killed < 45
    run.reaches(36)
    workers = run.workers()
    head(run).kill()
    code, _, said = run.ended()
    assert code != 0, said
    psutil.wait_procs(workers, timeout=60)
    result(runs, "stream", "--resume", json.loads((folder / "run.json").read_text())["run_id"])
    assert outcome(folder) == undisturbed
    verified(runs, folder)


def test_an_interrupted_stream_a_killed_driver_and_a_truncated_snapshot(
    runs: Path, texts: Path, undisturbed: dict[str, Any]
) -> None:
    run = begin(runs, texts)
    folder = run.reaches(13)
    run.process.send_signal(signal.SIGTERM)
    code, summary, said = run.ended()
    assert (code, summary["status"]) == (130, "interrupted"), said
    run, log = resumed(runs, folder), folder / "log.jsonl"
    run.until(lambda: log.read_bytes().count(b"\n") >= min(summary["steps"] + 12, STEPS - 12))
    run.kill()
    truncate_newest(folder)
    result(runs, "stream", "--resume", summary["run_id"])
    (damaged,) = events(folder, "damaged")
    assert "a checkpoint is damaged, so the one before it is used" in damaged["message"]
    assert outcome(folder) == undisturbed
    verified(runs, folder)


def test_without_the_accumulators_it_is_another_run(
    runs: Path, whole: tuple[Path, dict[str, Any]], undisturbed: dict[str, Any]
) -> None:
    """The negative control: what the snapshot holds of half-filled accumulators is what makes runs equal."""
    folder, run_id = whole[0], json.loads((whole[0] / "run.json").read_text())["run_id"]
    for zeroed in (False, True):
        result(runs, "snapshot", "restore", run_id, "--step", "26")
        if zeroed:
            zero_accumulators(Store(folder / "checkpoints"))
        result(runs, "stream", "--resume", run_id)
        found = outcome(folder)
        assert (found == undisturbed) is not zeroed
    assert found["weights"] != undisturbed["weights"] and found["losses"] != undisturbed["losses"]
    assert max(abs(a[1] - b[1]) for a, b in zip(found["losses"], undisturbed["losses"], strict=True)) < 0.1


def zero_accumulators(store: Store) -> None:
    """Save the newest snapshot again with empty accumulators and a right manifest."""
    newest = store.checkpoints()[0]
    found = store.open(newest)
    pieces = []
    for name, size in found.pieces.sizes.items():
        data = found.pieces.read(name, 0, size)
        pieces.append(Piece(name, 0, torch.zeros_like(data) if name.startswith("accumulator/") else data.clone()))
    assert any(name.startswith("accumulator/") for name in found.pieces.sizes)
    shutil.rmtree(store.location(newest))
    saver = Saver(store, 0, 1, 100, 0, lambda *_: None, lambda *_: None)
    saver.write(newest.step, "other", pieces, found.documents)
    saver.commit()
    assert saver.wait()


def test_two_workers_learn_the_same_batches(runs: Path, texts: Path, undisturbed: dict[str, Any]) -> None:
    found = outcome(Path(result(runs, "stream", *job(texts, workers=2))["run_dir"]))
    ours = [{**line, "preq_loss": None} for line in found["ledger"]]
    assert ours == [{**line, "preq_loss": None} for line in undisturbed["ledger"]]
    for one, two in list(zip(undisturbed["losses"], found["losses"], strict=True))[:50]:
        assert two[1] == pytest.approx(one[1], rel=1e-5)


def test_too_many_broken_records_stop_the_stream(ray_local: None, runs: Path, texts: Path) -> None:
    code, summary, said = nestling(runs, "stream", *job(texts, "stream.dead_share=0.01", "stream.window_bytes=20000"))
    assert code == 1 and summary["status"] == "failed"
    assert "records are broken, more than stream.dead_share=0.01 allows; the first stands in" in said
    assert not (Path(summary["run_dir"]) / "log.jsonl").read_text()


def test_a_window_of_garbage_is_undone_and_a_new_domain_is_not(ray_local: None, runs: Path) -> None:
    """Random bytes leave no trace: the weights are, to the bit, those of a stream that they never came to."""
    guard = ["stream.guard=true", "stream.probe_percent=20", "stream.probe_every=8", "stream.domain_column=domain"]
    small = ["training.batch_tokens=512", "stream.window_bytes=20000", "training.learning_rate=0.01"]
    found = {}
    for name in ("clean", "noisy"):
        source = f"data.source=python:tests.jobs.garbage:{name}"
        arguments = ("stream", "jobs/five-domains.yaml", *JOB, *guard, *small, source, "training.steps=null")
        folder = found[name] = Path(result(runs, *arguments)["run_dir"])
        proof = verified(runs, folder)
        assert proof["records"] == (200 if name == "clean" else 240)
    assert not events(found["clean"], "rolled-back")
    assert not (found["clean"] / "undone.jsonl").read_text()
    undone = [json.loads(line) for line in (found["noisy"] / "undone.jsonl").read_text().splitlines()]
    marked = [json.loads(line) for line in (found["noisy"] / "ledger.jsonl").read_text().splitlines()]
    assert [line["window_id"] for line in undone] == [line["window_id"] for line in marked if line.get("undone")] == [3]
    assert [(place["start"], place["end"]) for place in undone[0]["intervals"]] == [(120, 160)]
    assert "the loss on the probes rose by" in undone[0]["reason"]
    assert outcome(found["noisy"])["weights"] == outcome(found["clean"])["weights"]
    (back,) = events(found["noisy"], "rolled-back")
    assert ("rolled-back", back["step"], 3) in in_mlflow(found["noisy"])
    steps = [int(number) for number in re.findall(r"from step (\d+) back to (\d+)", back["message"])[0]]
    assert steps[0] - steps[1] >= 30
    records = lines(found["noisy"] / "log.jsonl")
    assert records[-1]["stream/rollbacks"] == 1
    # What is held out of the English that went before, and goes on behind the noise.
    name = "probe/english/bits_per_byte"
    before = [record[name] for record in records if name in record and record["step"] <= back["step"]]
    after = [record[name] for record in records if name in record and record["step"] > back["step"]]
    assert after[0] - before[-1] <= 0.05


def test_nothing_of_a_clean_stream_is_undone(ray_local: None, runs: Path) -> None:
    """Four legal changes of domain, which damage the probes by up to 1 b/B."""
    small = ["model.name=transformer", "model.width=32", "model.layers=1", "levels=[]", "training.learning_rate=0.003"]
    settings = [*small, "data.sequence_length=128", "stream.guard=true"]
    summary = result(runs, "stream", "jobs/five-domains.yaml", *settings)
    assert (summary["status"], summary["windows"]) == ("finished", 27)
    assert not (Path(summary["run_dir"]) / "undone.jsonl").read_text()


def test_a_topic_is_learnt(runs: Path) -> None:
    """Over the real protocol, from librdkafka's own broker; late and broken messages with it."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = producer.list_topics(timeout=10).brokers.values()
    for number in range(60):
        content = json.dumps({"text": f"message {number} " * 20}) if number != 30 else "{broken"
        at = 1_000_000 + 1000 * (number if number < 55 else 0)  # the last five are an hour late
        producer.produce("news", content, partition=number % 2, timestamp=at + (3_600_000 if number < 55 else 0))
    producer.flush(10)
    run = Run(
        runs,
        *("stream", "jobs/five-domains.yaml", *JOB, f"data.source=kafka://{broker.host}:{broker.port}/news"),
        *("training.steps=null", "stream.close_after=1", "stream.probe_every=0", "stream.window_bytes=5000"),
        "stream.lateness=600",
    )
    folder = run.folder()
    run.until(lambda: sum(read_position(folder).values()) == 60)
    run.process.send_signal(signal.SIGTERM)
    code, summary, said = run.ended()
    assert (code, summary["status"]) == (130, "interrupted"), said
    proof = verified(runs, folder)
    assert (proof["records"], proof["dead_letters"]) == (60, 1)
    late = [json.loads(line) for line in (folder / "late.jsonl").read_text().splitlines()]
    assert sorted(line["text"].split()[1] for line in late) == ["55", "56", "57", "58", "59"]


def read_position(folder: Path) -> dict[str, int]:
    from nestling.tracking.files import read_json

    offsets: dict[str, int] = read_json(folder / "position.json").get("offsets", {})
    return offsets


def test_a_stream_without_end_learns_what_comes_and_stops_when_told(runs: Path, texts: Path, tmp_path: Path) -> None:
    files = [tmp_path / file.name for file in texts.iterdir()]
    for file in files:
        file.write_bytes((texts / file.name).read_bytes())
    run = begin(runs, tmp_path, "stream.close_after=0.5", steps=None)
    folder = run.reaches(10)
    with files[0].open("a") as more:
        more.write(json.dumps({"text": "what came later " * 30}) + "\n")
    run.until(lambda: sum(read_position(folder).values()) == sum(file.stat().st_size for file in files))
    run.process.send_signal(signal.SIGTERM)
    code, summary, said = run.ended()
    assert (code, summary["status"]) == (130, "interrupted"), said
    assert verified(runs, folder)["records"] == 301

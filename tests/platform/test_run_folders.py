"""Run folders: made, listed, found, claimed by one driver, and watched while they are written."""

from __future__ import annotations

import fcntl
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.mlflow_server import wait_for

from nestling.tracking import RunBusyError, RunFolder, find_run, followed, list_runs
from nestling.tracking.files import cut_half_line


def test_a_new_folder_is_running_and_can_be_opened_again(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs", "quick-start.1")
    assert folder.path == tmp_path / "runs" / f"quick-start.1-{folder.run_id}"
    assert len(folder.run_id) == 8 and int(folder.run_id, 16) >= 0
    with folder.claim():
        info = folder.info()
    assert (info["run_id"], info["name"], info["status"]) == (folder.run_id, "quick-start.1", "running")
    assert RunFolder.open(folder.path) == folder


def test_a_run_without_its_driver_is_stopped(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    assert folder.status() == folder.info()["status"] == folder.reached()["status"] == "stopped"
    folder.update(steps=3)  # writes what it found, not what it showed
    with folder.claim():
        assert folder.status() == folder.reached()["status"] == "running"
    folder.update(status="interrupted")
    with folder.claim():
        assert folder.status() == "interrupted"


def test_a_run_has_one_driver_until_that_is_killed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    program = "import sys, time; from nestling.tracking import RunFolder\n"
    program += "with RunFolder.open(sys.argv[1]).claim(): print('mine', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, str(folder.path)], stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == b"mine\n"
        assert folder.status() == "running"
        said = rf"run {folder.run_id} \(a\) is being trained by process {driver.pid} on {socket.gethostname()}"
        with pytest.raises(RunBusyError, match=said), folder.claim():
            pass
        driver.kill()
    assert folder.status() == "stopped"
    with folder.claim():
        pass
    with folder.claim():
        assert folder.status() == "running"


def test_who_only_looks_does_not_get_in_the_way_of_a_claim(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    with (folder.path / "driver.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `status` does for a moment
        looking = threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN))
        looking.start()
        with folder.claim():
            assert folder.status() == "running"
        looking.join()


def test_events_are_lines_with_what_a_program_needs(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    folder.event("skipped", "the loss of step 7 was not finite", step=7)
    folder.event("resumed", "goes on at step 5", step=5)
    first, second = map(json.loads, folder.events.read_text().splitlines())
    assert first.items() >= {"kind": "skipped", "message": "the loss of step 7 was not finite", "step": 7}.items()
    assert first["time"] < second["time"] and second["kind"] == "resumed"


def record(folder: RunFolder, *steps: float) -> None:
    with folder.log.open("a") as file:
        file.writelines(json.dumps({"step": int(step), "loss": step}) + "\n" for step in steps)


def rewind(folder: RunFolder, step: int) -> None:
    draft = folder.log.with_name("draft")
    draft.write_text("".join(line for line in folder.log.open() if json.loads(line)["step"] <= step))
    draft.replace(folder.log)


def test_new_records_and_events_are_passed_on_through_rewinds(tmp_path: Path) -> None:
    folder, seen, events = RunFolder.create(tmp_path, "a"), [], []
    record(folder, 1, 2, 3)
    folder.event("old", "before")

    def on_record(record: dict[str, float]) -> None:
        seen.append(record["loss"])

    with followed(folder, on_record, lambda event: events.append(event["kind"])):
        rewind(folder, 2)  # to before the state at entry
        record(folder, 3.5, 4)
        assert wait_for(lambda: seen == [3.5, 4], 10)
        with folder.log.open("a") as file:
            file.write('{"step": 5, "lo')  # killed while writing; cut off by the next
        time.sleep(0.3)
        cut_half_line(folder.log)
        record(folder, 5, 6, 7)
        folder.event("new", "during")
        assert wait_for(lambda: seen == [3.5, 4, 5, 6, 7], 10)
        record(folder, 8)
        rewind(folder, 5)  # before 8 was seen
        record(folder, 6.5, 7.5, 8.5, 9.5)
    assert seen == [3.5, 4, 5, 6, 7, 8, 6.5, 7.5, 8.5, 9.5]
    assert events == ["new"]


def test_a_log_is_cut_behind_a_step(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "small")
    folder.log.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)))
    folder.cut_log(4)
    assert [record["step"] for record in folder.records()] == [2, 4]
    assert not list(folder.path.glob("*.tmp"))


def test_the_last_records_are_passed_on_before_the_end(tmp_path: Path) -> None:
    folder, seen = RunFolder.create(tmp_path, "a"), []
    with followed(folder, lambda record: seen.append(record["step"])):
        record(folder, *range(1000))
    assert seen == list(range(1000))


@pytest.mark.parametrize(
    ("content", "left"),
    [
        (b"", b""),
        (b"one\n", b"one\n"),
        (b"one\ntw", b"one\n"),
        (b"on", b""),
        (b"one\n" + b"x" * 200_000, b"one\n"),
        (b"y" * 100_000 + b"\n" + b"x" * 65_535, b"y" * 100_000 + b"\n"),
    ],
)
def test_half_lines_are_cut_off(tmp_path: Path, content: bytes, left: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(content)
    cut_half_line(path)
    assert path.read_bytes() == left


def test_update_merges_and_leaves_no_draft(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    folder.update(steps=10, train_loss=1.5)
    assert "finished" not in folder.info()
    folder.update(status="failed", error="it broke")
    info = folder.info()
    assert (info["steps"], info["train_loss"], info["status"], info["error"]) == (10, 1.5, "failed", "it broke")
    assert info["started"] < info["finished"]
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "latest", "two words"])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"run\.name: (got .*, needs letters|'latest' stands for)"):
        RunFolder.create(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_how_far_an_unfinished_run_came_stands_in_its_log(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    assert folder.reached() == folder.info() | {"steps": None, "tokens": None, "train_loss": None}
    records = [{"step": 10, "train/loss": 2.5, "train/tokens": 640.0}, {"step": 12, "heldout/loss": 2.25}]
    folder.log.write_text("".join(json.dumps(record) + "\n" for record in records))
    reached = folder.reached()
    assert (reached["steps"], reached["tokens"], reached["train_loss"]) == (12, 640, 2.5)
    assert isinstance(reached["tokens"], int)
    folder.update(steps=20, tokens=1280)
    assert folder.reached() == folder.info()


def test_runs_are_listed_newest_last_and_strangers_left_out(tmp_path: Path) -> None:
    folders = [RunFolder.create(tmp_path, name) for name in ("z", "m", "a")]
    (tmp_path / "mlartifacts").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert list_runs(tmp_path) == folders
    assert list_runs(tmp_path / "nowhere") == []


def test_a_run_is_found_by_id_beginning_name_and_latest(tmp_path: Path) -> None:
    for run_id, name in (("aabb0011", "first"), ("aabc0022", "twice"), ("ddee0033", "twice")):
        folder = RunFolder(tmp_path / f"{name}-{run_id}", run_id, name)
        folder.path.mkdir()
        folder.update(run_id=run_id, name=name, started=run_id)
    assert find_run(tmp_path, "aabb0011").run_id == "aabb0011"
    assert find_run(tmp_path, "d").run_id == "ddee0033"
    assert find_run(tmp_path, "twice").run_id == "ddee0033"
    assert find_run(tmp_path, "latest").run_id == "ddee0033"
    with pytest.raises(
        LookupError, match=r"'aab' is the beginning of 2 run ids: aabb0011 \(first\), aabc0022 \(twice\)"
    ):
        find_run(tmp_path, "aab")
    with pytest.raises(LookupError, match=r"no run 'frist' .* did you mean first\?.* ddee0033 \(twice\)"):
        find_run(tmp_path, "frist")
    with pytest.raises(LookupError, match="no run ''"):
        find_run(tmp_path, "")


def test_finding_without_any_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"no runs in .*nestling train.*NESTLING_RUNS"):
        find_run(tmp_path / "runs", "latest")

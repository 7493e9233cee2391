"""Several ranks save one checkpoint: it is committed whole, or the one before it stays and the reason is told."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from nestling.checkpoint import Checkpoint, Piece, Saver, Store
from nestling.checkpoint import saver as saver_module

WEIGHT = torch.arange(3000).float()


class Ranks:
    """Three savers in one process, and what rank 0's callbacks were told."""

    def __init__(self, place: str | Path, scratch: Path, keep: int = 9, keep_best: int = 0) -> None:
        self.store = Store(place, scratch)
        self.committed: list[tuple[int, list[int]]] = []
        self.failures: list[tuple[int, str]] = []
        self.savers = [
            Saver(Store(place, scratch), rank, 3, keep, keep_best, self._on_commit, self._on_failure)
            for rank in range(3)
        ]

    def _on_commit(self, checkpoint: Checkpoint, removed: list[Checkpoint]) -> None:
        self.committed.append((checkpoint.step, [checkpoint.step for checkpoint in removed]))

    def _on_failure(self, step: int, reason: str) -> None:
        self.failures.append((step, reason))

    def write(self, step: int, token: str, ranks: Sequence[int] = (0, 1, 2)) -> None:
        """Each rank's third of the weight, which is raised by the step, and a document of each."""
        for rank in ranks:
            piece = Piece("weight", 1000 * rank, (WEIGHT + step)[1000 * rank :][:1000])
            self.savers[rank].write(step, token, [piece], {f"random-{rank}.json": "{}"})

    def commit(self, metric: float | None = None) -> list[bool]:
        for saver in self.savers:
            saver.commit(metric)
        return [saver.wait() for saver in self.savers]

    def newest_is(self, step: int) -> bool:
        """Whether the newest checkpoint is whole, and this step's."""
        newest = self.store.checkpoints()[0]
        weight = self.store.open(newest).pieces.read("weight")
        return newest.step == step and not self.store.problems(newest) and torch.equal(weight, WEIGHT + step)


@pytest.fixture
def ranks(place: str, tmp_path: Path) -> Ranks:
    return Ranks(place, tmp_path / "scratch")


def test_all_ranks_make_one_checkpoint_and_old_ones_go(place: str, tmp_path: Path) -> None:
    ranks = Ranks(place, tmp_path / "scratch", keep=1, keep_best=1)
    for step, metric in ((1, 2.0), (2, 3.0), (3, None)):
        ranks.write(step, f"token{step}")
        assert ranks.commit(metric) == [True] * 3
    assert ranks.committed == [(1, []), (2, []), (3, [2])] and not ranks.failures
    assert ranks.newest_is(3)
    assert ranks.store.open(ranks.store.checkpoints()[0]).documents.keys() == {
        f"random-{rank}.json" for rank in range(3)
    }
    work = "upload" if "s3" in place else "sync"
    for saver in ranks.savers:
        assert saver.stages.keys() == {"write", "hash", "sync", "upload", "commit"}
        assert all((saver.stages[stage] > 0) == (stage in ("write", "hash", work)) for stage in list(saver.stages)[:-1])
    assert ranks.savers[0].stages["commit"] > 0
    assert not list((tmp_path / "scratch").glob(".step-*"))


def test_tensors_may_change_once_they_are_written(ranks: Ranks) -> None:
    weight = WEIGHT + 5
    for rank, saver in enumerate(ranks.savers):
        saver.write(5, "token", [Piece("weight", 1000 * rank, weight[1000 * rank :][:1000])], {})
    weight.zero_()
    ranks.commit()
    assert ranks.newest_is(5)


def test_every_file_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        events.append("renamed")

    ranks = Ranks(tmp_path / "place", tmp_path)
    ranks.write(1, "token")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    assert ranks.commit() == [True] * 3
    at = events.index("renamed")
    assert {f"rank-0000{rank}.safetensors" for rank in range(3)} | {"random-0.json"} < set(events[:at])
    assert events[at - 2 : at + 2] == ["manifest.json", ".step-00000001.token", "renamed", "place"]


def test_a_rename_that_fails_leaves_the_checkpoint_that_it_was_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path, tmp_path)
    ranks.write(1, "first")
    ranks.commit()
    rename = os.rename

    def refused(source: Path, target: Path) -> None:
        if Path(source).name == ".step-00000001.second":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    ranks.write(1, "second")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        assert not ranks.commit()[0]
    assert "Input/output error" in ranks.failures[0][1]
    assert ranks.newest_is(1) and os.listdir(tmp_path) == ["step-00000001"]


def test_a_full_disk_is_an_error_and_the_next_attempt_succeeds(ranks: Ranks) -> None:
    ranks.write(1, "first")
    ranks.commit()
    draft = ranks.store.draft(2, "second").folder
    draft.mkdir(parents=True)
    (draft / "rank-00001.safetensors").symlink_to("/dev/full")  # the kernel's own: every write to it finds no space
    ranks.write(2, "second", ranks=[0, 2])
    with pytest.raises(OSError) as info:
        ranks.write(2, "second", ranks=[1])
    assert info.value.errno == errno.ENOSPC
    for saver in ranks.savers:
        saver.abandon()
    assert not draft.exists() and ranks.newest_is(1)
    ranks.write(2, "third")
    assert ranks.commit() == [True] * 3
    assert ranks.newest_is(2) and not ranks.failures


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(file: Path) -> None:
    """Write until nothing is left of the disk."""
    with pytest.raises(OSError, match="No space left"), file.open("ab", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def test_a_disk_that_fills_up_before_the_commit_is_told(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "PATIENCE", 20.0)
    ranks = Ranks(small_disk, tmp_path)
    ranks.write(1, "first")
    ranks.commit()
    ranks.write(2, "second")
    fill(small_disk / "filler")
    assert not ranks.commit()[0]
    assert ranks.savers[0].stages["commit"] < 10  # nobody waited for a receipt that could not be written
    ((step, reason),) = ranks.failures
    assert step == 2 and re.search(r"rank [12]: OSError: \[Errno 28\] No space left on device", reason)
    assert ranks.newest_is(1) and sorted(os.listdir(small_disk)) == ["filler", "step-00000001"]
    fill(small_disk / "filler")
    with pytest.raises(OSError, match="No space left"):
        ranks.write(3, "third")
    for saver in ranks.savers:
        saver.abandon()
    (small_disk / "filler").unlink()
    ranks.write(3, "fourth")
    assert ranks.commit() == [True] * 3 and ranks.newest_is(3)


def test_a_share_that_cannot_be_delivered_fails_the_save(ranks: Ranks) -> None:
    ranks.write(1, "first")
    ranks.commit()
    ranks.write(2, "second")
    (ranks.store.draft(2, "second").folder / "rank-00001.safetensors").unlink()
    assert ranks.commit() == [False, False, True]
    ((step, reason),) = ranks.failures
    assert step == 2 and reason.startswith("rank 1: FileNotFoundError: ") and "rank 2" not in reason
    assert ranks.newest_is(1)
    ranks.write(2, "third")
    assert ranks.commit() == [True] * 3 and ranks.newest_is(2)


def test_a_rank_that_never_reports_is_named(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "PATIENCE", 0.5)
    ranks.write(1, "first")
    for saver in ranks.savers[:2]:
        saver.commit()
    assert not ranks.savers[0].wait()
    assert "nothing was heard from rank 2 for 0 seconds; all nodes must see the same folder" in ranks.failures[0][1]
    assert ranks.store.checkpoints() == []


def test_documents_have_names_of_their_own(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, tmp_path)
    for name in ("../state.json", "manifest.json", "x.safetensors", ".hidden", ""):
        with pytest.raises(ValueError, match="a checkpoint cannot hold a document"):
            ranks.savers[0].write(1, "token", [], {name: "{}"})
    for saver in ranks.savers:
        saver.write(1, "token", [], {"state.json": "{}"})
    assert not ranks.commit()[0] and ranks.store.checkpoints() == []
    assert ranks.failures == [(1, "two ranks wrote a document of the same name")]


def test_commit_needs_something_written(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="call write before commit"):
        ranks.savers[0].commit()
    assert not ranks.savers[0].wait()


def test_a_failing_callback_does_not_undo_the_save(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("MLflow is away")

    ranks.savers[0]._on_commit = ranks.savers[0]._on_failure = fail
    with caplog.at_level(logging.ERROR):
        ranks.write(1, "first")
        assert ranks.commit() == [True] * 3 and ranks.newest_is(1)
        for saver in ranks.savers:
            saver.write(2, "second", [], {"same.json": ""})
        assert ranks.commit()[0] is False and ranks.newest_is(1)
    assert caplog.text.count("RuntimeError: MLflow is away") == 2


def test_an_unreachable_bucket_is_told_without_credentials(
    s3_options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "GRACE", 0.5)
    ranks = Ranks(f"s3://KEY:SECRET@no-such-bucket/x?{s3_options}", tmp_path)
    ranks.write(1, "first")
    assert not ranks.commit()[0]
    ((step, reason),) = ranks.failures
    assert step == 1 and "no-such-bucket" in reason and "SECRET" not in reason
    assert not list(tmp_path.iterdir())


PROCESS = """
import sys
import torch
from nestling.checkpoint import Piece, Saver, Store

place, rank, step, token = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
told = lambda *what: print("told", what, file=sys.stderr)
saver = Saver(Store(place), rank, 2, 9, 0, told, told)
saver.write(step, token, [Piece("weight", 50 * rank, torch.full((50,), float(step)))], {})
saver.commit()
print("committing", flush=True)
sys.exit(not saver.wait())
"""


def start(place: Path, rank: int, step: int, token: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, place, str(rank), str(step), token]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_save_together_and_one_killed_in_the_middle_leaves_a_draft(tmp_path: Path) -> None:
    processes = [start(tmp_path, rank, 1, "first") for rank in (1, 0)]
    for process in processes:
        assert process.communicate()[1].count("told") == (process is processes[1]) and process.returncode == 0
    killed = start(tmp_path, 0, 2, "second")  # waits for the receipt of a rank 1 that never comes
    assert killed.stdout and killed.stdout.readline() == "committing\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    store = Store(tmp_path)
    (checkpoint,) = store.checkpoints()
    assert checkpoint.step == 1 and store.problems(checkpoint) == []
    assert torch.equal(store.open(checkpoint).pieces.read("weight"), torch.ones(100))
    assert sorted(os.listdir(tmp_path)) == [".step-00000002.second", "step-00000001"]
    store.clear_drafts()
    assert os.listdir(tmp_path) == ["step-00000001"]

"""Checkpoints on disk and in an S3 store: whole or named as damaged, and never more of them than asked for."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pyarrow.fs import FileSelector, FileSystem, FileType

from nestling.checkpoint import Checkpoint, CheckpointError, Piece, Saver, Store
from nestling.checkpoint.manifest import dump, new_checkpoint

WEIGHT = torch.arange(1000).float()


@pytest.fixture
def store(place: str, tmp_path: Path) -> Store:
    return Store(place, tmp_path / "scratch")


def save(store: Store, step: int, metric: float | None = None, token: str = "a", offset: float = 0.0) -> Checkpoint:
    """A checkpoint of two ranks that each hold half of the weight."""
    committed: list[Checkpoint] = []
    ranks = [
        Saver(
            store, rank, 2, 99, 0, lambda checkpoint, _: committed.append(checkpoint), lambda _, reason: print(reason)
        )
        for rank in range(2)
    ]
    for rank, saver in enumerate(ranks):
        piece = Piece("weight", 500 * rank, WEIGHT[500 * rank :][:500] + offset)
        saver.write(step, token, [piece], {"state.json": json.dumps({"step": step})} if rank == 0 else {})
    for saver in ranks:
        saver.commit(metric)
    assert all([saver.wait() for saver in ranks])
    return committed[0]


def steps(store: Store) -> list[int]:
    return [checkpoint.step for checkpoint in store.checkpoints()]


def all_files(place: str) -> set[str]:
    """Everything that lies there, by path."""
    files, root = FileSystem.from_uri(place)
    found = files.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    return {info.path.removeprefix(root + "/") for info in found if info.type == FileType.File}


def change(place: str, path: str, edit: Callable[[bytes], bytes] | None) -> None:
    """Put other bytes into a file; None deletes it."""
    files, root = FileSystem.from_uri(place)
    if edit is None:
        files.delete_file(f"{root}/{path}")
        return
    with files.open_input_stream(f"{root}/{path}") as stream:
        data = stream.read()
    with files.open_output_stream(f"{root}/{path}") as stream:
        stream.write(edit(data))


def test_what_was_saved_comes_back(place: str, store: Store, tmp_path: Path) -> None:
    assert store.checkpoints() == []
    save(store, 9)
    saved = save(store, 120, metric=2.5)
    assert (saved.step, saved.name, saved.metric) == (120, "step-00000120", 2.5)
    again = Store(place, tmp_path / "another")
    assert again.checkpoints() == [saved, *store.checkpoints()[1:]] and steps(again) == [120, 9]
    opened = again.open(saved)
    assert opened.documents == {"state.json": '{"step": 120}'}
    assert torch.equal(opened.pieces.read("weight"), WEIGHT)
    assert torch.equal(opened.pieces.read("weight", 400, 200), WEIGHT[400:600])
    assert again.problems(saved) == []
    assert len(all_files(place)) == 2 * (1 + 1 + 2)  # manifest, document, shards: no receipt or draft is left


def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(
    ("file", "edit", "reason"),
    [
        ("rank-00001.safetensors", lambda data: data[:-1], r"has \d+ bytes; \d+ were written"),
        ("rank-00001.safetensors", lambda data: data + b" ", r"has \d+ bytes; \d+ were written"),
        ("rank-00001.safetensors", flip, "was altered: its SHA-256 is"),
        ("rank-00001.safetensors", None, "is missing"),
        ("state.json", lambda data: data.replace(b"120", b"121"), "was altered: its SHA-256 is"),
        ("state.json", None, "is missing"),
    ],
    ids=["truncated", "extended", "flipped", "missing", "altered-document", "missing-document"],
)
def test_a_damaged_file_is_named(
    place: str, store: Store, file: str, edit: Callable[[bytes], bytes] | None, reason: str
) -> None:
    save(store, 60)
    damaged = save(store, 120)
    (path,) = [path for path in damaged.files if path.endswith(file)]
    change(place, f"{damaged.name}/{path}", edit)
    (text,) = store.problems(damaged)
    assert text.startswith(f"{store.location(damaged)}/{path} ")
    assert re.search(reason, text)
    shares = [store.problems(damaged, rank, 3) for rank in range(3)]
    assert sum(shares, []) == [text]
    if "s3" in place or "state" in file:
        with pytest.raises(CheckpointError, match=reason):
            store.open(damaged)
    assert store.problems(store.checkpoints()[1]) == []


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda data: data[: len(data) // 2], "Unterminated|Expecting|delimiter"),
        (lambda data: data.replace(b"2.5", b"1.5"), "it was altered: its SHA-256"),
        (lambda data: b"[]", "it is not a checkpoint's manifest"),
        (lambda data: b"\xff\xfe\xfd", "codec can't decode|Expecting"),
        (None, "is missing"),
    ],
    ids=["half", "altered", "other", "binary", "missing"],
)
def test_a_damaged_manifest_is_named_and_the_checkpoint_before_it_is_the_newest(
    place: str,
    store: Store,
    edit: Callable[[bytes], bytes] | None,
    reason: str,
) -> None:
    save(store, 60)
    damaged = save(store, 120, metric=2.5)
    change(place, f"{damaged.name}/manifest.json", edit)
    (text,) = store.problems(damaged)
    assert text.startswith(f"{store.location(damaged)}/manifest.json is ")
    assert sum((store.problems(damaged, rank, 2) for rank in range(2)), []) == [text]
    assert steps(store) == [60]
    if edit or "s3" not in place:  # without a manifest a remote folder is a draft
        (told,) = store.damaged()
        assert "step-00000120/manifest.json is " in told
        assert re.search(reason, told + text)
    assert store.prune(1, 0) == []


def test_a_manifest_of_a_replaced_checkpoint_is_named(store: Store) -> None:
    old = save(store, 120, token="a")
    save(store, 120, token="b", offset=1.0)
    assert "manifest.json was replaced" in store.problems(old)[0]


def test_a_manifest_cannot_lead_out_of_its_folder(place: str, store: Store) -> None:
    save(store, 120)
    for path in ("../../secret", "/etc/passwd", "a/../b", "..", ".lock"):
        hostile = new_checkpoint(120, {path: {"bytes": 1, "sha256": "0"}}, None)  # its own sum is right
        change(place, "step-00000120/manifest.json", lambda _, hostile=hostile: dump(hostile))
        assert store.checkpoints() == []


def test_a_pickle_in_place_of_a_shard_is_refused_and_not_run(place: str, store: Store, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "mark",)

    checkpoint = save(store, 120)
    path = next(path for path in checkpoint.files if path.endswith("rank-00000.safetensors"))
    change(place, f"{checkpoint.name}/{path}", lambda _: pickle.dumps(Bomb()))
    assert len(store.problems(checkpoint)) == 1
    with pytest.raises(CheckpointError, match="rank-00000.safetensors"):
        store.open(checkpoint)
    assert not (tmp_path / "mark").exists()


def test_the_newest_and_the_best_are_kept(place: str, store: Store) -> None:
    metrics = {1: 3.0, 2: 1.0, 3: None, 4: float("nan"), 5: 2.0, 6: 2.0, 7: 9.0, 8: None}
    for step, metric in metrics.items():
        save(store, step, metric)
    assert [checkpoint.metric for checkpoint in store.checkpoints()] == [None, 9.0, 2.0, 2.0, None, None, 1.0, 3.0]
    removed = store.prune(keep=2, keep_best=2)
    assert [checkpoint.step for checkpoint in removed] == [5, 4, 3, 1]
    assert steps(store) == [8, 7, 6, 2]  # of the equals 5 and 6 the newer one
    assert store.prune(keep=2, keep_best=2) == []
    assert [checkpoint.step for checkpoint in store.prune(keep=1, keep_best=0)] == [7, 6, 2]
    assert {path.split("/")[0] for path in all_files(place)} == {"step-00000008"}
    for keep, keep_best in ((0, 3), (1, -1)):
        with pytest.raises(ValueError, match="at least the newest checkpoint must be kept"):
            store.prune(keep, keep_best)


def test_a_pinned_checkpoint_stays(place: str, store: Store, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(store, step, metric=float(step))
    pinned = store.checkpoints()[-2]
    store.pin(pinned)
    assert Store(place, tmp_path / "other").pinned() == {2}  # whoever opens the place knows
    assert [checkpoint.step for checkpoint in store.prune(keep=1, keep_best=0)] == [3, 1]
    assert steps(store) == [4, 2]
    store.unpin(pinned)
    store.unpin(pinned)
    assert store.pinned() == set() and [checkpoint.step for checkpoint in store.prune(1, 0)] == [2]
    with pytest.raises(CheckpointError, match="step-00000002 has just been removed; pin a newer one"):
        store.pin(pinned)
    assert store.pinned() == set()


def test_what_is_set_aside_counts_no_more_and_is_not_lost(place: str, store: Store) -> None:
    for step in (1, 2, 3, 4):
        save(store, step)
    store.pin(store.checkpoints()[0])
    change(place, "step-00000003/manifest.json", lambda text: text[:-9])
    before = {path for path in all_files(place) if path.startswith(("step-00000003", "step-00000004/"))}
    assert store.set_aside(after=2) == [4, 3]
    assert steps(store) == [2, 1] and store.damaged() == [] and store.pinned() == set()
    assert {f"set-aside-1/{path}" for path in before} <= all_files(place)
    save(store, 4)
    assert store.set_aside(after=4) == [] and steps(store) == [4, 2, 1]
    # A pinned one of a history that was left is no snapshot to go on from, and yet not lost.
    store.pin(store.checkpoints()[0])
    assert [checkpoint.step for checkpoint in store.prune(9, 0, newest=2)] == [4]
    assert steps(store) == [2, 1] and any(path.startswith("set-aside-2/step-00000004") for path in all_files(place))


def test_one_document_alone(place: str, store: Store) -> None:
    checkpoint = save(store, 7)
    assert json.loads(store.document(checkpoint, "state.json")) == {"step": 7}
    with pytest.raises(CheckpointError, match=r"step-00000007/other.json is missing"):
        store.document(checkpoint, "other.json")
    (path,) = (path for path in all_files(place) if path.endswith("state.json"))
    change(place, path, lambda text: b"[" + text[1:])
    with pytest.raises(CheckpointError, match=r"state.json was altered"):
        store.document(checkpoint, "state.json")


def test_checkpoints_of_a_history_that_was_left_are_removed(store: Store) -> None:
    for step in (40, 60, 80):
        save(store, step, metric=1.0 / step)
    save(store, 50)
    assert steps(store) == [50, 40]


def test_a_step_saved_again_replaces_the_first(place: str, store: Store) -> None:
    save(store, 120, token="a")
    save(store, 120, token="b", offset=1.0)
    (checkpoint,) = store.checkpoints()
    assert store.problems(checkpoint) == []
    assert torch.equal(store.open(checkpoint).pieces.read("weight"), WEIGHT + 1)
    assert len(all_files(place)) == 4


def half_save(store: Store, step: int, token: str) -> None:
    """What a process leaves that is killed when its own files are safe and the others' are not."""
    draft = store.draft(step, token)
    draft.folder.mkdir(parents=True)
    (draft.folder / "rank-00000.safetensors").write_bytes(b"half")
    draft.deliver("rank-00000.safetensors")
    draft.put_receipt(0, {"files": {}})
    (draft.folder / "rank-00001.safetensors").write_bytes(b"half")


def test_what_killed_processes_left_is_no_checkpoint_and_is_cleared(place: str, store: Store, tmp_path: Path) -> None:
    good = save(store, 120)
    store.open(good)
    before = all_files(place)
    half_save(store, 120, "other")
    half_save(store, 180, "third")
    assert store.checkpoints() == [good] and store.problems(good) == []
    assert all_files(place) > before
    with ThreadPoolExecutor(4) as processes:
        list(processes.map(Store.clear_drafts, [store] * 4))
    assert all_files(place) == before and store.problems(good) == []
    assert not list((tmp_path / "scratch").glob("*"))
    assert torch.equal(store.open(good).pieces.read("weight"), WEIGHT)


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 120, offset=1.0)
    (tmp_path / "step-00000120").rename(tmp_path / ".step-00000120.new")  # a complete draft
    save(store, 120)
    (tmp_path / "step-00000120").rename(tmp_path / ".removed-step-00000120.new")
    assert store.checkpoints() == []
    store.clear_drafts()
    (checkpoint,) = store.checkpoints()
    assert store.problems(checkpoint) == []
    assert torch.equal(store.open(checkpoint).pieces.read("weight"), WEIGHT + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000120"]


class KilledBeforeDeleting:
    """A pyarrow file system whose process ends when it is to delete a folder."""

    def __init__(self, files: FileSystem) -> None:
        self._files = files

    def __getattr__(self, name: str) -> object:
        if name == "delete_dir":
            raise KeyboardInterrupt
        return getattr(self._files, name)


def test_a_kill_while_removing_leaves_nothing_that_looks_whole(
    place: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    for step in (1, 2):
        save(store, step)
    before = all_files(place)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if "s3" in place:
            patch.setattr(store._place, "_files", KilledBeforeDeleting(store._place._files))
        else:
            patch.setattr("shutil.rmtree", killed)
        store.prune(1, 0)
    assert steps(store) == [2]
    store.clear_drafts()
    assert all_files(place) == {path for path in before if path.startswith("step-00000002/")}


def test_a_remote_checkpoint_is_fetched_once(s3_place: str, tmp_path: Path) -> None:
    store = Store(s3_place, tmp_path)
    checkpoint = save(store, 120)
    store.open(checkpoint)
    for path in checkpoint.files:
        change(s3_place, f"{checkpoint.name}/{path}", None)
    assert torch.equal(Store(s3_place, tmp_path).open(checkpoint).pieces.read("weight"), WEIGHT)
    with pytest.raises(CheckpointError, match="is missing"):
        Store(s3_place, tmp_path / "other").open(checkpoint)


def test_credentials_are_shown_nowhere(s3_place: str, tmp_path: Path) -> None:
    store = Store(s3_place)
    checkpoint = save(Store(s3_place, tmp_path), 120)
    change(s3_place, "step-00000120/manifest.json", None)
    bucket = s3_place.partition("@")[2].partition("/")[0]
    assert store.location(checkpoint) == f"s3://{bucket}/runs/one/step-00000120"
    assert "SECRET" not in str(store.problems(checkpoint))
    with pytest.raises(CheckpointError, match=f"s3://{bucket}/runs/one is remote: name a local scratch folder"):
        store.open(checkpoint)
    for uri in ("s3://KEY:SEC/RET@bucket/x", "s3://KEY:SECRET@bucket/x?nonsense=1", "nowhere://KEY:SECRET@bucket"):
        with pytest.raises(CheckpointError, match="checkpoints cannot be kept there: .* name a local folder") as info:
            Store(uri)
        assert "SEC" not in str(info.value) and "RET" not in str(info.value) and info.value.__suppress_context__

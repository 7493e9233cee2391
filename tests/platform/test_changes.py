"""Levels that are added or get another period: where they go, what is refused, and that nothing else changes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nestling.checkpoint import OpenCheckpoint, Store
from nestling.config import ConfigError, JobConfig, RunConfig, from_yaml, load, to_yaml
from nestling.config.schema import LevelConfig
from nestling.config.stream import StreamConfig, StreamSourceConfig
from nestling.data import Corpus, prepare
from nestling.models import HopeAttentionConfig, HopeConfig, TransformerConfig
from nestling.tracking import RunFolder
from nestling.training.changes import LevelChange, change_levels, free_name, level_called, pending, take_up
from nestling.training.resume import job_of


def job(variant: str = "sequential", *levels: LevelConfig, **others: Any) -> JobConfig:
    model = HopeConfig(vocab_size=257, width=8, layers=2, heads=1, level_variant=variant)
    return JobConfig(model=model, levels=list(levels) or [LevelConfig(8, 2), LevelConfig(8, 8)], **others)


def several(allowed: list[str] | None) -> StreamConfig:
    """Two sources, the second of which may write some levels."""
    return StreamConfig(sources=[StreamSourceConfig("a"), StreamSourceConfig("b", name="mood", levels=allowed)])


def order(config: JobConfig) -> list[tuple[str | None, int]]:
    return [(level.name, level.period) for level in config.levels]


def test_a_level_goes_where_its_period_belongs() -> None:
    for period, place in ((1, 0), (2, 1), (4, 1), (8, 2), (16, 2)):
        before = job()
        after = LevelChange("new", period, 16).applied(before)
        assert order(after)[place] == ("new", period) and after.levels[place].width == 16
        assert [pair for pair in order(after) if pair[0] != "new"] == order(before)
        assert isinstance(after.model, HopeConfig) and sorted(after.model.level_widths) == [8, 8, 16]
        assert before == job()
    patterns = job("sequential", LevelConfig(period=3, parameters=["embedding*"]), LevelConfig(8, 500, unit="tokens"))
    assert order(LevelChange("new", 2, 8).applied(patterns)) == [("level1", 3), ("level2", 500), ("new", 2)]
    assert order(LevelChange("new", 4, 8).applied(replace(job(), levels=[]))) == [("new", 4)]
    for allowed in (None, [], ["base"]):
        nested = LevelChange("new", 16, 8).applied(job("nested", stream=several(allowed)))
        assert order(nested) == [("level1", 2), ("level2", 8), ("new", 16)]


def test_another_period() -> None:
    after = LevelChange("level2", 3).applied(job())
    assert order(after) == [("level1", 2), ("level2", 3)] and LevelChange("level2", 3).applied(after) == after
    assert order(LevelChange("level2", 6).applied(job("nested")))[1] == ("level2", 6)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (LevelChange("no", 3), job(), "level no: there is no such level; there are: level1, level2"),
        (LevelChange("level1", 0), job(), "levels.0.period: got 0, needs at least 1"),
        (LevelChange("new", 4, 0), job(), "levels.1.width: got 0, needs at least 1"),
        (LevelChange("a b", 4, 8), job(), "levels.1.name: got 'a b', needs letters"),
        (LevelChange("new", 4, 8), job("independent"), "is independent, where one sum goes over all levels"),
        (LevelChange("new", 4, 8), job("nested"), "got 4, needs a multiple of the slowest level's"),
        (
            LevelChange("new", 16, 8),
            job("nested", stream=several(["level1", "level2", "base"])),
            "stream.sources.1.levels: names level1, level2, and with model.level_variant=nested mood may write all",
        ),
        (LevelChange("new", 20, 8), job("nested"), "needs each period to be a multiple of the one before"),
        (LevelChange("level1", 3), job("nested"), "needs each period to be a multiple of the one before"),
        (
            LevelChange("new", 4, 8),
            JobConfig(model=TransformerConfig(vocab_size=257, width=8, layers=1, heads=1)),
            "is transformer, which has no Continuum Memory System",
        ),
        (
            LevelChange("new", 4, 8),
            JobConfig(
                model=HopeAttentionConfig(
                    vocab_size=257, width=8, layers=1, heads=1, mlp_width=8, conv_width=0, level_widths=[]
                ),
                levels=[LevelConfig(layers=[0])],
            ),
            "a block has one MLP",
        ),
        (
            LevelChange("new", 16, 8),
            job("sequential", LevelConfig(period=3, parameters=["*.2.into*"]), LevelConfig(8, 1), LevelConfig(8, 4)),
            "level new: its parameter blocks.0.feed_forward.2.into.weight is in a level before it",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(change: LevelChange, config: JobConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        change.applied(config)


def test_a_level_that_moves_in_a_text_is_refused() -> None:
    config = from_yaml(to_yaml(job()), ["continuum.drive=stream", "continuum.periods=[4, 8]", "continuum.rates=[1, 1]"])
    with pytest.raises(ConfigError, match=r"continuum.drive: is stream, with a period and a rate for each"):
        LevelChange("new", 16, 8).applied(config)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path, "news")
    folder.write_config(to_yaml(job(run=RunConfig(dir=str(tmp_path)))))
    folder.update(kind="stream", status="interrupted")
    return folder


def test_at_rest_a_change_is_taken_up_at_once(folder: RunFolder) -> None:
    assert free_name(folder) == "level3" and level_called(folder, "2").name == "level2"
    assert change_levels(folder, LevelChange("level3", 4, 16))
    assert order(job_of(folder)) == [("level1", 2), ("level3", 4), ("level2", 8)] and not pending(folder)
    (event,) = folder.happened()
    assert event["message"] == "level3 of width 16 is added and moves every 4 steps from now on"
    with pytest.raises(ConfigError, match="level3: moves every 4 already"):
        change_levels(folder, LevelChange("level3", 4))
    with pytest.raises(ConfigError, match="got 'level9', needs one of level1, level3, level2, or a number from 1 to 3"):
        level_called(folder, "level9")
    folder.update(status="finished")
    with pytest.raises(ConfigError, match=r"has finished; go on with it first \(nestling stream --resume \w+"):
        change_levels(folder, LevelChange("level3", 5))


def test_while_it_runs_a_change_waits_for_the_driver(folder: RunFolder) -> None:
    with folder.claim():
        for change in (LevelChange("level3", 4, 16), LevelChange("level3", 5), LevelChange("level1", 3)):
            assert not change_levels(folder, change)
        assert free_name(folder) == "level4" and level_called(folder, "level3").period == 5
        with pytest.raises(ConfigError, match="there is no such level; there are: level1, level3, level2"):
            change_levels(folder, LevelChange("level4", 3))
        assert order(job_of(folder)) == [("level1", 2), ("level2", 8)] and len(pending(folder)) == 3
        # What the driver was told besides stays with it, and a crash before the request is gone does no harm.
        asked = folder.changes.read_bytes()
        driver = take_up(folder, from_yaml(folder.config.read_text(), ["levels.1.learning_rate=0.5"]))
        assert order(driver) == order(job_of(folder)) == [("level1", 3), ("level3", 5), ("level2", 8)]
        assert driver.levels[2].learning_rate == 0.5 and job_of(folder).levels[2].learning_rate is None
        folder.changes.write_bytes(asked)
        assert order(take_up(folder, driver)) == order(driver) == order(job_of(folder)) and not pending(folder)


SAVED, END = 7, 16  # 7 is in the middle of every slow level's period
LAYOUTS = {
    "zero0": ["training.zero_stage=0"],
    "zero1": ["training.zero_stage=1"],
    "zero2": ["training.zero_stage=2", "training.micro_batch=2"],
    "zero3": ["training.zero_stage=3"],
    "nested": ["training.zero_stage=2", "model.level_variant=nested", "levels.1.period=9"],
    "bfloat16": ["training.zero_stage=1", "training.precision=bfloat16"],
}
TINY = [
    *("model.width=32", "model.layers=2", "model.heads=1", "model.chunk_size=16", "training.warmup_steps=2"),
    *("data.sequence_length=32", "training.batch_tokens=128", f"training.steps={END}", "training.workers=2"),
    "levels=[{width: 32, period: 3}, {width: 16, period: 5, optimizer: sgd}, {parameters: [embedding*], period: 4}]",
]


def changed(label: str, config: JobConfig) -> JobConfig:
    if label != "nested":
        config = LevelChange("level1", 6).applied(config)
    return LevelChange("new", 18 if label == "nested" else 4, 24).applied(config)


def worker(rank: int, place: str, jobs: dict[str, str], corpus: str) -> None:
    """One of two processes: trains each job, saves, takes up the same with other levels, saves again, goes on."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/init", rank=rank, world_size=2)
    from nestling.training.keeper import Keeper
    from nestling.training.loop import Training

    def training_of(config: JobConfig) -> Training:
        return Training(config, Corpus.open(Path(corpus)), torch.device("cpu"), rank, 2)

    def logits(training: Training) -> torch.Tensor:
        with torch.no_grad():
            said: torch.Tensor = training.engine(torch.arange(64)[None])[0]
        return said

    results = {}
    for label, text in jobs.items():
        config = from_yaml(text)
        training = training_of(config)
        keeper = Keeper(training, Store(Path(place, label)), None)
        while training.done < SAVED:
            training.step()
        keeper.save({})
        assert not keeper.close()
        other = training_of(changed(label, config))
        assert Keeper(other, Store(Path(place, label)), None).restore() == SAVED
        same = torch.equal(logits(training), logits(other))
        other.step()
        assert (
            Keeper(other, Store(Path(place, label)), None).restore() == SAVED
        )  # also into an engine that has moved on
        after = Keeper(other, Store(Path(place, f"{label} changed")), None)
        after.save({})
        assert not after.close()
        updates = []
        while other.done < END:
            other.step()
            updates.append(dict(other.levels.updates))
        results[label] = (same, updates)
    if rank == 0:
        torch.save(results, Path(place, "results"))


@pytest.mark.slow
def test_on_two_ranks_nothing_else_changes(texts: Path, tmp_path: Path) -> None:
    base = [*TINY, f"data.source={texts}", f"run.dir={tmp_path}", "model.vocab_size=257"]
    configs = {label: load("jobs/quickstart.yaml", [*base, *layout]) for label, layout in LAYOUTS.items()}
    corpus = prepare(configs["zero0"].data, tmp_path / "cache")
    jobs = {label: to_yaml(config) for label, config in configs.items()}
    torch.multiprocessing.spawn(worker, (str(tmp_path), jobs, str(corpus.folder)), nprocs=2)
    results = torch.load(tmp_path / "results")
    for label, (same, updates) in results.items():
        assert same, label
        before, after = (opened(tmp_path / name) for name in (label, f"{label} changed"))
        compare(label, before, after)
        for step, made in enumerate(updates, SAVED + 1):
            fast, slow, new = (3, 9, 18) if label == "nested" else (6, 5, 4)
            expected = [SAVED // 3 + step // fast - SAVED // fast, step // slow, step // new - SAVED // new]
            assert [made["level1"], made["level2"], made["new"]] == expected, (label, step)


def opened(place: Path) -> OpenCheckpoint:
    store = Store(place)
    return store.open(store.checkpoints()[0])


def compare(label: str, before: OpenCheckpoint, after: OpenCheckpoint) -> None:
    """Every tensor and counter of the old parameters is there, to the bit, and of the new ones only the weights."""
    place = 2 if label == "nested" else 0

    def now(name: str) -> str:
        for old in (1, 0):
            shifted = old + (old >= place)
            if f".feed_forward.{old}." in name:
                return name.replace(f".feed_forward.{old}.", f".feed_forward.{shifted}.")
        return name

    old, new = before.pieces, after.pieces
    assert {kind.partition("/")[0] for kind in old.sizes} >= {"weight", "exp_avg", "accumulator"}
    for name in old.sizes:
        assert torch.equal(old.read(name), new.read(now(name))), (label, name)
    fresh = set(new.sizes) - {now(name) for name in old.sizes}
    assert {name.rpartition("feed_forward.")[2] for name in fresh} == {
        f"{place}.{part}.weight" for part in ("norm", "into", "out")
    }
    for name in fresh:
        assert name.startswith("weight/") and bool(new.read(name).any()) != name.endswith("out.weight")
    first, then = (json.loads(found.documents["state.json"]) for found in (before, after))
    assert {now(name): each for name, each in first["optimizer"].items()}.items() <= then["optimizer"].items()
    assert first["step"] == then["step"] and then["updates"] == first["updates"] | {"new": 0}

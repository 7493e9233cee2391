"""The soak: a stream that is disturbed at random for as long as you like, and must lose nothing. `make soak`.

First the stream is left alone, with more to read than it can learn, and its memory is measured. Then, at random times
and in random order, its reader, worker, driver or Ray's head is killed, it is stopped with SIGTERM, or killed and its
newest snapshot truncated; each time it is started again. In the end the ledger is verified, and the disturbed part is
learnt once more in a copy that nothing happens to: weights, losses, ledger and side files must be equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from tests.jobs.memory import Memory
from tests.jobs.streams import begin, head, lines, outcome, readers, resumed, truncate_newest, verified
from tests.jobs.test_faults import events

#: What must hold: seconds from a fault to the first step after it, and MB a minute of memory while undisturbed.
RECOVERY, GROWTH = 45.0, 1.0
#: The part of the time that the stream is left alone, and the seconds of it in which Ray's processes still warm up.
ALONE, WARM_UP = 0.5, 240.0
#: Seconds after which a stream that does not go on counts as lost.
PATIENCE = 600.0
#: Seconds of training before a fault.
QUIET = (3.0, 12.0)
JOB = [
    *("stream.window_bytes=8000", "stream.domain_column=domain", "stream.time_column=time", "stream.lateness=10000"),
    *("stream.close_after=1", "training.checkpoint_every=50", "stream.probe_every=100", "training.max_failures=1000"),
]


class Source:
    """A folder of three growing files, always ahead of the stream; broken and late records among the others."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self._random, self._number = folder, random.Random(seed), 0
        folder.mkdir()

    def grow(self, count: int) -> None:
        texts: dict[str, list[str]] = {"a": [], "b": [], "c": []}
        for _ in range(count):
            self._number += 1
            domain = self._random.choice(list(texts))
            words = " ".join(f"{domain}{self._random.randrange(500)}" for _ in range(40))
            late = 36_000 if self._number > 100 and self._random.random() < 0.02 else 0
            record = {"text": words, "domain": domain, "time": 1e9 + self._number - late}
            texts[domain].append("{broken" if self._random.random() < 0.02 else json.dumps(record))
        for domain, made in texts.items():
            with (self.folder / f"{domain}.jsonl").open("a") as file:
                file.writelines(f"{line}\n" for line in made)


class Soak:
    """One soak in a folder of its own."""

    def __init__(self, place: Path, seed: int) -> None:
        self.runs, self.copy = place / "runs", place / "copy"
        self.runs.mkdir()
        self.source = Source(place / "source", seed)
        self.random = random.Random(seed)
        self.memory = Memory()
        #: Of each fault its name, and the seconds until the first step after it.
        self.faults: list[tuple[str, float]] = []
        self.source.grow(2000)
        self.run = begin(self.runs, self.source.folder, *JOB, steps=None)
        self.folder = self.run.folder()
        self._ended = threading.Event()
        threading.Thread(target=self._feed, daemon=True).start()

    def leave_alone(self, seconds: float) -> dict[str, float]:
        """Measure memory; MB a minute of each group after the warm-up."""
        self._steps_after(0)
        began, driver = time.monotonic(), psutil.Process(self.run.process.pid)
        while (now := time.monotonic() - began) < seconds:
            self.memory.sample(now, driver)
            assert self.run.process.poll() is None, self.run.ended()
            time.sleep(1)
        return self.memory.slopes(min(WARM_UP, 2 / 3 * seconds))

    def copy_all(self) -> None:
        """Stop the stream, copy all that there is of it, and go on."""
        self.stop()
        shutil.copytree(self.runs, self.copy)
        self._start()
        self._steps_after(self.reached())

    def disturb(self, seconds: float) -> None:
        """Fault after fault, with every kind of them in each round."""
        end, kinds = time.monotonic() + seconds, list[Callable[[], None]]()
        while time.monotonic() < end:
            if not kinds:
                kinds = [self.kill_worker, self.kill_reader, self.kill_driver, self.kill_head, self.stop, self.truncate]
                self.random.shuffle(kinds)
            time.sleep(self.random.uniform(*QUIET))
            fault = kinds.pop()
            before, began = len(events(self.folder, "resumed")), time.monotonic()
            fault()
            if self.run.process.poll() is not None:
                self._start()
            self.run.until(lambda before=before: len(events(self.folder, "resumed")) > before, PATIENCE)
            self._steps_after(events(self.folder, "resumed")[-1]["step"])
            self.faults.append((fault.__name__, time.monotonic() - began))
            print(f"{fault.__name__:12} {self.faults[-1][1]:5.1f} s, step {self.reached():,}", flush=True)

    def finish(self) -> None:
        """Let the stream come to an end a few steps on, and the copy as far, over the same windows."""
        self.stop()
        self._ended.set()
        last = self.reached() + 20
        self._end(self.runs, self.folder, last)
        folder = self.copy / self.folder.name
        self._plan_alike(folder)
        self._end(self.copy, folder, last, f"tracking.uri=sqlite:///{self.copy}/mlflow.db")

    def equal(self) -> dict[str, bool]:
        """Whether the disturbed stream and its copy hold the same, by what it is."""
        folder = self.copy / self.folder.name
        ours, theirs = outcome(self.folder), outcome(folder)
        late = {"late": (self.folder / "late.jsonl").read_bytes() == (folder / "late.jsonl").read_bytes()}
        return {name: ours[name] == theirs[name] for name in ours} | late

    # Faults

    def kill_worker(self) -> None:
        self.run.workers()[0].kill()

    def kill_reader(self) -> None:
        self.run.until(lambda: bool(readers(self.run)))  # one dataset after another has none for a moment
        readers(self.run)[0].kill()

    def kill_driver(self) -> None:
        self.run.kill()

    def kill_head(self) -> None:
        workers = self.run.workers()
        head(self.run).kill()
        self.run.ended()
        psutil.wait_procs(workers, timeout=60)

    def stop(self) -> None:
        self.run.process.send_signal(signal.SIGTERM)
        code, _, said = self.run.ended()
        assert code == 130, said

    def truncate(self) -> None:
        self.run.kill()
        if len(list((self.folder / "checkpoints").glob("step-*"))) > 1:
            truncate_newest(self.folder)

    # Steps

    def reached(self) -> int:
        """The last step in the log."""
        return max((record["step"] for record in lines(self.folder / "log.jsonl")[-1:]), default=0)

    def _steps_after(self, step: int) -> None:
        self.run.until(lambda: (self.folder / "log.jsonl").exists() and self.reached() > step, PATIENCE)

    def _start(self) -> None:
        self.run = resumed(self.runs, self.folder)

    def _end(self, runs: Path, folder: Path, last: int, *more: str) -> None:
        run = resumed(runs, folder, f"training.steps={last}", *more)
        code = run.process.wait()
        _, _, said = run.ended()
        assert code == 0, said
        verified(runs, folder)

    def _plan_alike(self, folder: Path) -> None:
        """Plan the windows of the copy as those of the stream were, which its ledger and its last plans tell."""
        plans: dict[int, list[dict[str, object]]] = {}
        for line in lines(self.folder / "ledger.jsonl"):
            interval = {name: line[name] for name in ("partition", "start", "end")}
            plans.setdefault(line["window_id"], []).append(interval)
        for number, intervals in plans.items():
            (folder / "windows" / f"{number:08}.json").write_text(json.dumps({"intervals": intervals}))
        for path in (self.folder / "windows").glob("[0-9]*.json"):
            shutil.copy(path, folder / "windows")

    def _feed(self) -> None:
        """Keep the source ahead of the stream, whatever happens to that."""
        while not self._ended.wait(0.5):
            with suppress(OSError, ValueError, KeyError):
                read = sum(json.loads((self.folder / "position.json").read_text())["offsets"].values())
                if sum(file.stat().st_size for file in self.source.folder.iterdir()) - read < 400_000:
                    self.source.grow(2000)


def soak(minutes: float, it: Soak) -> bool:
    """Run one, print what was found, and say whether all of it is good."""
    began = time.monotonic()
    slopes = it.leave_alone(ALONE * minutes * 60)
    print("memory, MB a minute:", ", ".join(f"{name} {slope:+.2f}" for name, slope in slopes.items()), flush=True)
    it.copy_all()
    it.disturb(minutes * 60 - (time.monotonic() - began))
    it.finish()
    proof, equal, late = verified(it.runs, it.folder), it.equal(), len(lines(it.folder / "late.jsonl"))
    print("\nfault          times   mean  longest (seconds to the first step after it)")
    for name in sorted({name for name, _ in it.faults}):
        took = [seconds for fault, seconds in it.faults if fault == name]
        print(f"{name:12} {len(took):7} {sum(took) / len(took):6.1f} {max(took):8.1f}")
    longest = max((seconds for _, seconds in it.faults), default=0.0)
    verdicts = {
        f"verified: {proof['intervals']:,} intervals, {proof['records']:,} records": proof["ok"],
        f"broken ({proof['dead_letters']:,}) and late ({late:,}) records among them": min(proof["dead_letters"], late)
        > 0,
        f"{len(it.faults)} faults, recovered within {RECOVERY:g} s": 0 < longest <= RECOVERY,
        f"memory grows by no more than {GROWTH:g} MB a minute": slopes["all"] <= GROWTH,
        **{f"{name} equal to the bit": same for name, same in equal.items()},
    }
    for what, good in verdicts.items():
        print(f"{'yes' if good else 'NO ':3} {what}")
    return all(verdicts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="until the last fault")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--keep", action="store_true", help="leave the runs where they are")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="nestling-soak-"))
    print(f"soak of {arguments.minutes:g} minutes, seed {arguments.seed}, in {place}", flush=True)
    it = Soak(place, arguments.seed)
    try:
        good = soak(arguments.minutes, it)
    finally:
        it.run.process.kill()
    if good and not arguments.keep:
        shutil.rmtree(place)
    sys.exit(not good)


if __name__ == "__main__":
    main()

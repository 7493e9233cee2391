"""What happens to a run when processes die, people lose patience and files rot: it goes on, to the bit.

Every fault is real: a signal to a real process, a file changed on disk. Each is compared with a run that nothing
happened to.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.jobs.in_process import result

ROOT = Path(__file__).parents[2]
STEPS = 90
JOB = [
    *("training.workers=2", "training.zero_stage=2", "training.batch_tokens=256", "training.micro_batch=1"),
    *(f"training.steps={STEPS}", "training.log_every=1", "training.warmup_steps=2", "training.evaluate_every=0"),
    *("training.checkpoint_every=20", "data.sequence_length=64", "model.width=32", "model.heads=1"),
    *("levels=[{width: 32, period: 7}, {width: 32, period: 1, optimizer: sgd}]", "evaluation.final_tokens=256"),
]

pytestmark = pytest.mark.slow


class Run:
    """A run of the command line in a process of its own."""

    def __init__(self, runs: Path, *arguments: str) -> None:
        self.runs, self.before = runs, set(runs.glob("*/run.json"))
        environment = dict(os.environ) | {"NESTLING_RUNS": str(runs)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        self._said = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop a long run
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nestling.jobs.app", *arguments, "--json"],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def folder(self) -> Path:
        """The run's folder, when there is one."""
        self.until(lambda: bool(set(self.runs.glob("*/run.json")) - self.before))
        (path,) = set(self.runs.glob("*/run.json")) - self.before
        return path.parent

    def until(self, holds: Callable[[], bool], patience: float = 120) -> None:
        deadline = time.monotonic() + patience
        while not holds():
            assert time.monotonic() < deadline and self.process.poll() is None, self.ended()
            time.sleep(0.02)

    def reaches(self, step: int, folder: Path | None = None) -> Path:
        """The run's folder, which is known if the run goes on, when its log has come to this step."""
        folder = folder or self.folder()
        log = folder / "log.jsonl"
        self.until(lambda: log.exists() and log.read_bytes().count(b"\n") >= step)
        return folder

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "RayTrainWorker" in "".join(child.cmdline())]

    def kill(self) -> str:
        """Kill the driver, and wait until the workers, whom Ray ends a moment later, are gone too; what it had said."""
        workers = self.workers()
        self.process.kill()
        psutil.wait_procs(workers, timeout=60)
        self._said.seek(0)
        return self._said.read()

    def ended(self) -> tuple[int, dict[str, Any], str]:
        """Exit code, JSON and what was said."""
        try:
            out, _ = self.process.communicate(timeout=150)
        finally:
            self.process.kill()
        self._said.seek(0)
        return self.process.returncode, json.loads(out.splitlines()[-1]) if out else {}, self._said.read()


def fingerprint(folder: Path) -> tuple[str, list[tuple[int, float]]]:
    """Hash of the final weights, and the loss of every step."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return weights, [(record["step"], record["train/loss"]) for record in records]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def history(folder: Path) -> list[tuple[int, float]]:
    """What MLflow has of the training loss."""
    import mlflow

    info = json.loads((folder / "run.json").read_text())
    client = mlflow.MlflowClient(info["tracking_uri"])
    assert client.get_run(info["mlflow_run_id"]).info.status == "FINISHED"
    (experiment,) = (found.experiment_id for found in client.search_experiments() if found.name == "nestling")
    tagged = client.search_runs([experiment], f"tags.`nestling.run_id` = '{info['run_id']}'")
    assert len(tagged) == 1  # the same MLflow run went on
    return [(metric.step, metric.value) for metric in client.get_metric_history(info["mlflow_run_id"], "train/loss")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of these tests are kept."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(ray_local: None, runs: Path) -> tuple[str, list[tuple[int, float]]]:
    summary = result(runs, "train", "quickstart", *JOB)
    assert summary["checkpoint"].endswith("step-00000090") and Path(summary["checkpoint"]).is_dir()
    weights, losses = found = fingerprint(Path(summary["run_dir"]))
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert losses[-1][1] < losses[0][1] - 1
    return found


def test_kill_9_of_a_worker_and_of_the_driver(runs: Path, undisturbed: Any) -> None:
    run = Run(runs, "train", "quickstart", *JOB)
    folder = run.reaches(30)
    run.workers()[1].kill()
    second = Run(runs, "resume", "latest").ended()  # while it recovers
    assert second[0] == 2 and "being trained" in second[2]
    run.until(lambda: len(events(folder, "resumed")) == 1)
    run.reaches(45)
    said = run.kill()
    assert "died" in said and "starting again from the last checkpoint (1 of 3)" in said
    assert "training goes on from the checkpoint of step 20" in said
    assert result(runs, "runs")["runs"][-1]["status"] == "stopped"
    summary = result(runs, "resume", "latest")
    assert summary["run_dir"] == str(folder) and summary["status"] == "finished" and summary["steps"] == STEPS
    assert len(events(folder, "resumed")) == 2
    assert fingerprint(folder) == undisturbed
    assert history(folder) == undisturbed[1]


def test_a_run_that_gave_up_is_resumed_from_the_last_good_checkpoint(runs: Path, undisturbed: Any) -> None:
    run = Run(runs, "train", "quickstart", *JOB, "training.max_failures=0")
    folder = run.reaches(50)
    run.workers()[0].kill()
    code, summary, err = run.ended()
    assert code == 1 and summary["status"] == "failed"
    assert "giving up after training.max_failures=0" in err and f"nestling resume {summary['run_id']}" in err
    newest = max((folder / "checkpoints").glob("step-*"))
    shard = next(newest.rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, _, err = Run(runs, "resume", summary["run_id"]).ended()
    assert code == 0, err
    (damaged,) = events(folder, "damaged")
    assert str(shard) in damaged["message"] and "altered" in damaged["message"] and damaged["message"] in err
    assert events(folder, "resumed")[-1]["step"] == int(newest.name[5:]) - 20
    assert fingerprint(folder) == undisturbed


def test_signals_save_and_the_run_goes_on(runs: Path, undisturbed: Any) -> None:
    summary, err = stopped_by(signal.SIGINT, Run(runs, "train", "quickstart", *JOB), 25)
    assert f"nestling resume {summary['run_id']}" in err
    assert result(runs, "evaluate", "latest")["heldout_loss"] > 0  # from the checkpoint
    again, err = stopped_by(signal.SIGTERM, Run(runs, "resume", summary["run_id"]), 50, Path(summary["run_dir"]))
    assert f"training goes on from the checkpoint of step {summary['steps']}" in err
    assert again["steps"] > summary["steps"]
    assert fingerprint(Path(result(runs, "resume", summary["run_id"])["run_dir"])) == undisturbed


def stopped_by(number: signal.Signals, run: Run, step: int, folder: Path | None = None) -> tuple[dict[str, Any], str]:
    """The JSON of a run that was sent a signal at a step, and what it said."""
    run.reaches(step, folder)
    run.process.send_signal(number)
    code, summary, err = run.ended()
    assert code == 130 and summary["status"] == "interrupted", err
    assert summary["steps"] >= step and summary["checkpoint"].endswith(f"step-{summary['steps']:08}")
    assert "saving a checkpoint" in err and "Traceback" not in err
    return summary, err


def test_a_second_ctrl_c_leaves_at_once(runs: Path) -> None:
    run = Run(runs, "train", "quickstart", *JOB)
    folder = run.reaches(30)
    os.kill(run.workers()[0].pid, signal.SIGSTOP)  # the step never ends, so nothing can be saved
    run.process.send_signal(signal.SIGINT)
    run.until(lambda: "stopping" in (folder / "events.jsonl").read_text())
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    code, summary, err = run.ended()
    assert code == 130 and summary["status"] == "interrupted", err
    assert summary["checkpoint"] is None or summary["checkpoint"].endswith("step-00000020")
    assert time.monotonic() - began < 60  # it does not wait for the training that hangs


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(
    runs: Path, small_disk: Path, undisturbed: Any
) -> None:
    run = Run(runs, "train", "quickstart", *JOB, f"checkpoint.dir={small_disk}")
    folder = run.folder()
    checkpoints = small_disk / folder.name
    run.until(lambda: (checkpoints / "step-00000020").exists())
    with pytest.raises(OSError, match="No space left"), (small_disk / "filler").open("ab", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    run.until(lambda: "save-failed" in (folder / "events.jsonl").read_text())
    (failed, *_), saved = events(folder, "save-failed"), events(folder, "checkpoint")
    assert "No space left on device" in failed["message"] and "the last good one is" in failed["message"]
    assert (checkpoints / f"step-{saved[-1]['step']:08}").is_dir()
    (small_disk / "filler").unlink()
    code, summary, err = run.ended()
    assert code == 0, err
    assert failed["message"] in err and summary["checkpoint"].endswith("step-00000090")
    assert fingerprint(folder) == undisturbed

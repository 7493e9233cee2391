"""The verbs as programs call them: exit codes, JSON keys, and what is told to a person."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nestling.config import ConfigError, from_yaml, load, to_mapping
from nestling.data import Tokenizer
from nestling.jobs.app import app
from nestling.jobs.arguments import for_reading, job_for_reading
from nestling.jobs.evaluate import report
from nestling.tracking import RunFolder, start
from nestling.tracking.outbox import Outbox

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NESTLING_RUNS", str(tmp_path / "runs"))
    for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run made by hand."""
    folder = RunFolder.create(tmp_path / "runs", "small")
    folder.weights.write_bytes(b"weights")
    folder.config.write_text("seed: 0\n")
    folder.tokenizer.write_text("{}")
    folder.update(status="finished", steps=1000, tokens=512000, heldout_bits_per_byte=2.345)
    return folder


def nestling(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def result(ended: Result) -> dict[str, Any]:
    lines = ended.stdout.splitlines()
    assert len(lines) == 1, ended.output
    return json.loads(lines[0])


def test_light_verbs_import_nothing_heavy() -> None:
    code = "import sys\nfrom nestling.jobs.app import app\n"
    code += "for arguments in (['--help'], ['config', 'quickstart'], ['runs']):\n"
    code += "    try: app(arguments)\n    except SystemExit as end: assert not end.code\n"
    code += "print([name for name in ('torch', 'ray', 'mlflow', 'deepspeed', 'matplotlib') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_config(tmp_path: Path) -> None:
    job = load("quickstart", ["training.steps=7"])
    ended = nestling("config", "quickstart", "training.steps=7", "--json")
    assert (ended.exit_code, result(ended)) == (0, to_mapping(job))
    assert from_yaml(nestling("config", "quickstart", "training.steps=7").stdout) == job


@pytest.mark.parametrize("verb", ["config", "train"])
def test_a_wrong_configuration_starts_nothing(verb: str, tmp_path: Path) -> None:
    ended = nestling(verb, "quickstart", "training.stepz=7", "--json")
    assert ended.exit_code == 2
    assert ended.stderr == "training.stepz: unknown key; the nearest known one is training.steps\n"
    assert "training.stepz" in result(ended)["error"]
    assert not (tmp_path / "runs").exists()


def test_a_runs_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = nestling("train", "quickstart", f"run.dir={tmp_path}/file/runs")
    assert ended.exit_code == 2
    assert "run.dir: cannot make a run in" in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("nosuchverb",),
        ("generate", "latest"),
        ("export", "latest"),
        ("export", "latest", "--out", "x", "--format", "pickle"),
        ("runs", "training.steps=3"),
        ("evaluate", "latest", "training.steps=3"),
        ("generate", "latest", "--prompt", "x", "--seed", "-1"),
        ("generate", "latest", "--prompt", "x", "--seed", str(2**64)),
        ("doctor", "run.dri=x"),
        ("runs", "run.dir="),
        ("--nosuchoption", "runs"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    ended = nestling(*arguments)
    assert ended.exit_code == 2
    assert ended.stdout == "" and ended.stderr
    with_json = nestling(*arguments, "--json")
    assert with_json.exit_code == 2
    assert isinstance(result(with_json)["error"], str) and with_json.stderr


def test_runs(run: RunFolder, tmp_path: Path) -> None:
    other = RunFolder.create(tmp_path / "runs", "other")
    known: dict[str, Any] = {"run_id": run.run_id, "name": "small", "status": "finished"}
    known |= {"steps": 1000, "tokens": 512000, "heldout_bits_per_byte": 2.345}
    unknown: dict[str, Any] = {"run_id": other.run_id, "name": "other", "status": "stopped"}
    unknown |= {"steps": None, "tokens": None, "heldout_bits_per_byte": None}
    assert result(nestling("runs", "--json")) == {"runs": [known, unknown]}
    assert result(nestling("runs", f"run.dir={tmp_path}/runs", "--json"))["runs"][0] == known
    assert result(nestling("runs", f"run.dir={tmp_path}/none", "--json")) == {"runs": []}
    with other.claim():
        assert result(nestling("runs", "--json"))["runs"][1]["status"] == "running"
    table = nestling("runs").stdout
    assert run.run_id in table and "512,000" in table and "2.345" in table


def test_names_are_not_cut_where_nobody_looks(tmp_path: Path) -> None:
    name = "long-" * 30 + "name"
    RunFolder.create(tmp_path / "runs", name)
    assert f" {name} " in nestling("runs").stdout


@pytest.mark.parametrize("how", [".", "link"])
def test_export_to_an_empty_folder(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    ended = nestling("export", "latest", "--out", "." if how == "." else str(tmp_path / "link"), "--json")
    assert ended.exit_code == 0, ended.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(result(ended)["files"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out", "runs"]


def test_export(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    ended = nestling("export", run.run_id, "--out", str(out), "--json")
    assert ended.exit_code == 0, ended.stderr
    files = ["model.safetensors", "config.yaml", "tokenizer.json"]
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert result(ended) == {"run_id": run.run_id, "step": 1000, "files": files, "sha256": sha256}
    assert sorted(path.name for path in out.iterdir()) == sorted(files)
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    again = nestling("export", "latest", "--out", str(out), "--json")
    assert again.exit_code == 2
    assert "exists and is not an empty folder" in again.stderr


def test_export_leaves_nothing_behind_when_it_fails(run: RunFolder, tmp_path: Path) -> None:
    run.tokenizer.unlink()
    ended = nestling("export", "small", "--out", str(tmp_path / "out"))
    assert ended.exit_code == 1
    assert "tokenizer.json" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_export_to_hf_is_refused_in_a_sentence(run: RunFolder, tmp_path: Path) -> None:
    Tokenizer.bytes().save(run.tokenizer)
    ended = nestling("export", "latest", "--out", str(tmp_path / "out"), "--format", "hf", "--json")
    assert ended.exit_code == 2
    assert "model.name=hope: transformers has no model with its parts; use --format safetensors" in ended.stderr
    assert result(ended)["sha256"] is None and [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("verb", [("evaluate",), ("generate", "--prompt", "x"), ("export", "--out", "out")])
def test_runs_that_cannot_be_used(verb: tuple[str, ...], tmp_path: Path) -> None:
    name, *options = verb
    ended = nestling(name, "latest", *options)
    assert ended.exit_code == 2
    assert "there are no runs in" in ended.stderr
    RunFolder.create(tmp_path / "runs", "small")
    ended = nestling(name, "small", *options, "--json")
    assert ended.exit_code == 2
    assert "has no weights" in ended.stderr and "model.safetensors is missing" in ended.stderr
    ended = nestling(name, "smal", *options)
    assert ended.exit_code == 2
    assert "did you mean small?" in ended.stderr


def test_evaluate_takes_keys_of_the_evaluation(run: RunFolder) -> None:
    ended = nestling("evaluate", "latest", "evaluation.final_tokens=0")
    assert ended.exit_code == 2
    assert ended.stderr == "evaluation.final_tokens: got 0, needs at least 1\n"
    ended = nestling("evaluate", "latest", "evaluation.tokns=1")
    assert ended.exit_code == 2
    assert "the nearest known one is evaluation.tokens" in ended.stderr


def test_evaluation_in_words() -> None:
    figures: dict[str, Any] = {"heldout_bits_per_byte": 2.5, "unigram_bits_per_byte": 4.5, "tokens": 2048}
    figures |= {"bits_per_byte_by_position": [3.0, 2.0], "eta": [0.5], "alpha": [0.25], "control_tokens": 1024}
    figures |= {"writes_on_bits_per_byte": 2.5, "writes_off_bits_per_byte": 3.0}
    figures |= {"second_copy_bits_per_byte": None, "after_another_bits_per_byte": None}
    lines = report(figures)
    assert lines["memory"].endswith("3.000 with them switched off (+0.500), over 1,024 tokens")
    assert lines["recall"] == "not measured: the held-out text is too short for two passages"
    assert "levels" not in lines
    figures |= {"levels_moving_bits_per_byte": 2.5, "levels_still_bits_per_byte": 2.75}
    assert report(figures)["levels"].endswith("2.750 with levels that stay (+0.250), over 1,024 tokens")


def test_a_run_is_read_whole_however_it_was_trained(run: RunFolder) -> None:
    run.config.write_text("training: {zero_stage: 3, activation_checkpointing: true}\nlevels: [{width: 8}]\n")
    moving = ["continuum.drive=stream", "continuum.periods=[4]", "continuum.rates=[0.1]"]
    assert job_for_reading(run, moving).continuum.rates == [0.1]
    with pytest.raises(ConfigError, match="continuum.periods: does nothing with continuum.drive=schedule; add"):
        job_for_reading(run, moving[1:])
    with pytest.raises(ConfigError, match="training.steps: unknown key"):
        for_reading(["training.steps=3"])
    assert for_reading(["run.dir=x", *moving]) == (["run.dir=x"], moving)


def test_evaluate_names_a_missing_source(run: RunFolder, tmp_path: Path) -> None:
    ended = nestling("evaluate", "latest", "--data", str(tmp_path / "none"), "--json")
    assert ended.exit_code == 2
    assert f"--data: {tmp_path}/none does not exist" in ended.stderr
    assert result(ended)["heldout_loss"] is None


def test_ui_without_anything_to_show() -> None:
    ended = nestling("ui")
    assert ended.exit_code == 2
    assert "mlflow.db does not exist: nothing is tracked there yet" in ended.stderr


def test_ui_of_a_tracking_server() -> None:
    uri = "http://tracking.example:5000"
    assert result(nestling("ui", f"tracking.uri={uri}", "--json")) == {"address": uri, "tracking_uri": uri}


def test_ui_sends_what_mlflow_missed(run: RunFolder) -> None:
    tracked = start({"seed": 0}, run, None, "nestling")
    outbox = Outbox(run.mlflow, patience=0)
    outbox.put_metrics({"train/loss": 1.5}, 1)
    outbox.close()
    ended = nestling("ui", "tracking.uri=http://tracking.example:5000")
    assert f"run {run.run_id}: MLflow has everything now" in ended.stderr
    from mlflow import MlflowClient

    found = MlflowClient(tracked.uri).get_run(tracked.mlflow_run_id)
    assert (found.info.status, found.data.metrics["train/loss"]) == ("FINISHED", 1.5)
    assert "MLflow" not in nestling("ui", "tracking.uri=http://tracking.example:5000").stderr


def test_ui_on_a_port_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = nestling("ui", "--port", str(port))
    assert ended.exit_code == 2
    assert f"--port: cannot listen on 127.0.0.1:{port}" in ended.stderr and "choose another --port" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ui_serves_mlflow_until_it_is_interrupted(run: RunFolder, number: signal.Signals) -> None:
    start({"seed": 0}, run, None, "nestling")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nestling.jobs.app", "ui", "--port", str(port), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        try:
            assert "MLflow" in _page(f"http://127.0.0.1:{port}/")
        finally:
            served.send_signal(number)
        out, _ = served.communicate(timeout=30)
    assert served.returncode == 0
    uri = f"sqlite:///{run.path.parent}/mlflow.db"
    assert json.loads(out) == {"address": f"http://127.0.0.1:{port}", "tracking_uri": uri}
    with pytest.raises(ConnectionRefusedError):  # no server is left behind
        socket.create_connection(("127.0.0.1", port))


def _page(address: str) -> str:
    for _ in range(120):
        try:
            with urllib.request.urlopen(address) as page:
                return page.read().decode()
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)


def test_doctor(tmp_path: Path) -> None:
    ended = nestling("doctor", "--json")
    found = result(ended)
    assert ended.exit_code == (0 if found["ok"] else 1)
    checks = {check["name"]: check for check in found["checks"]}
    assert checks.keys() >= {"python", "cpu", "memory", "gpu", "memory backend", "c++ compiler", "disk", "runs folder"}
    assert all(check.keys() == {"name", "ok", "detail", "fix"} for check in found["checks"])
    assert found["ok"] is all(check["ok"] for check in found["checks"])
    assert all(check["fix"] is None for check in found["checks"] if check["ok"])
    assert not (tmp_path / "runs").exists()


def test_doctor_knocks_at_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> tuple[dict[str, Any], dict[str, Any]]:
        checks = {check["name"]: check for check in result(nestling("doctor", "--json"))["checks"]}
        return checks["ray cluster"], checks["tracking"]

    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", place)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{place}")
        assert all(check["ok"] for check in found())
    monkeypatch.setenv("RAY_ADDRESS", f"ray://{place}")
    ray, tracking = found()
    assert not ray["ok"] and f"RAY_ADDRESS=ray://{place} does not answer" in ray["detail"] and "unset" in ray["fix"]
    assert not tracking["ok"] and "secret" not in tracking["detail"]


def test_doctor_says_what_to_fix(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = nestling("doctor", f"run.dir={tmp_path}/file", "--json")
    assert ended.exit_code == 1
    check = result(ended)["checks"][-1]
    assert check["ok"] is False
    assert "cannot be written" in check["detail"] and "choose another folder with run.dir=DIR" in check["fix"]

"""What `nestling stream` and `nestling status` say and refuse; real streams are in test_stream_faults."""

import json

import pytest
from typer.testing import CliRunner

from nestling.config import load, to_yaml
from nestling.jobs.app import app
from nestling.tracking import RunFolder
from nestling.tracking.figures import stream_figure
from nestling.tracking.files import replace_json


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("NESTLING_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "runs"


def call(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def folder(runs, tmp_path):
    """A stream that stands at byte 6 of a file of 15."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("first\nand the \n")
    folder = RunFolder.create(runs, "news")
    folder.update(kind="stream", status="interrupted")
    config = load("jobs/five-domains.yaml", [f"data.source={texts}", f"run.dir={runs}"], streamed=True)
    folder.config.write_text(to_yaml(config))
    folder.log.write_text(
        json.dumps({"step": 7, "train/tokens": 700.0, "prequential/bits_per_byte": 4.5, "levels/level1/updates": 7.0})
        + "\n"
        + json.dumps({"step": 8, "train/tokens": 800.0, "probe/english/bits_per_byte": 3.25})
        + "\n"
    )
    folder.event("checkpoint", "step 5 saved to /there/step-00000005", step=5)
    for _ in range(2):  # the second after a crash
        folder.event("drift", "step 6: the loss has risen", step=6, window=2)
    replace_json(folder.position, {"window": 3, "offsets": {str(texts / "a.txt"): 6}})
    return folder


def test_status_says_where_a_stream_stands(folder):
    found = json.loads(call("status", "news", "--json").stdout.splitlines()[-1])
    (path,) = found["offsets"]
    assert found == {
        **{"run_id": folder.run_id, "state": "interrupted", "steps": 8, "tokens": 800, "lag": {path: 9}},
        **{"prequential_bits_per_byte": 4.5, "probes": {"english": 3.25}, "levels": {"level1": 7}, "rollbacks": 0},
        **{"drifts": [{"step": 6, "window": 2}], "snapshot": "/there/step-00000005", "tokens_per_second": None},
        **{"offsets": {path: 6}, "window": 3, "changes": [], "sources": {}},
    }
    said = call("status", "news").stdout
    for part in ("window 3;", "6 (9 behind)", "4.500 bits per byte", "english 3.250", "step 6", "step-00000005"):
        assert part in said


def test_status_of_several_sources(folder, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    (more / "b.txt").write_text("a word\n")
    sources = f"[{{source: {tmp_path}/texts}}, {{source: {more}, name: mood, levels: [level1, base]}}]"
    config = load("jobs/five-domains.yaml", [f"stream.sources={sources}", f"run.dir={tmp_path}/runs"], streamed=True)
    folder.config.write_text(to_yaml(config))
    replace_json(folder.position, {"window": 3, "offsets": {f"texts/{tmp_path}/texts/a.txt": 6}})
    with folder.log.open("a") as log:
        log.write(json.dumps({"step": 9, "stream/records/texts": 4.0, "prequential/texts/bits_per_byte": 5.0}) + "\n")
    found = json.loads(call("status", "news", "--json").stdout.splitlines()[-1])
    assert found["lag"] == {f"texts/{tmp_path}/texts/a.txt": 9, f"mood/{more}/b.txt": 7}
    assert found["sources"] == {
        "texts": {"records": 4, "levels": None},
        "mood": {"records": 0, "levels": ["level1", "base"]},
    }
    said = call("status", "news").stdout
    assert "texts, 4 records, writes every level; mood, 0 records, writes level1, base" in said


def test_a_source_that_does_not_answer_leaves_the_lag_open(folder, tmp_path):
    (tmp_path / "texts" / "a.txt").unlink()
    (tmp_path / "texts").rmdir()
    found = json.loads(call("status", "news", "--json").stdout.splitlines()[-1])
    assert found["lag"] is None and found["steps"] == 8
    assert "unknown: the source does not answer" in call("status", "news").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stream"], "needs a JOB, or --resume RUN or --verify RUN"),
        (["stream", "--resume", "news", "--verify", "news"], "give one of them"),
        (["stream", "--resume", "plain"], "is no stream; nestling resume goes on with a training"),
        (["resume", "news"], "is a stream: nestling stream --resume"),
        (["train", "five-domains"], "training.steps: got null, which only a stream can have"),
        (["train", "five-domains", "training.steps=3"], "is a stream: nestling stream JOB, and not nestling train"),
        (["train", "quickstart", "stream.sources=[{source: tests}]"], "stream.sources: only a stream reads them"),
        (["stream", "quickstart"], "which ends and has no order in time; a stream takes embedded:five-domains"),
        (["stream", "quickstart", "data.source=kafka://x"], "needs kafka://HOST:PORT/TOPIC"),
        (["stream", "quickstart", "data.source=python:a:b"], "with a module that the workers can import"),
        (["stream", "quickstart", "data.source=no/such/folder"], "does not exist"),
        (["stream", "five-domains", "stream.lateness=3"], "name the field that holds it with stream.time_column"),
        (["stream", "five-domains", "training.schedule=cosine"], "needs to know the last step"),
        (["stream", "five-domains", "training.checkpoint_every=0"], "what a stream has not saved it reads again"),
        (["stream", "five-domains", "stream.window_byte=3"], "the nearest known one is stream.window_bytes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(folder, runs, arguments, message):
    RunFolder.create(runs, "plain").update(status="interrupted")
    before = sorted(path.name for path in runs.iterdir())
    result = call(*arguments)
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")
    assert sorted(path.name for path in runs.iterdir()) == before


def test_other_verbs_take_the_job_of_a_stream(runs):
    resolved = json.loads(call("config", "five-domains", "--json").stdout.splitlines()[-1])
    assert resolved["training"]["steps"] is None and resolved["stream"]["probe_every"] == 75
    assert call("levels", "five-domains").exit_code == 0


def test_a_stream_has_no_heldout_text(folder):
    folder.update(status="finished", steps=8)
    folder.weights.write_bytes(b"")
    result = call("evaluate", "news")
    assert result.exit_code == 1 and "no held-out text but its probes" in result.output.replace("\n", " ")


def test_the_picture_of_a_stream(tmp_path):
    records = [{"step": n, "prequential/fading_bits_per_byte": 8 / n, "probe/a/bits_per_byte": 5.0} for n in (1, 2, 3)]
    stream_figure(records, tmp_path / "a.png", [2], "news", ["probe/a/bits_per_byte"])
    assert (tmp_path / "a.png").stat().st_size > 10_000

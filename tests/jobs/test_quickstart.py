"""The quickstart as a person runs it: the real command line, real workers, and the control that must not learn."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nestling.data import DOMAINS

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"


def nestling(runs, *arguments):
    """Run a verb with --json; its exit code and what the last line of its standard output says."""
    done = subprocess.run(
        [sys.executable, "-m", "nestling.jobs.app", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "NESTLING_RUNS": str(runs)},
    )
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_learns_english(tmp_path):
    """The job as it ships, but for a quarter of its steps."""
    code, trained = nestling(tmp_path / "runs", "train", JOB, "training.steps=250")
    assert code == 0 and trained["status"] == "finished"
    assert trained["heldout_bits_per_byte"] <= 2.95
    assert trained["heldout_bits_per_byte"] <= trained["unigram_bits_per_byte"] - 0.4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_own_texts_of_shuffled_bytes_stay_at_the_unigram_line(tmp_path):
    """The quickstart's own corpus with every order destroyed: a model that does better has seen what it should not."""
    text = [c for _, document in DOMAINS["english"]() for c in document if c.isascii()]
    random.Random(0).shuffle(text)
    pieces = ["".join(text[start : start + 8192]) for start in range(0, len(text), 8192)]
    texts, runs = tmp_path / "texts", tmp_path / "runs"
    texts.mkdir()
    for number, piece in enumerate(pieces):
        (texts / f"{number}.txt").write_text(piece)
    shorter = ["training.steps=150", "training.evaluate_every=0", "evaluation.final_tokens=65536", "training.workers=1"]
    code, trained = nestling(runs, "train", JOB, f"data.source={texts}", *shorter, "run.name=own")
    assert code == 0 and trained["status"] == "finished"
    assert (trained["steps"], trained["tokens"]) == (150, 150 * 512)
    unigram = trained["unigram_bits_per_byte"]
    assert unigram - 0.03 < trained["heldout_bits_per_byte"] < unigram + 0.1

    code, listed = nestling(runs, "runs")
    assert [run["name"] for run in listed["runs"]] == ["own"]
    assert listed["runs"][0]["heldout_bits_per_byte"] == trained["heldout_bits_per_byte"]

"""Studies behind the tables in docs/results.md: arms of the quickstart job, trained with the command line itself.

    python tests/benchmarks/studies.py models     HOPE and the Transformer: same parameters, tokens and tuned rate
    python tests/benchmarks/studies.py memory     which initialisation and gates make the memory useful

Every arm is `nestling train jobs/quickstart.yaml` on one worker with some keys changed; seeds are 0, 1, 2 (the same
order of the data in every arm). The learning rate of the study `models` is chosen on seed 0. Writes
docs/results/<study>.json, .md and .png. Two runs at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nestling.config import load
from nestling.models.config import SkeletonConfig
from nestling.models.parameters import match_parameters, parameter_count

JOB = "jobs/quickstart.yaml"
SEEDS = (0, 1, 2)
RATES = (1e-3, 2e-3, 5e-3, 1e-2)
#: What is changed in the quickstart job; the first arm is the job as it is.
MEMORY_ARMS = {
    "defaults": [],
    "trained without writes": ["model.eta_bias=-40"],
    "both layers written": ["model.erase=all", "model.write=all"],
    "the paper's formula": [
        "model.erase=all",
        "model.write=all",
        "model.decay_to=zero",
        "model.alpha_bias=4",
        "model.eta_bias=0",
    ],
}


def model_config(overrides: Sequence[str]) -> SkeletonConfig:
    return load(JOB, [*overrides, "model.vocab_size=257"]).model


@cache
def transformer() -> tuple[str, ...]:
    """Overrides that make the Transformer with as many parameters as the quickstart's HOPE."""
    name = "model.name=transformer"
    matched = match_parameters(model_config([name]), model_config([]))
    return name, *(f"model.{field}={getattr(matched, field) or 'null'}" for field in ("width", "mlp_width"))


def train(name: str, overrides: list[str], seed: int, runs: Path) -> dict:
    """One run; what it printed as JSON, its evaluation, and its number of parameters."""
    command = [sys.executable, "-m", "nestling.jobs.app", "train", JOB, f"run.dir={runs}", f"seed={seed}"]
    command += ["training.workers=1", "training.zero_stage=0", "--json", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    summary = json.loads(done.stdout.splitlines()[-1])
    evaluation = json.loads((Path(summary["run_dir"]) / "evaluation.json").read_text())
    print(f"{name}, seed {seed}: {summary['heldout_bits_per_byte']:.3f} bits per byte", flush=True)
    return {
        "arm": name,
        "seed": seed,
        "parameters": parameter_count(model_config(overrides)),
        "trained_tokens": summary["tokens"],
        **summary,
        **evaluation,
    }


def run_all(arms: dict[str, list[str]], seeds: tuple[int, ...], runs: Path) -> list[dict]:
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train, name, arm, seed, runs) for name, arm in arms.items() for seed in seeds]
        return [job.result() for job in jobs]


def models(runs: Path) -> tuple[list[dict], dict]:
    families = {"HOPE": [], "Transformer": list(transformer())}
    arms = {
        f"{family}, rate {rate:g}": [*overrides, f"training.learning_rate={rate}"]
        for family, overrides in families.items()
        for rate in RATES
    }
    tuning = run_all(arms, SEEDS[:1], runs)
    best = {}
    for family in families:
        tried = [result for result in tuning if result["arm"].startswith(family)]
        best[family] = min(tried, key=lambda result: result["heldout_bits_per_byte"])["arm"]
    rest = run_all({arm: arms[arm] for arm in best.values()}, SEEDS[1:], runs)
    results = [result for result in [*tuning, *rest] if result["arm"] in best.values()]
    return results, {result["arm"]: result["heldout_bits_per_byte"] for result in tuning}


def memory(runs: Path) -> tuple[list[dict], dict]:
    return run_all(MEMORY_ARMS, SEEDS, runs), {}


def table(results: list[dict], tuning: dict) -> str:
    """Markdown: mean over seeds, with the range in brackets."""

    def cell(rows: list[dict], key: str) -> str:
        values = [row[key] for row in rows]
        if None in values:
            return "-"
        return f"{statistics.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"

    columns = {
        "held-out": "heldout_bits_per_byte",
        "writes on (part)": "writes_on_bits_per_byte",
        "writes off (same part)": "writes_off_bits_per_byte",
        "second copy": "second_copy_bits_per_byte",
        "after another": "after_another_bits_per_byte",
    }
    lines = [
        f"Bits per byte, mean of seeds {', '.join(map(str, SEEDS))} [lowest, highest]; the unigram entropy of the "
        f"held-out text is {results[0]['unigram_bits_per_byte']:.3f}. "
        f"Tokens trained on: {results[0]['trained_tokens']:,}.",
        "",
        f"| arm | parameters | {' | '.join(columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for arm in dict.fromkeys(result["arm"] for result in results):
        rows = [result for result in results if result["arm"] == arm]
        cells = " | ".join(cell(rows, key) for key in columns.values())
        lines.append(f"| {arm} | {rows[0]['parameters']:,} | {cells} |")
    if tuning:
        lines += ["", "Learning rates tried on seed 0: " + ", ".join(f"{a}: {v:.3f}" for a, v in tuning.items()) + "."]
    return "\n".join(lines) + "\n"


def figure(results: list[dict], path: Path) -> None:
    """Loss by position in the sequence, one line an arm, a band over the seeds."""
    _, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    length = load(JOB).data.sequence_length
    for arm in dict.fromkeys(result["arm"] for result in results):
        rows = list(zip(*(r["bits_per_byte_by_position"] for r in results if r["arm"] == arm), strict=True))
        places = [(place + 0.5) * length / len(rows) for place in range(len(rows))]
        (line,) = axes.plot(places, [statistics.mean(row) for row in rows], marker="o", label=arm)
        axes.fill_between(
            places, [min(row) for row in rows], [max(row) for row in rows], alpha=0.2, color=line.get_color()
        )
    axes.set(xlabel="position in the sequence (bytes)", ylabel="held-out bits per byte")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    plt.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("models", "memory"))
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="where the runs are kept")
    arguments = parser.parse_args()
    results, tuning = {"models": models, "memory": memory}[arguments.study](arguments.runs)
    target = Path("docs/results") / arguments.study
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = [
        {key: value for key, value in result.items() if key not in ("run_dir", "tracking_uri")} for result in results
    ]
    target.with_suffix(".json").write_text(json.dumps({"tuning": tuning, "runs": kept}, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(results, tuning))
    figure(results, target.with_suffix(".png"))
    print(table(results, tuning))


if __name__ == "__main__":
    main()

"""A pretrained model becomes a run, trains on with its levels at their periods, goes out again, and a level travels."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from nestling.checkpoint import load_final
from nestling.checkpoint.layouts import config_json
from nestling.checkpoint.level_file import read_level, write_level
from nestling.checkpoint.pretrained import write_pretrained
from nestling.config import ConfigError, from_yaml
from nestling.data import Tokenizer
from nestling.jobs.app import app
from nestling.models import HopeAttentionConfig, build
from nestling.tracking import RunFolder, find_run
from nestling.training.adapt import stacked
from nestling.training.resume import resumed_job

MODEL = HopeAttentionConfig(
    vocab_size=260, width=32, layers=5, heads=4, kv_heads=2, mlp_width=24, conv_width=0, level_widths=[]
)
SHORT = ["data.sequence_length=32", "training.batch_tokens=128", "training.log_every=1", "training.warmup_steps=1"]
SHORT += ["evaluation.tokens=128", "evaluation.final_tokens=256", "training.evaluate_every=0"]


def pretrain(folder: Path, seed: int) -> Path:
    """A pretrained model in Hugging Face's layout, with random weights."""
    folder.mkdir()
    torch.manual_seed(seed)
    weights = {name: p.detach() for name, p in build(MODEL).named_parameters()}
    write_pretrained(folder, MODEL, config_json(MODEL, 128, 256) | {"note": "kept"}, weights.__getitem__)
    Tokenizer.bytes().save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(tmp_path_factory.mktemp("pretrained") / "tiny", seed=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _environment(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NESTLING_RUNS", str(runs))
    for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    yield


def nestling(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def result(*arguments: object) -> dict[str, Any]:
    ended = nestling(*arguments, "--json")
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout)


def refused(*arguments: object, code: int = 2) -> str:
    ended = nestling(*arguments, "--json")
    assert ended.exit_code == code, ended.output
    return json.loads(ended.stdout)["error"]


def adapted(runs: Path, base: Path, *arguments: object) -> RunFolder:
    return find_run(runs, result("adapt", base, *arguments)["run_id"])


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_final(run)[0].named_parameters()}


def test_levels_take_whole_layers() -> None:
    def layers(*arguments: Any) -> list[list[int]]:
        return [level["layers"] for level in stacked(*arguments)]

    assert layers(5, [1, 4], "steps", False) == [[0, 1, 2], [3, 4]]
    assert layers(8, [1, 4, 16], "steps", False) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert layers(5, [1, 4, 16], "steps", True) == [[0, 3], [1, 4], [2]]
    assert [level["period"] for level in stacked(5, [1, 4, 16], "tokens", True)] == [1, 4, 16]
    with pytest.raises(ConfigError, match="got 3 periods, needs 1 to 2"):
        stacked(2, [1, 2, 3], "steps", False)


def test_an_adapted_run_is_a_run(runs: Path, base: Path) -> None:
    found = result("adapt", base, "--levels", "1,2,8", "--name", "mine", f"data.source={base}", "levels.1.name=middle")
    run = find_run(runs, "mine")
    assert found["run_id"] == run.run_id and found["parameters"] == sum(p.numel() for p in weights(run).values())
    assert [(level["name"], level["period"], level["layers"]) for level in found["levels"]] == [
        ("level1", 1, [0, 1]),
        ("middle", 2, [2, 3]),
        ("level3", 8, [4]),
    ]
    torch.manual_seed(0)
    first = build(MODEL)
    text = torch.arange(40)[None]
    assert torch.equal(load_final(run)[0](text)[0], first(text)[0])
    assert run.tokenizer.read_text() == (base / "tokenizer.json").read_text()
    info = run.info()
    assert (info["status"], info["steps"], info["tokens"]) == ("finished", 0, 0)
    assert Path(info["checkpoint"]).name == "step-00000000"
    listed = {each["run_id"]: each for each in result("runs")["runs"]}
    assert listed[run.run_id]["status"] == "finished" and listed[run.run_id]["steps"] == 0

    def sampled(*rates: float) -> str:
        stream = ("continuum.drive=stream", "continuum.periods=[4, 8, 16]", f"continuum.rates={list(rates)}")
        reading = ("generate", "mine", "--prompt", "text to learn from while it is read", "--max-tokens", 12)
        found = result(*reading, *(stream if rates else ()))
        assert found["tokens"] <= 12
        return found["text"]

    assert sampled() == sampled(0, 0, 0) != sampled(10, 10, 10)

    from mlflow import MlflowClient

    recorded = MlflowClient(info["tracking_uri"]).get_run(info["mlflow_run_id"])
    assert recorded.info.status == "FINISHED" and recorded.data.params["levels.1.period"] == "2"


def test_out_again_with_what_it_came_with(runs: Path, base: Path, tmp_path: Path) -> None:
    run = adapted(runs, base)
    found = result("export", run.run_id, "--out", tmp_path / "out", "--format", "hf")
    assert set(found["files"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert found["step"] == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["note"] == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "1,x"], "--levels: got '1,x', needs periods"),
        (["--levels", "16,4,1"], "--levels: got '16,4,1', needs the fastest first: --levels 1,4,16"),
        (["--levels", "0"], "--levels: got '0', needs periods"),
        (["--levels", "1,1,1,1,1,1"], "--levels: got 6 periods, needs 1 to 5"),
        (["model.width=64"], "model: is what the pretrained model says"),
        (["levels=[]"], "levels: the layers of each level follow from --levels"),
        (["training.stepz=3"], "training.stepz: unknown key"),
        (["data.source=/no/such"], "data.source: /no/such does not exist"),
        (["data.tokenizer=/no/such"], "there is no file /no/such"),
        (["--name", "latest"], "run.name: 'latest' stands for the newest run"),
    ],
    ids=str,
)
def test_wrong_usage_leaves_nothing_behind(base: Path, arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused("adapt", base, *arguments, f"run.dir={tmp_path}/runs")
    assert not (tmp_path / "runs").exists()


def test_places_that_cannot_be_written(runs: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"run.dir: got {tmp_path}/file/x, needs a folder" in refused("adapt", base, f"run.dir={tmp_path}/file/x")
    run = adapted(runs, base)
    assert f"--out: got {tmp_path}/file/x, needs a folder" in refused(
        "export", run.run_id, "--out", tmp_path / "file/x"
    )


def test_a_folder_that_cannot_be_adapted(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    place = f"run.dir={tmp_path}/runs"
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    assert "has a tokenizer.model and no tokenizer.json" in refused("adapt", copy, place)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    assert "model_type: got 'mixtral'" in refused("adapt", copy, place)
    assert not (tmp_path / "runs").exists()
    (copy / "tokenizer.model").rename(copy / "tokenizer.json")
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, copy / "model.safetensors")
    assert "not finite" in refused("adapt", copy, place, code=1)
    assert not list((tmp_path / "runs").iterdir())


def test_before_its_first_step_everything_but_the_model_can_change(runs: Path, base: Path) -> None:
    run = adapted(runs, base)
    changed = resumed_job(run, [*SHORT, "seed=3", "levels.0.period=2", "training.steps=3", "data.heldout_percent=20"])
    assert (changed.seed, changed.data.sequence_length, changed.levels[0].period) == (3, 32, 2)
    other = resumed_job(run, ["levels=[{period: 3, layers: [1, 3]}, {period: 9, parameters: ['*norm*']}]"])
    assert isinstance(other.model, HopeAttentionConfig) and other.model.level_layers == [[1, 3]]
    for key in ("model.window=3", "data.tokenizer=bytes", "run.name=other"):
        with pytest.raises(ConfigError, match=f"^{key.partition('=')[0]}: is .* and cannot become") as error:
            resumed_job(run, [key])
        assert "level_layers" not in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_moves_each_level_at_its_period(
    runs: Path, base: Path, ray_local: None, tmp_path: Path, embedded_texts: Path
) -> None:
    from nestling.training import fit

    copy = shutil.copytree(base, tmp_path / "tiny")
    run = adapted(runs, copy, "--levels", "1,2,8")
    shutil.rmtree(copy)  # the run has all that it needs
    before, spread = weights(run), ["training.workers=2", "training.zero_stage=2", "training.checkpoint_every=2"]
    summary = fit(resumed_job(run, [*SHORT, *spread, f"data.source={embedded_texts}", "training.steps=3"]), run)
    assert (summary.status, summary.steps, summary.tokens) == ("finished", 3, 384)
    updates = [[record[f"levels/level{n}/updates"] for n in (1, 2, 3)] for record in run.records()]
    assert updates == [[1, 0, 0], [2, 1, 0], [3, 1, 0]]
    after = weights(run)
    moved = {layer for layer in range(5) if any(not torch.equal(before[n], after[n]) for n in mlp(layer, before))}
    assert moved == {0, 1, 2, 3}
    assert not torch.equal(before["embedding.weight"], after["embedding.weight"])

    # The level that has learnt enters a fresh copy of the base.
    other = adapted(runs, base, "--levels", "1,2,8")
    result("memory", "export", run.run_id, "--level", "level2", "--out", tmp_path / "level")
    manifest = json.loads((tmp_path / "level" / "manifest.json").read_text())
    assert (manifest["level"], manifest["period"], manifest["steps"], manifest["tokens"]) == ("level2", 2, 3, 384)
    assert result("memory", "load", other.run_id, tmp_path / "level")["rest"] == "other"
    mixed = weights(other)
    for name in before:
        assert torch.equal(mixed[name], (after if name in [*mlp(2, before), *mlp(3, before)] else before)[name]), name

    # It comes back, as if after more steps, without its optimizer state; training goes on with other workers.
    (tmp_path / "older").mkdir()
    level = read_level(tmp_path / "level")
    shapes = {name: tensor.shape for name, tensor in level.weights.items()}
    write_level(tmp_path / "older", replace(level.origin, steps=100, tokens=7000), shapes, level.weights.values())
    assert result("memory", "load", run.run_id, tmp_path / "older")["rest"] == "same"
    with pytest.raises(ConfigError, match="^data.sequence_length: is 32 .* and cannot become 64"):
        resumed_job(run, ["data.sequence_length=64", "training.steps=8"])
    alone = ["training.workers=1", "training.zero_stage=0", "training.steps=8"]
    assert fit(resumed_job(run, alone), run).steps == 8
    # Its averages, begun anew, are corrected by its own three moves.
    assert [run.records()[-1][f"levels/level{n}/updates"] for n in (1, 2, 3)] == [8, 3, 1]
    state = json.loads((Path(run.info()["checkpoint"]) / "state.json").read_text())
    assert {state["optimizer"][name]["updates"] for name in mlp(2, before)} == {3}
    assert any(not torch.equal(after[name], weights(run)[name]) for name in mlp(4, before))
    assert result("evaluate", run.run_id)["tokens"] > 0
    assert history(run, "level2", tmp_path / "again") == (105, 7000 + 5 * 128)
    assert history(run, "level1", tmp_path / "first") == (8, 8 * 128)
    result("export", run.run_id, "--out", tmp_path / "out", "--format", "hf")


def history(run: RunFolder, level: str, out: Path) -> tuple[int, int]:
    """Steps and tokens that a level has behind it, as it says when it leaves."""
    found = result("memory", "export", run.run_id, "--level", level, "--out", out)
    return found["steps"], found["tokens"]


def mlp(layer: int, names: dict[str, Any]) -> list[str]:
    return [name for name in names if name.startswith(f"blocks.{layer}.feed_forward.")]


@pytest.fixture(scope="module")
def embedded_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of text."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Document {number}: " + "a little text to learn from. " * 20)
    return folder


@pytest.fixture(scope="module")
def level(runs: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A level of a run whose second level is not that of the base any more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESTLING_RUNS", str(runs))
        run = adapted(runs, base, "--levels", "1,4")
        tensors = load_file(run.weights)
        for name in [*mlp(3, tensors), *mlp(4, tensors)]:
            tensors[name] += 1
        save_file(tensors, run.weights)
        out = tmp_path_factory.mktemp("levels") / "level2"
        result("memory", "export", run.run_id, "--level", "2", "--out", out)
    return out


def test_a_level_enters_another_copy(runs: Path, base: Path, level: Path) -> None:
    run = adapted(runs, base, "--levels", "1,4")
    before = weights(run)
    found = result("memory", "load", run.run_id, level)
    assert (found["level"], found["step"], found["rest"]) == ("level2", 0, "same")
    after = weights(run)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {*mlp(3, before), *mlp(4, before)}
    checkpoint = from_checkpoint(run)
    assert all(torch.equal(checkpoint[name], after[name]) for name in after)


def test_what_loading_a_level_says(runs: Path, base: Path, level: Path, tmp_path: Path) -> None:
    run = adapted(runs, base, "--levels", "1,64")
    run.update(status="interrupted")
    ended = nestling("memory", "load", run.run_id, level)
    assert ended.exit_code == 0 and "moved every 4 steps where it comes from, and every 64 steps here" in ended.output
    assert ended.output.count("taking the checkpoint of step 0") == 1
    assert "moved every" not in nestling("memory", "load", adapted(runs, base, "--levels", "1,4").run_id, level).output
    (tmp_path / "file").touch()
    for folder, problem in (("none", "does not exist"), ("file", "is a file")):
        message = refused("memory", "load", run.run_id, tmp_path / folder)
        assert f"DIR: got {tmp_path}/{folder}, which {problem}; needs a folder that `nestling memory exp" in message


def test_a_level_keeps_its_history(runs: Path, base: Path, level: Path, tmp_path: Path) -> None:
    entering, seen = read_level(level), tmp_path / "seen"
    seen.mkdir()
    shapes = {name: tensor.shape for name, tensor in entering.weights.items()}
    write_level(seen, replace(entering.origin, steps=40, tokens=5000), shapes, entering.weights.values())
    run = adapted(runs, base, "--levels", "1,4", "levels.1.name=slow")
    result("memory", "load", run.run_id, seen)
    assert history(run, "slow", tmp_path / "slow") == (40, 5000)
    assert history(run, "level1", tmp_path / "level1") == (0, 0)
    run.update(status="interrupted")
    assert history(run, "slow", tmp_path / "again") == (40, 5000)
    result("memory", "load", run.run_id, level)
    assert history(run, "slow", tmp_path / "last") == (0, 0)


def from_checkpoint(run: RunFolder) -> dict[str, torch.Tensor]:
    """The weights with which training would go on."""
    run.update(status="interrupted")
    return weights(run)


def test_a_level_is_refused(runs: Path, base: Path, level: Path, tmp_path: Path) -> None:
    foreign = adapted(runs, pretrain(tmp_path / "other-base", seed=1), "--levels", "1,4")
    before = fingerprint(foreign)
    own, theirs = (find_run(runs, name).info()["base"] for name in ("tiny", foreign.run_id))
    message = refused("memory", "load", foreign.run_id, level)
    assert f"belongs to the base tiny (SHA-256 {own['sha256']})" in message
    assert f"was adapted from other-base (SHA-256 {theirs['sha256']})" in message
    otherwise = adapted(runs, base, "--levels", "1,4", "--assign", "interleaved")
    assert "no level of run" in refused("memory", "load", otherwise.run_id, level)
    for file in ("level.safetensors", "manifest.json"):
        damaged = shutil.copytree(level, tmp_path / f"damaged-{file}")
        content = bytearray((damaged / file).read_bytes())
        content[-10] ^= 1
        (damaged / file).write_bytes(content)
        assert f"{file} was altered" in refused("memory", "load", foreign.run_id, damaged, code=1)
    (damaged / "manifest.json").unlink()
    assert "is not a whole level" in refused("memory", "load", foreign.run_id, damaged, code=1)
    with foreign.claim():
        assert "is being trained" in refused("memory", "load", foreign.run_id, level)
    assert fingerprint(foreign) == before
    assert "--level: got '3', needs one of level1, level2" in refused(
        "memory", "export", foreign.run_id, "--level", "3", "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def fingerprint(run: RunFolder) -> dict[str, str]:
    """Hashes of all weights of a run."""
    files = [run.weights, *run.path.glob("checkpoints/*/*")]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_run_without_a_base_has_no_levels_to_give(runs: Path, base: Path, tmp_path: Path, level: Path) -> None:
    run = adapted(runs, base)
    info = run.info()
    run.update(base=None)
    for arguments in (("export", run.run_id, "--level", "1", "--out", tmp_path / "out"), ("load", run.run_id, level)):
        assert "was not adapted from a pretrained model" in refused("memory", *arguments)
    assert info["base"]["name"] == "tiny" and from_yaml(run.config.read_text()).model.width == 32

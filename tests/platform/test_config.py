"""Job configurations: what a file and its overrides come to, and what every mistake is told."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.config import (
    ConfigError,
    DataConfig,
    JobConfig,
    LevelConfig,
    MixConfig,
    TrainingConfig,
    from_yaml,
    load,
    pick,
    to_mapping,
    to_yaml,
)
from nestling.data import Tokenizer
from nestling.models.config import MODEL_CONFIGS, HopeConfig, TransformerConfig

ROOT = Path(__file__).parents[2]
JOB = """
run: {name: small}
model: {name: hope, width: 64, layers: 1, heads: 2, chunk_size: 32}
levels: [{width: 96, period: 1}, {width: 48, period: 4}]
training: {steps: 100, batch_tokens: 1024, workers: 2}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(JOB)
    return path


def test_file_and_defaults(job: Path) -> None:
    config = load(job)
    assert config.run.name == "small"
    assert isinstance(config.model, HopeConfig)
    assert (config.model.width, config.model.chunk_size, config.model.level_widths) == (64, 32, [96, 48])
    assert [(level.name, level.period) for level in config.levels] == [("level1", 1), ("level2", 4)]
    assert config.data == DataConfig()
    assert config.training == TrainingConfig(steps=100, batch_tokens=1024, workers=2)


def test_overrides_reach_every_kind_of_value(job: Path) -> None:
    changes = ["levels.1.period=8", "training.learning_rate=1e-2", "training.betas=[0.8, 0.9]", "run.name=2024"]
    config = load(
        job, [*changes, "training.activation_checkpointing=true", "model.horizons=[4, 8]", "tracking.uri=null"]
    )
    assert config.levels == [LevelConfig(96, name="level1"), LevelConfig(48, 8, name="level2")]
    assert (config.training.learning_rate, config.training.betas) == (0.01, (0.8, 0.9))
    assert config.run.name == "2024"
    assert config.training.activation_checkpointing is True
    assert isinstance(config.model, HopeConfig) and config.model.horizons == [4.0, 8.0]


def test_a_text_is_taken_as_it_stands(job: Path) -> None:
    texts = ["run.name=007", "run.dir=/tmp/a #b", "tracking.experiment=yes", "levels.1.name=1e3", "tracking.uri=null"]
    config = load(job, [*texts, "levels.0.parameters=[a, b]", "levels.0.width=null"])
    assert (config.run.name, config.run.dir, config.tracking.experiment) == ("007", "/tmp/a #b", "yes")
    assert (config.levels[1].name, config.tracking.uri) == ("1e3", None)
    assert config.levels[0].parameters == ["a", "b"]
    assert load(job, ["model.name=transformer", "model.dtype=float32"]).model.name == "transformer"


def test_a_list_is_replaced_as_a_whole(job: Path) -> None:
    config = load(job, ["levels=[{period: 2, width: 8}]", "levels.0.period=3"])
    assert config.levels == [LevelConfig(8, 3, name="level1")]
    assert to_mapping(config)["model"]["level_widths"] == [8]


def test_values_can_refer_to_each_other_and_to_defaults(job: Path) -> None:
    assert (
        load(job, ["training.batch_tokens=${data.sequence_length}", "training.workers=1"]).training.batch_tokens == 256
    )


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 4), st.sampled_from(["cosine", "wsd", "linear"]))
def test_yaml_round_trip(period: int, sequences: int, workers: int, schedule: str) -> None:
    training = TrainingConfig(batch_tokens=32 * sequences * workers, workers=workers, schedule=schedule)  # type: ignore[arg-type]
    config = JobConfig(
        data=DataConfig(sequence_length=32, source="where/it/is/no/more"),
        model=TransformerConfig(width=32, heads=2) if workers % 2 else HopeConfig(width=32, heads=2),
        levels=[LevelConfig(8, period, "tokens"), LevelConfig(parameters=["head.*"], learning_rate=1e-5)],
        training=training,
    )
    assert from_yaml(to_yaml(config)) == config
    assert json.loads(json.dumps(to_mapping(config))) == to_mapping(config)


def test_bare_name_is_looked_up_in_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("jobs").mkdir()
    Path("jobs/small.yaml").write_text(JOB)
    assert load("small") == load("jobs/small.yaml")
    with pytest.raises(ConfigError, match="smal: no such job file.*in ./jobs: small"):
        load("smal")


def test_shipped_jobs_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in Path("jobs").glob("*.yaml"):
        assert load(path.stem).training.last_step > 0


def test_runs_folder_comes_from_the_environment(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NESTLING_RUNS", raising=False)
    assert load(job).run.dir == "runs"
    monkeypatch.setenv("NESTLING_RUNS", "/somewhere")
    assert load(job).run.dir == "/somewhere"
    assert load(job, ["run.dir=here"]).run.dir == "here"


def test_changing_the_model_drops_its_own_keys_and_says_so(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nestling"):
        config = load(job, ["model.name=transformer", "model.mlp_width=40"])
    assert config.model == TransformerConfig(width=64, layers=1, heads=2, mlp_width=40)
    assert "dropped keys of the job file that only hope has: model.chunk_size" in caplog.text
    assert "levels with a width are not used: level1, level2" in caplog.text


def test_without_that_change_the_keys_of_another_model_are_errors(job: Path) -> None:
    job.write_text(JOB.replace("name: hope", "name: transformer"))
    with pytest.raises(ConfigError, match="model.chunk_size: unknown key"):
        load(job, ["model.name=transformer"])
    job.write_text(JOB.replace("chunk_size", "chunk_sise"))
    with pytest.raises(ConfigError, match="model.chunk_sise: unknown key"):
        load(job, ["model.name=transformer"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", "training.stepz: unknown key; the nearest known one is training.steps"),
        ("train.steps=3", "train.steps: unknown key; the nearest known one is training.steps"),
        ("learning_rate=3", "learning_rate: unknown key; the nearest known one is training.learning_rate"),
        ("levels.1.perod=3", "levels.1.perod: unknown key; the nearest known one is levels.1.period"),
        ("levels=[{width: 8}, {widht: 8}]", "levels.1.widht: unknown key; the nearest known one is levels.1.width"),
        ("model.with=3", "model.with: unknown key; the nearest known one is model.width"),
        ("model.name=hop", "model.name: got 'hop', needs one of " + ", ".join(MODEL_CONFIGS)),
        ("model.name=[hope]", "model.name: got '[hope]', needs one of " + ", ".join(MODEL_CONFIGS)),
        ("model={name: [hope]}", "model.name: got ['hope'], needs one of " + ", ".join(MODEL_CONFIGS)),
        ("model.vocab_size=300", "model.vocab_size: got 300, the tokenizer has 257 tokens; leave model.vocab_size out"),
        ("model={name: hope_attention, mlp_width: 8}", "levels: got widths"),
        ("levels=[{layers: [0]}]", "levels: got layers [[0]], which needs model.name=hope_attention"),
        ("training.steps=many", "training.steps: got 'many', needs a whole number"),
        ("training.steps=1.5", "training.steps: got 1.5, needs a whole number"),
        ("training.micro_batch=a", "training.micro_batch: got 'a', needs a whole number or null"),
        ("training.clip=[1]", "training.clip: got [1], needs a number"),
        ("training.betas=[0.9]", "training.betas: got [0.9], needs two numbers, such as [0.9, 0.98]"),
        ("training.device=gpu", "training.device: got 'gpu', needs one of auto, cpu, cuda"),
        ("levels=[{width: 8}, {width: a}]", "levels.1.width: got 'a', needs a whole number or null"),
        ("levels=3", "levels: got 3, needs a list, for example [{period: 1, width: 64}]"),
        ("levels=[{width: 8, name: base}]", "levels.0.name: got base, which is what is in no level"),
        ("levels=[3]", "levels.0: got 3, needs a mapping with keys such as width, period, unit"),
        ("training=3", "training: got 3, needs a mapping with keys such as steps, batch_tokens, micro_batch"),
        ("levels.2.width=3", "levels.2.width: no such element, levels has 2 elements, counted from 0; give the whole"),
        ("training.steps.x=3", "training.steps.x: training.steps is a value and has no keys"),
        ("training.steps", "training.steps: is no override, needs key=value, for example training.steps=100"),
        ("training.steps=[1", "training.steps: the value '[1' is no YAML"),
        ("training.steps=${run.nam}", "training.steps: Interpolation key 'run.nam' not found"),
        ("training.steps=0", "training.steps: got 0, needs at least 1"),
        ("training.zero_stage=4", "training.zero_stage: got 4, needs 0, 1, 2 or 3"),
        ("training.learning_rate=.nan", "training.learning_rate: got nan, needs a finite value above 0"),
        ("training.betas=[0.9, 1]", "training.betas: got [0.9, 1.0], needs two values from 0 to below 1"),
        ("data.heldout_percent=100", "data.heldout_percent: got 100.0, needs a value above 0 and below 100"),
        ("run.name=a/b", "run.name: got 'a/b', needs letters, digits,"),
        ("run.name=null", "run.name: got None, needs text"),
        ("run.dir=", "run.dir: got an empty text, needs a folder"),
        ("run.dir=what?", "what? has a '?' in it, which MLflow's database cannot have in its path"),
        ("run.name=latest", "run.name: 'latest' stands for the newest run; choose another name"),
        ("seed=-1", "seed: got -1, needs a whole number from 0 to 4294967295"),
        ("model.heads=3", "model.heads: 3 heads do not divide model.width=64"),
        ("model.chunk_size=0", "model.chunk_size: got 0, needs at least 1"),
        ("levels.1.period=0", "levels.1.period: got 0, needs at least 1"),
        ("levels.0.width=null", "levels.0: got none of width, layers and parameters, needs one of them"),
        ("levels.0.parameters=[a]", "levels.0: got width and parameters of width, layers and parameters, needs one"),
        ("levels.0.name=level2", "levels.1.name: 'level2' is the name of levels.0 too; give each level a name"),
        ("levels.0.name=a/b", "levels.0.name: got 'a/b', needs letters"),
        (
            "training.batch_tokens=1500",
            "training.batch_tokens: got 1500, needs a multiple of 512 (data.sequence_length=256",
        ),
        ("training.batch_tokens=1500", "nearest: 1024 or 1536"),
        ("training.batch_tokens=100", "nearest: 512"),
        ("training.workers=3", "needs a multiple of 768 (data.sequence_length=256 x training.workers=3)"),
        (
            "training.micro_batch=3",
            "x training.micro_batch=3), so that every worker gets whole sequences; nearest: 1536",
        ),
        (
            "data.source=",
            "data.source: got an empty text, needs a text, JSONL or Parquet file, a folder, a glob, a URI",
        ),
        ("data.mix=[]", "data.mix: got an empty list, needs at least one source, for example [{source: embedded:"),
        ("data.mix=english", "data.mix: got 'english', needs a list, for example [{source: embedded:english, weight"),
        ("data.mix=[{weight: 2}]", "data.mix.0.source: is missing, and has no default; give a value"),
        ("data.mix=[{source: a, wait: 2}]", "data.mix.0.wait: unknown key; the nearest known one is data.mix.0.weight"),
        ("data.mix=[{source: a, weight: 0}]", "data.mix.0.weight: got 0.0, needs a finite value above 0"),
        ("data.mix=[{source: a, name: b/c}]", "data.mix.0.name: got 'b/c', needs letters, digits,"),
        (
            "data.mix=[{source: embedded:english}, {source: other/english.txt}]",
            "data.mix.1.name: 'english' is the name of data.mix.0 too; give each source a name of its own",
        ),
        (
            "data.mix=[{source: embedded:english}, {source: embedded:python, weight: 1.0e-5}]",
            "the weight 1e-05 of 'python' is less than one sequence in 1024; needs at least 0.000978",
        ),
        ("data.mix=[{source: embedded:english}, {source: no/such}]", "data.mix.1.source: "),
        ("data.source=no://such/place", "data.source: no://such/place cannot be opened: "),
        ("data.source=file:///no/such/place", "data.source: /no/such/place does not exist; give a text, JSONL"),
        ("data.separator=</s>", "data.separator: got '</s>', but the byte tokenizer has a separator of its own"),
        ("data.source=no/such/folder", "no/such/folder does not exist"),
        ("data.source=embedded:englsh", "there is no embedded domain 'englsh', did you mean 'english'"),
        ("data.tokenizer=no/such/file", "there is no file no/such/file"),
    ],
)
def test_mistakes(job: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError) as error:
        load(job, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ("[{layers: [0]}, {layers: [5]}]", "levels.1.layers: got [5], needs layers from 0 to 1 (model.layers=2)"),
        ("[{layers: [1, -1]}]", "levels.0.layers: got [1, -1], needs layers from 0 to 1"),
        ("[{layers: [0]}, {layers: [1, 0]}]", "levels.1.layers: got [1, 0], but layer 0 is in levels.0.layers already"),
        ("[{width: 8}, {layers: [0, 0]}]", "levels: got widths [8]"),
        ("[{parameters: [a]}, {layers: [0, 0]}]", "levels.1.layers: got [0, 0], but layer 0 is in levels.1.layers alr"),
    ],
)
def test_layers_of_levels(job: Path, levels: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(job, ["model={name: hope_attention, width: 64, heads: 2, layers: 2, mlp_width: 8}", f"levels={levels}"])
    assert str(error.value).startswith(message)


STREAM = ["continuum.drive=stream", "continuum.periods=[4, 16]", "continuum.rates=[0.1, 0.1]"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["continuum.drive=online"], "continuum.drive: got 'online', needs one of schedule, stream, meta"),
        (["continuum.rates=[0.1]"], "continuum: got 2 periods and 1 rates, needs 2 of each, for level1, level2"),
        (["continuum.periods=[4, 0]"], "continuum.periods: got [4, 0], needs whole numbers of at least 1"),
        (["continuum.rates=[0.1, -1]"], "continuum.rates: got [0.1, -1.0], needs finite numbers of at least 0"),
        (
            ["continuum.periods=[4, 6]", "model.level_variant=nested", "levels.1.period=8"],
            "continuum.periods: got [4, 6], nested levels need each to be a multiple of the one before",
        ),
        (["model.name=transformer"], "continuum.drive: got stream, which needs a model with a Continuum Memory System"),
        (["levels=[{parameters: [head*]}]"], "continuum: the model has no level that could move"),
        (["continuum.drive=schedule", "continuum.rates=[-1]"], "continuum.rates: got [-1.0], needs finite numbers"),
        (
            ["training.zero_stage=3"],
            "training.zero_stage: got 3, which cuts up the weights that continuum.drive=stream",
        ),
        (["training.activation_checkpointing=true"], "training.activation_checkpointing: got true, but with continuum"),
        (["continuum.drive=meta", "levels.0.optimizer=delta_gradient_descent"], "delta_gradient_descent: needs layers"),
    ],
)
def test_levels_that_cannot_move_while_reading(job: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(job, [*STREAM, *overrides])
    assert str(error.value).startswith(message)


def test_a_continuum_that_is_not_used_is_worth_a_warning(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(job, STREAM).continuum.rates == [0.1, 0.1] and not caplog.text
    load(job, [*STREAM, "continuum.drive=schedule"])
    assert "continuum.periods and rates are not used" in caplog.text
    load(job, [*STREAM, "continuum.periods=[4, 256]", "continuum.second_order=true"])
    assert "continuum.second_order is not used" in caplog.text and "never moves" in caplog.text


def test_nested_levels_fit_into_each_other(job: Path) -> None:
    config = load(job, ["model.level_variant=nested", "levels.0.period=2"])
    assert config.model.level_variant == "nested"  # type: ignore[attr-defined]
    needs = {
        "levels.0.period=3": "each period to be a multiple of the one before",
        "levels.1.unit=tokens": "the same unit",
    }
    for change, need in needs.items():
        with pytest.raises(ConfigError, match=f"level_variant=nested needs {need}"):
            load(job, ["model.level_variant=nested", change])
        load(job, [change])


def test_a_separator_that_the_tokenizer_does_not_have(job: Path, tmp_path: Path) -> None:
    Tokenizer.bytes().save(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="its vocabulary has no token '</s>'; name one that it has"):
        load(job, [f"data.tokenizer={tmp_path}/tokenizer.json", "data.separator=</s>"])


def test_a_mix(job: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wiki.jsonl.gz").write_bytes(b"not looked into here")
    mix = f"data.mix=[{{source: embedded:python, weight: 2}}, {{source: {tmp_path}/wiki.*, column: body}}]"
    with caplog.at_level(logging.WARNING):
        config = load(job, [mix, "data.source=embedded:english"])
    assert "data.source is not used: data.mix takes its place" in caplog.text
    assert config.data.mix == [
        MixConfig("embedded:python", None, "python", 2.0),
        MixConfig(f"{tmp_path}/wiki.*", "body", tmp_path.name, 1.0),
    ]
    assert from_yaml(to_yaml(config)) == config
    assert load(job, [mix, "data.mix.1.weight=3", "data.mix.1.name=7"]).data.mix[1] == MixConfig(
        f"{tmp_path}/wiki.*", "body", "7", 3.0
    )
    assert load(job, [mix, "data.mix=null"]).data.mix is None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("embedded:english", "english"),
        ("/texts/wiki.jsonl.gz", "wiki"),
        ("texts/wiki/", "wiki"),
        ("wiki/**/*.txt", "wiki"),
        ("my texts.txt", "my-texts"),
        ("s3://bucket/wiki?endpoint_override=localhost:9000&scheme=http", "wiki"),
        ("*.txt", "text"),
    ],
)
def test_a_source_of_a_mix_has_a_name(source: str, name: str) -> None:
    (part,) = DataConfig(mix=[MixConfig(source)]).mix or ()
    assert part.name == name


def test_a_warm_up_as_long_as_the_training_is_worth_a_warning(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(job, ["training.warmup_steps=99"])
    assert not caplog.records
    load(job, ["training.warmup_steps=100"])
    assert "training.warmup_steps=100 takes up all of training.steps=100" in caplog.text


def test_unreadable_job_files(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    for content, message in (
        (b"model: {width: ", "is no valid YAML"),
        (b"seed: 1\nseed: 2\n", "duplicate key"),
        (b"- 1\n", "holds a list, needs a mapping of sections"),
        (b"seed: \xff\n", "cannot be read as a job file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as error:
            load(path)
        assert str(path) in str(error.value)
    with pytest.raises(ConfigError, match="is a folder, needs a job file"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="no such job file"):
        load(tmp_path / "none.yaml")


def test_pick() -> None:
    assert pick(["run.dir=a=b"], "run.dir") == {"run.dir": "a=b"}
    assert pick(["run.dir=007"], "run.dir") == {"run.dir": "007"}
    for empty in ("run.dir=", "run.dir=null"):
        with pytest.raises(ConfigError, match="run.dir: got no value; give one, or leave run.dir out for its default"):
            pick([empty], "run.dir")
    with pytest.raises(ConfigError, match="run.dri: unknown key; the nearest known one is run.dir"):
        pick(["run.dri=a"], "run.dir")


def test_configuration_needs_neither_torch_nor_ray(job: Path) -> None:
    code = f"import sys; from nestling.config import load; load({str(job)!r}); "
    code += "print([name for name in ('torch', 'ray', 'mlflow', 'deepspeed') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"

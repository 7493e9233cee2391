"""A sweep as it can be run: its settings, its job, its arms; and its folder, from which all that comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nestling.config import ConfigError
from nestling.config.build import build_section
from nestling.config.load import changed, is_streamed, read_yaml
from nestling.tracking import RunFolder
from nestling.tuning.sweeps.arms import Arm, Arms
from nestling.tuning.sweeps.config import SweepConfig
from nestling.tuning.sweeps.outcome import trial_folders

JOB = "job.yaml"


@dataclass(frozen=True)
class Plan:
    """A sweep that can be run: what `load_sweep` gave, its job, and the command that a person typed."""

    sweep: SweepConfig
    arms: Arms
    command: str
    #: All arms, but with Optuna, which draws them on the way.
    fixed: list[Arm] | None
    #: Why points of the space are no arms.
    refused: list[str]

    @property
    def trials(self) -> int:
        """Trials in all."""
        return self.sweep.trials or len(self.fixed or ()) * self.sweep.seeds

    @property
    def default(self) -> str | None:
        """Label of the arm that is the job itself, if there is one; members of a population have other names."""
        if self.sweep.scheduler == "pbt":
            return None
        return next((arm.label for arm in self.fixed or () if self.arms.is_job(arm)), None)


def make_plan(sweep: SweepConfig, given: Mapping[str, Any], command: str) -> Plan:
    """Find the arms of a sweep; torch is imported, nothing started.

    Raises:
        ConfigError: the job or the space cannot be, or there is nothing in it.
    """
    arms = Arms(sweep, given)
    if sweep.budget.unit == "seconds" and (arms.job.training.workers > 1 or is_streamed(arms.job)):
        raise ConfigError(
            "budget.seconds: how long a step takes is measured in one process on a corpus; needs "
            "training.workers=1 and a job that is no stream, or budget.tokens"
        )
    arms.check()
    if sweep.scheduler == "pbt":
        from nestling.tuning.sweeps.schedule import check_population

        check_population(sweep, arms)
    if sweep.searcher == "optuna":
        return Plan(sweep, arms, command, None, [])
    fixed, refused = arms.grid() if sweep.searcher == "grid" else arms.drawn(sweep.budget.trials or 0)
    if not fixed:
        raise ConfigError(f"space: no arm is possible; the first one is refused: {refused[0]}")
    return Plan(sweep, arms, command, fixed, refused)


def make_folder(runs_dir: Path, plan: Plan) -> RunFolder:
    """A new folder `sweeps/NAME-ID` in the runs folder, from which the sweep can be resumed."""
    folder = RunFolder.create(runs_dir / "sweeps", plan.sweep.name)
    (folder.path / JOB).write_text(OmegaConf.to_yaml(OmegaConf.create(plan.arms.given)), encoding="utf-8")
    settings = asdict(plan.sweep) | {"command": plan.command, "default": plan.default}
    folder.write_config(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return folder


def open_sweep(folder: RunFolder) -> SweepConfig:
    """The settings of a sweep that was begun; ConfigError if its folder does not hold them."""
    given = read_yaml(folder.config, "a sweep")
    known = {each.name for each in fields(SweepConfig)}
    return build_section(SweepConfig, {key: value for key, value in given.items() if key in known})


def open_plan(folder: RunFolder) -> Plan:
    """The plan of a sweep that was begun; ConfigError if its folder does not hold one."""
    command = read_yaml(folder.config, "a sweep").get("command", "")
    return make_plan(open_sweep(folder), read_yaml(folder.path / JOB), command)


def best_job(folder: RunFolder, arm: str) -> dict[str, Any]:
    """The job of an arm of a sweep as the mappings of a job file.

    Raises:
        ConfigError: no trial of it has begun.
    """
    runs = trial_folders(folder.path.parent.parent, folder.run_id)
    found = next((run for (label, _), run in sorted(runs.items()) if label == arm), None)
    if found is None:
        raise ConfigError(f"sweep {folder.run_id} ({folder.name}) has no run of the arm {arm}; were its runs removed?")
    job = changed(read_yaml(folder.path / JOB), found.info()["changes"])
    job["run"] = {"name": f"{folder.name}-best"}
    return job

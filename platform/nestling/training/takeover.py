"""A run goes on from another run's checkpoint, with settings of its own: what Population Based Training does.

Weights, optimizer state, the levels' accumulators and clocks, and the position in the data are the other run's; periods
and learning rates are those of the job that the run is given, as after `nestling level period` or an override of
`nestling resume`.
"""

from __future__ import annotations

from nestling.checkpoint import CheckpointError, run_store
from nestling.config import JobConfig, to_yaml
from nestling.tracking import RunFolder
from nestling.training.resume import job_of


def take_over(donor: RunFolder, step: int, folder: RunFolder, config: JobConfig) -> None:
    """Put the checkpoint of a donor's step in the place of a run's own of that step and later.

    Args:
        donor: whose checkpoint it is.
        step: of which step.
        folder: the run that is to go on from it; nobody is training it.
        config: its job from now on, of a model with the donor's parameters.

    Raises:
        CheckpointError: the donor does not have that checkpoint, or it is damaged.
        RunBusyError: the run is being trained.
    """
    with folder.claim():
        source, target = run_store(job_of(donor), donor), run_store(config, folder)
        found = next((checkpoint for checkpoint in source.checkpoints() if checkpoint.step == step), None)
        if found is None:
            raise CheckpointError(f"run {donor.run_id} ({donor.name}) has no checkpoint of step {step} any more")
        target.set_aside(step - 1)
        target.adopt(source, found)
        if folder.log.exists():
            folder.cut_log(step)
        folder.write_config(to_yaml(config))
        folder.event("taken-over", f"goes on from step {step} of run {donor.run_id}", step=step, donor=donor.run_id)

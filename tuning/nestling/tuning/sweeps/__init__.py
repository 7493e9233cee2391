"""Sweeps: which levels, chunk sizes, periods and optimizers are worth their cost.

A sweep file (`SweepConfig`) names a job and what varies; `space` and `arms` make configurations of it that can start,
`trial` trains one of them in a process of Ray Tune, `run` is the driver, `outcome` what a trial came to.
"""

from nestling.tuning.sweeps.config import SweepConfig, load_sweep

__all__ = ["SweepConfig", "load_sweep"]

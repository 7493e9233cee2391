"""A training run: `fit` starts it from the driver, `worker` is what each Ray Train worker does."""

from nestling.training.run import Summary, fit

__all__ = ["Summary", "fit"]

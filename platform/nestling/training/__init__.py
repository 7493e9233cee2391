"""A training run: `fit` starts it from the driver, `worker` is what each Ray Train worker does."""

from nestling.training.run import Part, Summary, fit

__all__ = ["Part", "Summary", "fit"]

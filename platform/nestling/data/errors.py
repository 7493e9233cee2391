"""The one error of this package."""

from __future__ import annotations


class DataError(ValueError):
    """Something is wrong with the data of a run; the message says what, where and how to fix it."""

"""The picture of a run."""

from __future__ import annotations

import math
from pathlib import Path

from nestling.tracking.figures import loss_figure


def test_the_picture_has_its_size_and_shows_each_curve(tmp_path: Path) -> None:
    from matplotlib.image import imread

    records = [{"step": step, "train/bits_per_byte": 2 + 6 * math.exp(-step / 100)} for step in range(0, 300, 5)]
    records[7]["train/bits_per_byte"] = math.nan
    heldout = [{"step": step, "heldout/bits_per_byte": 2.1 + 6 * math.exp(-step / 100)} for step in (100, 200, 295)]
    pictures = []
    for name, curves, unigram in (
        ("none", [], None),
        ("unigram", [], 4.2),
        ("train", records, 4.2),
        ("both", records + heldout, 4.2),
    ):
        loss_figure(curves, tmp_path / f"{name}.png", unigram, "a run")
        pictures.append(imread(tmp_path / f"{name}.png"))
        assert pictures[-1].shape[:2] == (600, 1200)
    for fewer, more in zip(pictures, pictures[1:], strict=False):
        assert (fewer != more).any()

"""The guard's verdict: garbage goes, a new domain stays, and so does a window that harms nothing."""

import pytest

from nestling.training.window_guard import Standing, harm, unigram_entropy

OLD = Standing({"english": 3.0, "cxx": 4.0}, 6.5)


@pytest.mark.parametrize(
    ("probes", "own", "undone"),
    [
        ((5.0, 6.0), 4.0, False),  # a new domain: the old ones suffer, it is learnt
        ((5.0, 6.0), 6.45, True),  # nothing is learnt
        ((5.0, 6.0), 5.5, True),  # better than before, but no better than a byte histogram
        ((3.1, 4.1), 6.5, False),  # nothing is harmed
        ((3.6, 4.0), 6.5, True),  # 0.3 on average
        ((5.0, 6.0), None, True),  # nothing shows that anything was learnt
    ],
)
def test_the_verdict(probes, own, undone):
    after = Standing({"english": probes[0], "cxx": probes[1], "new": 1.0}, own)
    assert bool(harm(OLD, after, entropy=5.0)) == undone


def test_a_stream_that_knows_nothing_yet_has_nothing_to_lose():
    assert not harm(Standing({}, 8.0), Standing({"english": 9.0}, 9.0), 5.0)


def test_unigram_entropy():
    assert unigram_entropy(["abab", "cdcd"]) == pytest.approx(2.0) and unigram_entropy([]) == 0.0

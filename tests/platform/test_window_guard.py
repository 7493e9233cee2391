"""The guard's verdict: garbage goes, a new domain stays, and so does a window that harms nothing."""

import pytest

from nestling.training.window_guard import Standing, harm, scrambled

OLD = Standing({"english": 3.0, "cxx": 4.0}, 6.5, 6.6)


@pytest.mark.parametrize(
    ("probes", "own", "undone"),
    [
        ((5.0, 6.0), 4.0, False),  # a new domain: the old ones suffer, it is learnt
        ((5.0, 6.0), 5.5, True),  # better than before, but no better than the same characters in any order
        ((3.1, 4.1), 5.5, True),  # and then a small harm is one
        ((3.04, 4.04), 5.5, False),  # nothing is harmed
        ((3.1, 4.1), 5.4, False),
        ((5.0, 6.0), None, True),  # nothing shows that anything was learnt
        ((3.1, 4.1), None, False),
    ],
)
def test_the_verdict(probes, own, undone):
    after = Standing({"english": probes[0], "cxx": probes[1], "new": 1.0}, own, own and 5.55)
    assert bool(harm(OLD, after)) == undone


def test_text_that_teaches_nothing_may_do_some_harm_only():
    for rise, undone in ((0.2, False), (0.3, True)):  # on average
        after = Standing({"english": 3.0 + 2 * rise, "cxx": 4.0}, 6.48, 7.0)
        assert bool(harm(OLD, after)) == undone


def test_a_stream_that_knows_nothing_yet_has_nothing_to_lose():
    assert not harm(Standing({}, 8.0, 8.0), Standing({"english": 9.0}, 9.0, 9.0))


def test_a_scrambled_text_has_the_same_characters_always_in_the_same_order():
    text = "a straße of words"
    assert scrambled(text) == scrambled(text) != text and sorted(scrambled(text)) == sorted(text)

"""handlers/lmi_dist_handler/timings.py: what the histograms count."""

import pytest
from lmi_dist_handler.timings import Gaps, Histogram

from lmi_dist import Output, Token


def test_histogram_counts_up_to_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 3.0):
        histogram.observe(value)

    assert histogram.as_dict() == {"bounds": [1.0, 2.0], "counts": [2, 1, 1], "sum": 6.0}


def output(request_id: str, index: int = 0, num_tokens: int = 1) -> Output:
    return Output(request_id=request_id, index=index, tokens=(Token(1, "a"),) * num_tokens)


def test_gaps_are_of_one_candidate() -> None:
    gaps = Gaps()
    gaps.note([output("a"), output("b"), output("b", 1)], 1.0)
    gaps.note([output("a")], 1.5)
    gaps.note([output("b", 1)], 3.0)

    assert sum(gaps.histogram.as_dict()["counts"]) == 2
    assert gaps.histogram.as_dict()["sum"] == 2.5


def test_tokens_that_come_together_share_the_gap() -> None:
    gaps = Gaps()
    for num_tokens, now in ((1, 1.0), (0, 1.1), (3, 1.6)):
        gaps.note([output("a", num_tokens=num_tokens)], now)

    assert sum(gaps.histogram.as_dict()["counts"]) == 3
    assert gaps.histogram.as_dict()["sum"] == pytest.approx(0.6)


def test_forgotten_request_begins_anew() -> None:
    gaps = Gaps()
    gaps.note([output("a")], 1.0)
    gaps.forget("a")
    gaps.note([output("a")], 9.0)

    assert gaps.histogram.as_dict()["sum"] == 0.0

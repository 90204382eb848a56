"""How long clients wait for tokens: histograms that the worker keeps and Prometheus reads."""

import bisect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmi_dist import Output

FIRST_TOKEN_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
GAP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """Counts of observations by upper bound, as Prometheus has them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def as_dict(self) -> dict[str, Any]:
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}


class Gaps:
    """The time between a candidate's tokens. Tokens that come together, because their text was held back, share the time."""

    def __init__(self) -> None:
        self.histogram = Histogram(GAP_BOUNDS_S)
        self._last: dict[str, dict[int, float]] = {}  # by request and candidate

    def note(self, outputs: "Iterable[Output]", now: float) -> None:
        for output in outputs:
            if not output.tokens:
                continue
            last_of = self._last.setdefault(output.request_id, {})
            last = last_of.get(output.index)
            if last is not None:
                self.histogram.observe((now - last) / len(output.tokens), len(output.tokens))
            last_of[output.index] = now

    def forget(self, request_id: str) -> None:
        self._last.pop(request_id, None)

"""A forward captured as a CUDA graph and launched again by one call: what an Arena's recordings are for a column on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmi_dist.ops.record import Recorded


class Graph:
    """A captured forward. `result`: what it gives; each replay overwrites it."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor) -> None:
        self.result = result
        self._graph = graph

    def replay(self) -> Tensor:
        """Launch it on torch's current stream, on what its inputs hold by then. Allocates nothing and waits for nothing."""
        self._graph.replay()
        return self.result


class GraphPool:
    """Device memory that the graphs of one model share: no two run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None  # torch has no public name for its type

    def record(self, forward: Callable[[], Tensor], num_rows: int) -> Recorded:
        """Run it as it is, which also loads what it needs, then capture it. What a stream that captures refuses is an obstacle."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        result = forward()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                captured = forward()
        except RuntimeError as error:
            return Recorded(result, None, f"{num_rows} rows cannot be captured: {error}")
        return Recorded(result, Graph(graph, captured), "")

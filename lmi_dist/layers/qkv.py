"""Query, key and value projection as one linear, from the ways in which checkpoints lay them out.

A layout tells what a rank needs for its heads: rows of q, then of k, then of v.
"""

from collections.abc import Callable
from typing import NamedTuple

from lmi_dist.layers.linear import Linear
from lmi_dist.parallel import Heads
from lmi_dist.weights import Weights


class Rows(NamedTuple):
    """Output features `rows` of the checkpoint's linear `prefix`, which has `size` of them."""

    prefix: str
    size: int
    rows: slice


Layout = Callable[[Heads], list[Rows]]


def separate(query: str, key: str, value: str) -> Layout:
    """Three linears."""

    def rows(heads: Heads) -> list[Rows]:
        keys = [Rows(prefix, heads.num_key * heads.size, heads.key_features) for prefix in (key, value)]
        return [Rows(query, heads.num_query * heads.size, heads.query_features), *keys]

    return rows


def joined(prefix: str) -> Layout:
    """One linear: all queries, all keys, all values."""

    def places(heads: Heads) -> list[range]:
        keys, values = heads.num_query, heads.num_query + heads.num_key
        return [heads.query, _shifted(heads.key, keys), _shifted(heads.key, values)]

    return _fused(prefix, places)


def grouped(prefix: str) -> Layout:
    """One linear: for each key head its queries, itself, its value. So it is q k v, q k v, .. where each query has a key head, and
    as `joined` where all have one."""

    def places(heads: Heads) -> list[range]:
        group = heads.num_query // heads.num_key
        first_keys = [key * (group + 2) + group for key in heads.key]
        firsts = [(key * group, 2 * key) for key in heads.key]
        queries = [
            _shifted(range(max(heads.query.start, first), min(heads.query.stop, first + group)), passed) for first, passed in firsts
        ]
        return [*queries, *(range(key, key + 1) for key in first_keys), *(range(key + 1, key + 2) for key in first_keys)]

    return _fused(prefix, places)


def load_qkv(
    weights: Weights, heads: Heads, layout: Layout, *, hidden: int, bias: bool = False, transposed: bool = False
) -> Linear:
    """[T,hidden] to this rank's [T,(H+2K)D]. Raises CheckpointError."""
    prefixes, sizes, parts = zip(*layout(heads), strict=True)
    return Linear.load(weights, prefixes, "outputs", inputs=hidden, outputs=sizes, parts=parts, bias=bias, transposed=transposed)


def _fused(prefix: str, places: Callable[[Heads], list[range]]) -> Layout:
    """`places`: where the heads that a rank needs stand among all of q, k and v."""

    def rows(heads: Heads) -> list[Rows]:
        size = (heads.num_query + 2 * heads.num_key) * heads.size
        return [Rows(prefix, size, slice(part.start * heads.size, part.stop * heads.size)) for part in places(heads)]

    return rows


def _shifted(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)

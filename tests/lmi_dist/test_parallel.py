"""Ranks come from the launcher; dimensions and heads are shared out so that every part has one owner."""

import pytest

from lmi_dist.errors import ConfigError
from lmi_dist.parallel import Heads, Ranks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks(0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks(0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Ranks(2, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "RANK": "3", "WORLD_SIZE": "4"}, Ranks(1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "3"}, Ranks(0, 1)),
    ],
)
def test_launcher_says_the_rank(environment: dict[str, str], expected: Ranks) -> None:
    assert Ranks.of_environment(environment) == expected


def test_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK='x' must be a whole number"):
        Ranks.of_environment({"RANK": "x", "WORLD_SIZE": "1"})


@pytest.mark.parametrize(("length", "size"), [(7, 1), (8, 2), (7, 2), (99, 4), (5, 5)])
def test_slices_cover_a_dimension_once(length: int, size: int) -> None:
    parts = [Ranks(rank, size).slice(length, "vocab_size") for rank in range(size)]

    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    assert max(part.stop - part.start for part in parts) - length // size <= 1
    assert parts == [Ranks(0, size).slice(length, "vocab_size", rank) for rank in range(size)]


def test_dimension_too_small_for_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_degree=4 must be at most vocab_size=3"):
        Ranks(0, 4).slice(3, "vocab_size")


@pytest.mark.parametrize(
    ("size", "num_query", "num_key"),
    [(1, 3, 3), (1, 8, 2), (2, 8, 8), (2, 8, 2), (4, 8, 2), (8, 8, 2), (2, 4, 1), (4, 12, 4), (6, 12, 2)],
)
def test_each_query_head_meets_its_key_head(size: int, num_query: int, num_key: int) -> None:
    group = num_query // num_key
    seen = []

    for rank in range(size):
        heads = Heads.share(Ranks(rank, size), num_query, num_key, 16)
        groups = len(heads.query) // len(heads.key)
        assert [heads.key[i // groups] for i in range(len(heads.query))] == [head // group for head in heads.query]
        assert heads.query_features == slice(16 * heads.query.start, 16 * heads.query.stop)
        assert heads.key_features == slice(16 * heads.key.start, 16 * heads.key.stop)
        seen += heads.query

    assert seen == list(range(num_query))


@pytest.mark.parametrize(
    ("size", "num_query", "num_key", "allowed"), [(3, 8, 8, "1, 2, 4, 8"), (2, 12, 3, "1, 3, 6, 12"), (16, 8, 1, "1, 2, 4, 8")]
)
def test_heads_that_cannot_be_shared_tell_what_can(size: int, num_query: int, num_key: int, allowed: str) -> None:
    message = f"tensor_parallel_degree={size} .* num_attention_heads={num_query} and num_key_value_heads={num_key} allow {allowed}$"

    with pytest.raises(ConfigError, match=message):
        Heads.share(Ranks(0, size), num_query, num_key, 16)

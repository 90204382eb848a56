"""The ranks that share one model: who I am among them, and which part of a dimension and of the attention heads is mine.

Facts and arithmetic only; what ranks do together is in link.py. The only reader of the launcher's environment.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lmi_dist.errors import ConfigError

# mpirun's names first: under it RANK may be left over from an outer launcher
LAUNCHERS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("RANK", "WORLD_SIZE"))


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that hold a slice of the model each."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "Ranks":
        """What mpirun or another launcher says; alone where none does. Raises ConfigError on values that are no ranks."""
        for rank, size in LAUNCHERS:
            if rank in environment and size in environment:
                return cls(_number(environment, rank), _number(environment, size))
        return cls()

    def slice(self, length: int, what: str, rank: int | None = None) -> slice:
        """This rank's (or another's) part of a dimension; parts differ by one where `length` is no multiple of the ranks.
        Raises ConfigError by `what` if there is not enough for all."""
        if length < self.size:
            raise ConfigError(f"tensor_parallel_degree={self.size} must be at most {what}={length}")
        rank = self.rank if rank is None else rank
        return slice(rank * length // self.size, (rank + 1) * length // self.size)


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of this rank, as ranges of the model's: `query` [H] of `num_query`, and the `key` heads [K] of `num_key`
    that they look at, in groups of H // K. `size`: numbers a head (D)."""

    query: range
    key: range
    num_query: int
    num_key: int
    size: int

    @classmethod
    def share(cls, ranks: Ranks, num_query: int, num_key: int, size: int) -> "Heads":
        """Each rank gets equally many query heads, and the key heads of their groups: a part of them, or, where there are fewer
        key heads than ranks, one that others hold too. Raises ConfigError with the degrees that would do."""
        if not _can_share(ranks.size, num_query, num_key):
            allowed = ", ".join(str(n) for n in range(1, num_query + 1) if _can_share(n, num_query, num_key))
            raise ConfigError(
                f"tensor_parallel_degree={ranks.size} does not divide the attention heads of this model: num_attention_heads="
                f"{num_query} and num_key_value_heads={num_key} allow {allowed}"
            )
        first, last = ranks.rank * num_key // ranks.size, ((ranks.rank + 1) * num_key - 1) // ranks.size
        num_mine = num_query // ranks.size
        query = range(ranks.rank * num_mine, (ranks.rank + 1) * num_mine)
        return cls(query, range(first, last + 1), num_query, num_key, size)

    @property
    def query_features(self) -> slice:
        """Which rows of a query projection [num_query * D,E], and columns of an output projection, are this rank's."""
        return slice(self.query.start * self.size, self.query.stop * self.size)

    @property
    def key_features(self) -> slice:
        """Which rows of a key or value projection [num_key * D,E] are this rank's."""
        return slice(self.key.start * self.size, self.key.stop * self.size)


def _can_share(num_ranks: int, num_query: int, num_key: int) -> bool:
    return num_query % num_ranks == 0 and (num_key % num_ranks == 0 or num_ranks % num_key == 0)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r} must be a whole number")
    return int(value)

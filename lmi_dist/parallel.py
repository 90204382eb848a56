"""The ranks that share one model: who I am, which slice of a dimension is mine, and the sum over all.

The only reader of the launcher's environment. One rank for now: more are refused by name.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lmi_dist.errors import ConfigError

# mpirun's names first: under it RANK may be left over from an outer launcher
LAUNCHERS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("RANK", "WORLD_SIZE"))


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that hold a slice of the model each."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size != 1:
            raise ConfigError(f"ranks={self.size} is known but not built yet; start one process with tensor_parallel_degree=1")

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "Ranks":
        """What mpirun or another launcher says; alone where none does. Raises ConfigError on values that are no ranks."""
        for rank, size in LAUNCHERS:
            if rank in environment and size in environment:
                return cls(_number(environment, rank), _number(environment, size))
        return cls()

    def slice(self, length: int, what: str) -> slice:
        """This rank's part of a dimension. Raises ConfigError by `what` if it cannot be shared evenly."""
        if length % self.size:
            raise ConfigError(f"tensor_parallel_degree={self.size} must divide {what}={length}")
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x, in place; x itself where there is one rank."""
        return x


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r} must be a whole number")
    return int(value)

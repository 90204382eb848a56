"""Ranks come from the launcher; more than one is refused by name for now."""

import pytest
import torch

from lmi_dist.errors import ConfigError
from lmi_dist.parallel import Ranks


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "RANK": "3", "WORLD_SIZE": "4"},
        {"OMPI_COMM_WORLD_RANK": "3"},
    ],
)
def test_one_rank_is_alone(environment: dict[str, str]) -> None:
    assert Ranks.of_environment(environment) == Ranks(0, 1)


def test_more_ranks_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="ranks=2 is known but not built yet"):
        Ranks.of_environment({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"})


def test_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK='x' must be a whole number"):
        Ranks.of_environment({"RANK": "x", "WORLD_SIZE": "1"})


def test_one_rank_has_all_and_sums_alone() -> None:
    x = torch.ones(3)

    assert Ranks().slice(7, "vocab_size") == slice(0, 7)
    assert Ranks().all_reduce(x) is x

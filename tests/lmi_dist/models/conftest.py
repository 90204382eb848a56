"""What the model tests share: variants settled once, with transformers' continuations of them."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import tiny_models
from tiny_models import Settled

from lmi_dist import ops


@pytest.fixture(autouse=True)
def _column_as_before() -> Iterator[None]:
    """A runner chooses for the whole process; what comes after these tests finds what was before."""
    with ops.using("cpu", 1):
        yield


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Settled]:
    """A variant's checkpoint folder, transformers' model and its greedy continuations; made once."""

    @lru_cache
    def make(variant: str) -> Settled:
        model, references = tiny_models.settled(variant)
        return Settled(tiny_models.save(model, tmp_path_factory.mktemp(variant)), model, references)

    return make

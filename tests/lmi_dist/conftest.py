"""What tests of runners share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models

from lmi_dist import ops


@pytest.fixture
def column_as_before() -> Iterator[None]:
    """A runner chooses for the whole process; what comes after the test finds what was before."""
    with ops.using("cpu", 1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path_factory.mktemp("tiny"))

"""Python's garbage collector, kept away from what is loaded for good."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """What is made in here stays, and Python need not look through it for garbage meanwhile: a fifth of the time that torch's and
    transformers' imports take. A collector that its owner has turned off stays off, and what is frozen stays so."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            _grow_old()
            gc.enable()


def _grow_old() -> None:
    """Take everything for old, else the next collection of the young would look through all of it: 0.15 s after the imports."""
    if gc.get_freeze_count() == 0:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation

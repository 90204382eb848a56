import random

import pytest
from lmi_dist_handler.bench_work import (
    MAX_RUNNING,
    WORKLOADS,
    ElementBytes,
    Job,
    Limits,
    Shape,
    Timing,
    floor,
    jobs_of,
    throughput_lengths,
    tokens_per_s,
)

SHAPE = Shape(hidden=2048, inner=5632, layers=22, heads=32, kv_heads=4, head_dim=64, vocab=32000)  # 1.1 billion parameters
HALVES = ElementBytes(weight=2, cached=2)
LIMITS = Limits(bytes_per_s=29.5e9, flops_per_s=6.37e12)


def test_workloads_have_their_lengths():
    sizes = {name: [(len(job.token_ids), job.num_new) for job in jobs_of(name, 0, 0, 32000)] for name in WORKLOADS}

    assert sizes["latency"] == [(128, 64)]
    assert sizes["throughput"] == throughput_lengths()
    assert sizes["prefill1"] == [(1024, 1)]
    assert sizes["prefill4"] == [(512, 1)] * 4


def test_throughput_work_is_that_of_the_goal_posts():
    lengths = throughput_lengths()

    assert len(lengths) == 32
    assert sum(prompt for prompt, _ in lengths) == 4043
    assert sum(new for _, new in lengths) == 2124


def test_prompts_are_those_of_the_peers():
    chance = random.Random("prefill4/2/0")
    ids = [[chance.randrange(3, 500) for _ in range(512)] for _ in range(4)]

    assert [list(job.token_ids) for job in jobs_of("prefill4", 2, 0, 500)] == ids


def test_each_repetition_has_new_prompts():
    assert jobs_of("latency", 0, 0, 32000) != jobs_of("latency", 1, 0, 32000)


@pytest.mark.parametrize(("workload", "expected"), [("latency", 2 / 3), ("throughput", 3 / 5), ("prefill1", 2.0)])
def test_rate_counts_the_workloads_own_tokens(workload, expected):
    assert tokens_per_s(workload, [Job(tuple(range(10)), 3)], Timing(seconds=5.0, first_s=2.0)) == pytest.approx(expected)


def test_shape_counts_the_weights():
    assert SHAPE.body_weights + SHAPE.head_weights + SHAPE.vocab * SHAPE.hidden == pytest.approx(1.100e9, rel=1e-3)


@pytest.mark.parametrize(
    ("workload", "expected"), [("latency", 14.2), ("throughput", 129.6), ("prefill1", 3175.0)]
)  # as the goal posts give them
def test_floor_is_that_of_the_goal_posts(workload, expected):
    jobs = jobs_of(workload, 0, 0, SHAPE.vocab)

    assert tokens_per_s(workload, jobs, floor(SHAPE, jobs, LIMITS, HALVES)) == pytest.approx(expected, rel=0.02)


def test_floor_runs_so_many_at_once():
    """Reading the weights is all that counts here, so that time is steps: twice as many jobs as may run take twice as long."""
    limits = Limits(bytes_per_s=1.0, flops_per_s=1e30)
    jobs = [Job((1,), 10)] * MAX_RUNNING
    tiny = Shape(hidden=8, inner=8, layers=0, heads=1, kv_heads=1, head_dim=8, vocab=8)

    assert floor(tiny, jobs * 2, limits, HALVES).seconds == 2 * floor(tiny, jobs, limits, HALVES).seconds


def test_floor_reads_a_cache_of_bytes_in_half_the_time():
    """Reading is all that counts: two steps with 5 and 6 keys, each with 16 numbers a layer of which there are 3."""
    limits = Limits(bytes_per_s=1.0, flops_per_s=1e30)
    shape = Shape(hidden=8, inner=8, layers=3, heads=1, kv_heads=1, head_dim=8, vocab=8)
    jobs = [Job((1,) * 5, 2)]

    saved = floor(shape, jobs, limits, HALVES).seconds - floor(shape, jobs, limits, ElementBytes(weight=2, cached=1)).seconds

    assert saved == (5 + 6) * 16 * 3

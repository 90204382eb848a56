"""Penalties, draws and log probabilities: twins against published vectors, transformers' processors and torch; kernels against
twins."""

import math
from typing import Any

import pytest
import torch
from kernel_cases import rand, same_bits, strided
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.abi import Library
from lmi_dist.ops.sampling import gumbel, logprobs_torch, penalize_torch, philox, relative, remaining, sample_torch

INFINITY = math.inf
NAN = math.nan

# Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def settings(rows: int, **given: Any) -> dict[str, Tensor]:
    """Arguments of sample but the logits; one value is that of all rows."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "seeds": 7, "positions": 0}
    dtypes = {"top_k": torch.int32, "positions": torch.int32, "seeds": torch.uint64}
    return {
        name: torch.as_tensor(given.get(name, default)).to(dtypes.get(name, torch.float32)).expand(rows).contiguous()
        for name, default in defaults.items()
    }


def draw(logits: Tensor, num_draws: int, **given: Any) -> Tensor:
    """num_draws ids from one row of logits [V], at positions 0, 1, 2, ..."""
    rows = logits.expand(num_draws, -1).contiguous()
    return ops.sample(rows, **settings(num_draws, positions=torch.arange(num_draws), **given))


# ---- random numbers ----


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), key)

    assert tuple(int(word) for word in words) == expected


def test_gumbel_takes_id_position_and_seed_as_promised() -> None:
    word = philox((torch.tensor(5), torch.tensor(0xFFFFFFFF), torch.tensor(0), torch.tensor(0)), (0x89ABCDEF, 0x01234567))[0]
    expected = -math.log(-math.log((int(word) + 0.5) / 2**32))

    assert float(gumbel(0x0123456789ABCDEF, -1, torch.tensor([5]))[0]) == pytest.approx(expected, rel=1e-12)


def test_draws_use_all_bits_of_seed_and_position(library: Library) -> None:
    """Kernel and twin agree over seeds and positions that differ in one bit each, and hardly two of them draw the same."""
    seeds = torch.tensor([1 << bit for bit in range(64)] + [0] * 32, dtype=torch.uint64)
    positions = torch.tensor([0] * 64 + [1 << bit for bit in range(31)] + [-1])
    logits = torch.zeros(96, 20000)

    ids = ops.sample(logits.clone(), **settings(96, seeds=seeds, positions=positions))

    assert torch.equal(ids, sample_torch(logits, **settings(96, seeds=seeds, positions=positions)))
    assert len(ids.unique()) > 93


# ---- what is left ----

WARPERS: dict[str, tuple[LogitsProcessor, dict[str, Any]]] = {
    "top_k": (TopKLogitsWarper(5), {"top_k": 5}),
    "top_p": (TopPLogitsWarper(0.8), {"top_p": 0.8}),
    "small top_p": (TopPLogitsWarper(0.01), {"top_p": 0.01}),
    "typical_p": (TypicalLogitsWarper(0.6), {"typical_p": 0.6}),
    "min_p": (MinPLogitsWarper(0.07), {"min_p": 0.07}),
}
OFF = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0}
by_warper = pytest.mark.parametrize(("warper", "given"), WARPERS.values(), ids=WARPERS.keys())


@by_warper
@pytest.mark.parametrize("vocabulary", [2, 37, 5000])
def test_twin_leaves_what_transformers_leaves(warper: LogitsProcessor, given: dict[str, Any], vocabulary: int) -> None:
    logits = rand(20, vocabulary) * torch.linspace(0.3, 5, 20)[:, None]

    for row in logits:
        left = remaining(relative(row), **{**OFF, **given})
        expected = warper(torch.zeros(1, 1, dtype=torch.long), row[None])[0]
        assert left.tolist() == (expected > -INFINITY).nonzero()[:, 0].tolist()


def test_twin_leaves_ties_at_the_border() -> None:
    row = relative(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0]))

    assert remaining(row, **{**OFF, "top_k": 2}).tolist() == [1, 2, 3, 4]
    assert remaining(row, **{**OFF, "top_p": 0.6}).tolist() == [1, 2, 3, 4]
    assert remaining(torch.zeros(5), **{**OFF, "top_k": 2}).tolist() == [0, 1, 2, 3, 4]
    assert remaining(torch.zeros(5), **{**OFF, "typical_p": 0.1}).tolist() == [0, 1, 2, 3, 4]


def test_filters_work_on_what_the_one_before_left() -> None:
    """Of 8, 4, 2, 1, 1 top-k leaves 8, 4, 2; 0.8 of these 14 is reached by 8 and 4; of these 12, 8 alone is 0.6 of the mass."""
    row = relative(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]).log())

    assert remaining(row, **{**OFF, "top_k": 3, "top_p": 0.8}).tolist() == [0, 1]
    assert remaining(row, **{**OFF, "top_p": 0.8}).tolist() == [0, 1, 2]
    assert remaining(row, **{**OFF, "top_k": 3, "top_p": 0.8, "min_p": 0.6}).tolist() == [0]
    assert remaining(row, **{**OFF, "top_k": 2, "typical_p": 0.6}).tolist() == [0]


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 10**6},
    {"top_p": 0.7},
    {"typical_p": 0.5},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.9, "typical_p": 0.8, "min_p": 0.05, "temperature": 0.7},
]


@pytest.mark.cpu_column  # thousands of rows; on the stand-in, agreement with the twin says the same
@pytest.mark.parametrize("given", FILTERS)
def test_kernel_draws_from_exactly_what_is_left(library: Library, given: dict[str, Any]) -> None:
    logits = rand(12, seed=4)

    ids = draw(logits, 4000, **given)

    filters = {name: value for name, value in given.items() if name != "temperature"}
    left = remaining(relative(logits) / given.get("temperature", 1.0), **{**OFF, **filters})
    assert ids.unique().tolist() == left.tolist()


@pytest.mark.parametrize("given", FILTERS)
@pytest.mark.parametrize("vocabulary", [1, 63, 64, 1000, 32003])
def test_sample_matches_twin(library: Library, given: dict[str, Any], vocabulary: int) -> None:
    rows = 9
    logits = strided(rand(rows, vocabulary, seed=vocabulary) * 3)
    row_settings = settings(rows, **{"seeds": torch.arange(rows) * 10**15, "positions": torch.arange(rows), **given})

    ids = ops.sample(strided(logits), **row_settings)

    assert torch.equal(ids, sample_torch(logits, **row_settings))


def test_rows_have_settings_of_their_own(library: Library) -> None:
    logits = rand(64, 300, seed=8) * 2
    choices = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 3.0]),
        "top_k": torch.tensor([0, 1, 7, 100]),
        "top_p": torch.tensor([1.0, 0.9, 0.3, 0.01]),
        "typical_p": torch.tensor([1.0, 0.2, 0.95, 1.0]),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.5]),
    }
    mixed = {
        name: values[torch.randint(4, (64,), generator=torch.Generator().manual_seed(len(name)))]
        for name, values in choices.items()
    }
    row_settings = settings(64, positions=torch.arange(64), **mixed)

    together = ops.sample(logits.clone(), **row_settings)

    alone = [
        ops.sample(logits[row : row + 1].clone(), **{n: v[row : row + 1] for n, v in row_settings.items()}) for row in range(64)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, sample_torch(logits, **row_settings))


# ---- draws ----


@pytest.mark.cpu_column
@pytest.mark.parametrize(("given", "temperature"), [({}, 1.0), ({}, 0.5), ({"top_k": 6}, 1.0), ({"top_p": 0.9}, 2.0)])
def test_frequencies_are_the_probabilities(library: Library, given: dict[str, Any], temperature: float) -> None:
    """Chi-square of 40,000 draws with fixed seeds: fewer than 20 degrees of freedom, and with 19, above 50 is less likely than 1 in
    4000."""
    logits, num_draws = rand(20, seed=2), 40000

    counts = torch.bincount(draw(logits, num_draws, temperature=temperature, **given), minlength=20)

    left = remaining(relative(logits) / temperature, **{**OFF, **given})
    expected = torch.softmax(logits[left].double() / temperature, -1) * num_draws
    assert counts.sum() == counts[left].sum()
    assert ((counts[left] - expected) ** 2 / expected).sum() < 50


def test_seeds_and_positions_are_independent(column: str) -> None:
    """Over neighbouring seeds, too, the draws are uniform."""
    seeds = torch.arange(4000)

    ids = ops.sample(torch.zeros(4000, 10), **settings(4000, seeds=seeds))

    counts = torch.bincount(ids, minlength=10)
    assert ((counts - 400.0) ** 2 / 400).sum() < 35


@pytest.mark.parametrize("vocabulary", [1, 5, 200, 4097])
def test_greedy_takes_the_lowest_of_the_greatest(library: Library, vocabulary: int) -> None:
    logits = rand(5, vocabulary)
    logits[1, vocabulary // 2 :] = 9.0
    logits[2] = -3.0
    logits[3, : vocabulary - 1] = -INFINITY

    ids = ops.sample(strided(logits), **settings(5, temperature=0.0))

    assert ids.tolist() == [int(logits[0].argmax()), vocabulary // 2, 0, vocabulary - 1, int(logits[4].argmax())]


@pytest.mark.parametrize("given", FILTERS)
def test_infinite_and_equal_logits_work(library: Library, given: dict[str, Any]) -> None:
    logits = torch.full((6, 70), -INFINITY)
    logits[0, 69] = -100.0  # one token left
    logits[1, 3:40] = 0.25  # several, all alike
    logits[2] = 0.0  # all alike
    logits[3] = rand(70)
    logits[3, :35] = -INFINITY
    logits[4, 11] = INFINITY  # certain
    logits[5] = torch.linspace(0, -3e38, 70)  # no weight in float but for the first
    row_settings = settings(6, seeds=torch.arange(6), **given)

    ids = ops.sample(logits.clone(), **row_settings)

    assert torch.equal(ids, sample_torch(logits, **row_settings))
    assert ids[[0, 4, 5]].tolist() == [69, 11, 0]
    assert 3 <= ids[1] < 40
    assert ids[3] >= 35


def test_tiny_temperature_is_nearly_greedy(column: str) -> None:
    logits = rand(30, 50) * 100

    ids = ops.sample(logits.clone(), **settings(30, temperature=1e-30, positions=torch.arange(30)))

    assert torch.equal(ids, logits.argmax(-1).int())


def with_bad_rows(logits: Tensor) -> Tensor:
    """Rows 7 and 5 with a NaN, row 3 without a logit above -infinity."""
    for row, logit, where in ((7, NAN, slice(-1, None)), (5, NAN, slice(0, 1)), (3, -INFINITY, slice(None))):
        logits[row, where] = logit
    return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_that_leaves_nothing_has_no_id(column: str, temperature: float) -> None:
    good = ops.sample(rand(9, 100), **settings(9, temperature=temperature))

    ids = ops.sample(with_bad_rows(rand(9, 100)), **settings(9, temperature=temperature))

    assert ids.tolist() == good.index_fill(0, torch.tensor([3, 5, 7]), -1).tolist()


def test_sample_names_the_bad_argument(column: str) -> None:
    logits = rand(3, 10)

    with pytest.raises(KernelError, match=r"sample: logits is .*(F16|float16); it must be .*(F32|float32)"):
        ops.sample(logits.half(), **settings(3))
    with pytest.raises(KernelError, match=r"sample: top_p has shape \[2\]; it must be \[R=3\]"):
        ops.sample(logits, **{**settings(3), "top_p": torch.ones(2)})
    with pytest.raises(KernelError, match="sample: temperature must be at least 0"):
        ops.sample(logits, **settings(3, temperature=-0.5))
    with pytest.raises(KernelError, match="sample: min_p must be at most 1"):
        ops.sample(logits, **settings(3, min_p=1.5))
    with pytest.raises(KernelError, match="sample: V must be at least 1"):
        ops.sample(rand(3, 0), **settings(3))


def test_no_rows_give_no_ids(column: str) -> None:
    assert ops.sample(rand(0, 10), **settings(0)).shape == (0,)
    assert [part.shape for part in ops.logprobs(rand(0, 10), torch.zeros(0, dtype=torch.int32), 2)] == [(0,), (0,), (0, 2), (0, 2)]
    ops.penalize(rand(0, 10), bias_starts=ints(0), bias_ids=ints(), bias_values=torch.zeros(0))


# ---- penalties ----


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def history(rows: int, vocabulary: int) -> dict[str, Tensor]:
    """Some ids a row, none for row 0, and penalties of all signs."""
    sizes = [0 if row == 0 else min(vocabulary, 3 * row) for row in range(rows)]
    ids = [torch.randperm(vocabulary, generator=torch.Generator().manual_seed(row))[:size] for row, size in enumerate(sizes)]
    return {
        "history_starts": torch.tensor([0, *sizes]).cumsum(0).int(),
        "history_ids": torch.cat(ids).int(),
        "history_counts": (torch.arange(sum(sizes)) % 4).int(),
        "repetition": torch.linspace(0.5, 2.0, rows),
        "presence": torch.linspace(-1.0, 2.0, rows),
        "frequency": torch.linspace(0.5, -0.5, rows),
    }


def biases(rows: int, vocabulary: int) -> dict[str, Tensor]:
    ids = torch.arange(2 * rows) * 7 % vocabulary
    values = torch.linspace(-100, 100, 2 * rows)
    values[0] = -INFINITY
    return {"bias_starts": torch.arange(0, 2 * rows + 1, 2).int(), "bias_ids": ids.int(), "bias_values": values}


def test_repetition_penalty_is_transformers() -> None:
    logits = rand(1, 50) * 3
    seen = torch.tensor([[4, 8, 15, 16, 23, 42]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    zero = torch.zeros(1)

    penalize_torch(logits, ints(0, 6), seen[0].int(), ints(0, 1, 2, 3, 4, 5), torch.tensor([1.3]), zero, zero)

    assert torch.equal(logits, expected)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, 4)
    one = torch.ones(1)

    penalize_torch(logits, ints(0, 3), ints(0, 1, 3), ints(0, 1, 5), one, 0.5 * one, 0.25 * one)

    assert logits.tolist() == [[0.0, -0.75, 0.0, -1.75]]


def test_bias_comes_last_and_may_forbid() -> None:
    logits = torch.tensor([[2.0, 2.0, 2.0]])
    one = torch.ones(1)

    penalize_torch(logits, ints(0, 1), ints(0), ints(0), 2 * one, one, one, ints(0, 2), ints(0, 2), torch.tensor([10.0, -INFINITY]))

    assert logits.tolist() == [[11.0, 2.0, -INFINITY]]


@pytest.mark.parametrize("vocabulary", [1, 30, 2001])
@pytest.mark.parametrize(("with_history", "with_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_penalize_matches_twin(library: Library, vocabulary: int, with_history: bool, with_bias: bool) -> None:
    """Bits differ only where the level rounds a product and a sum at once: by one rounding of the penalty."""
    rows = 131
    given = (history(rows, vocabulary) if with_history else {}) | (biases(rows, vocabulary) if with_bias else {})
    logits = strided(rand(rows, vocabulary))
    expected = logits.clone()
    penalize_torch(expected, **given)

    ops.penalize(logits, **given)

    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_penalize_names_the_bad_argument(column: str) -> None:
    logits = rand(2, 10)
    good = history(2, 10) | biases(2, 10)

    for name, values, rule in [
        ("history_ids", ints(1, 2, 10), "history_ids .*0 to V-1"),
        ("bias_ids", ints(1, 2, 3, -1), "bias_ids .*0 to V-1"),
        ("history_starts", ints(0, 2, 2), "history_starts must ascend from 0 to 3"),
        ("bias_starts", ints(0, 5, 4), "bias_starts must ascend from 0 to 4"),
        ("history_counts", ints(1, 2), "history_counts has shape"),
        ("presence", torch.ones(3), "presence has shape"),
        ("bias_values", torch.ones(3), "bias_values has shape"),
        ("repetition", None, "repetition is absent; it must be"),
        ("history_counts", None, "history_counts is absent; it must be"),
    ]:
        with pytest.raises(KernelError, match=f"penalize: {rule}"):
            ops.penalize(logits, **{**good, name: values})
    assert same_bits(logits, rand(2, 10))


# ---- log probabilities ----


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 1000, 32003])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_logprobs_match_twin(library: Library, vocabulary: int, top: int) -> None:
    """Values are rounded once from double sums of float terms: a few units in the last place of the largest, about 1e-6."""
    rows, top = 17, min(top, vocabulary)
    logits = strided(rand(rows, vocabulary, seed=vocabulary) * 4)
    ids = (torch.arange(rows) * 31 % vocabulary).int()

    values, ranks, top_values, top_ids = ops.logprobs(logits, ids, top)
    twins_values, twins_ranks, twins_top_values, twins_top_ids = logprobs_torch(logits, ids, top)

    torch.testing.assert_close(values, twins_values, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(top_values, twins_top_values, rtol=1e-6, atol=2e-6)
    assert torch.equal(ranks, twins_ranks)
    assert torch.equal(top_ids, twins_top_ids)


def test_logprobs_twin_is_torchs() -> None:
    logits, ids = rand(5, 40), ints(0, 10, 20, 30, 39)
    expected = torch.log_softmax(logits, -1)

    values, ranks, top_values, top_ids = logprobs_torch(logits, ids, 40)

    torch.testing.assert_close(values, expected[torch.arange(5), ids.long()])
    torch.testing.assert_close(top_values, expected.gather(1, top_ids.long()))
    assert all(top_ids[row, rank] == ids[row] for row, rank in enumerate(ranks.tolist()))


def test_logprobs_order_ties_by_id(column: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, -INFINITY, 1.0, 2.0]])

    values, ranks, top_values, top_ids = ops.logprobs(logits, ints(4), 6)

    assert top_ids.tolist() == [[1, 2, 5, 0, 4, 3]]
    assert ranks.tolist() == [3]
    assert values[0] == top_values[0, 3]
    assert top_values[0, 5] == -INFINITY


def test_best_of_neighbouring_numbers_are_told(library: Library) -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).int()
    logits = (order + 0x3F800000).view(torch.float32)[None]  # 1.0 and the 99 floats above it

    for top in (1, 2, 7, 20, 64):
        assert ops.logprobs(logits, ints(0), top)[3].tolist() == [order.argsort(descending=True)[:top].tolist()]


def test_logprobs_leave_logits_alone(library: Library) -> None:
    logits = rand(3, 100)

    ops.logprobs(logits, ints(1, 2, 3), 5)

    assert same_bits(logits, rand(3, 100))


def test_nothing_is_told_of_a_row_that_leaves_nothing(column: str) -> None:
    ids = ints(0, 10, -1, 30, 100, 50, 60, 70, 80)  # rows 2 and 4 are good, their ids are not
    there = [0, 1, 6, 8]
    good = ops.logprobs(rand(9, 100)[there], ids[there], 3)

    values, ranks, top_values, top_ids = ops.logprobs(with_bad_rows(rand(9, 100)), ids, 3)

    assert all(map(same_bits, (values[there], ranks[there], top_values[there], top_ids[there]), good))
    assert [row for row in range(9) if ranks[row] == -1] == [2, 3, 4, 5, 7]
    assert [row for row in range(9) if values[row].isnan()] == [2, 3, 4, 5, 7]


def test_logprobs_refuse_bad_arguments(column: str) -> None:
    logits = rand(3, 10)

    with pytest.raises(KernelError, match=r"logprobs: ids .*must be \[R=3\]"):
        ops.logprobs(logits, ints(0, 0), 1)
    with pytest.raises(KernelError, match="logprobs: top=11 must be 0 to"):
        ops.logprobs(logits, ints(0, 0, 0), 11)

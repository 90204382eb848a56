"""The sampler against slow arithmetic of its own, one row and one token at a time."""

from math import exp, inf, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmi_dist import ops
from lmi_dist.request import SamplingParams
from lmi_dist.sampler import Draws, History, Row, Sampler, candidate_seed

V = 97
MASK = 0xFFFFFFFF
SETTINGS = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module", params=["auto", "torch"], autouse=True)
def column(request):
    with ops.using(request.param, 1):
        yield


def logits_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def draws_of(prompt=(5, 6, 6), generated=(), seed=7, stop_ids=(), num_logprobs=None, **params) -> Draws:
    draws = Draws.of(SamplingParams(**params), seed, prompt, frozenset(stop_ids), num_logprobs)
    for id in generated:
        draws.record(id)
    return draws


def row_of(draws: Draws, generated: int = 0) -> Row:
    return Row(draws, draws.prompt_length + generated)


# ---- the slow reference ----


def philox(seed: int, token: int, position: int) -> int:
    counter, key = [token, position, 0, 0], [seed & MASK, seed >> 32]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & MASK, (a >> 32) ^ counter[3] ^ key[1], a & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter[0]


def penalized(logits: list[float], prompt, generated, params: SamplingParams) -> list[float]:
    out = list(logits)
    for id in {*prompt, *generated}:
        out[id] = out[id] / params.repetition_penalty if out[id] > 0 else out[id] * params.repetition_penalty
    for id in set(generated):
        out[id] -= params.frequency_penalty * list(generated).count(id) + params.presence_penalty
    for id, value in params.logit_bias.items():
        out[id] += value
    return out


def first_to_reach(order: list[int], weights: dict[int, float], share: float) -> list[int]:
    total, kept = sum(weights.values()), []
    for id in order:
        kept.append(id)
        if sum(weights[other] for other in kept) >= share * total:
            break
    return kept


def left_over(logits: list[float], params: SamplingParams) -> list[int]:
    weights = {id: exp((logit - max(logits)) / params.temperature) for id, logit in enumerate(logits)}
    ids = sorted(weights, key=lambda id: -weights[id])
    if params.top_k:
        ids = ids[: params.top_k]
    if params.top_p < 1:
        ids = first_to_reach(ids, {id: weights[id] for id in ids}, params.top_p)
    if params.typical_p < 1:
        total = sum(weights[id] for id in ids)
        surprise = {id: -log(weights[id] / total) for id in ids}
        entropy = sum(weights[id] / total * surprise[id] for id in ids)
        order = sorted(ids, key=lambda id: abs(surprise[id] - entropy))
        ids = first_to_reach(order, {id: weights[id] for id in ids}, params.typical_p)
    return [id for id in ids if weights[id] >= params.min_p * max(weights[other] for other in ids)]


def chosen(logits: list[float], params: SamplingParams, seed: int, position: int) -> int:
    if params.temperature == 0:
        return logits.index(max(logits))
    noise = {id: -log(-log((philox(seed, id, position) + 0.5) / 2**32)) for id in left_over(logits, params)}
    return max(noise, key=lambda id: logits[id] / params.temperature + noise[id])


# ---- choosing ----


@SETTINGS
@given(
    seed=st.integers(0, 2**64 - 1),
    generated=st.lists(st.integers(0, V - 1), max_size=12),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        top_k=st.sampled_from([0, 1, 5, 40]),
        top_p=st.sampled_from([1.0, 0.2, 0.83]),
        typical_p=st.sampled_from([1.0, 0.37]),
        min_p=st.sampled_from([0.0, 0.07]),
        repetition_penalty=st.sampled_from([1.0, 0.7, 1.6]),
        presence_penalty=st.sampled_from([0.0, -1.5, 2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.8]),
        logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-50.0, 3.5]), max_size=3),
    ),
)
def test_choice_matches_slow_reference(seed, generated, params):
    prompt = (5, 6, 6, 90)
    draws = Draws.of(params, seed, prompt, frozenset(), None)
    for id in generated:
        draws.record(id)
    logits = logits_of(1, seed % 1000)
    expected = chosen(penalized(logits[0].tolist(), prompt, generated, params), params, seed, len(prompt) + len(generated))

    (choice,) = Sampler().draw(logits, [row_of(draws, len(generated))]).wait()

    assert choice.id == expected


def test_rows_do_not_see_each_other():
    draws = [
        draws_of(temperature=0.0),
        draws_of(generated=(1, 1), frequency_penalty=1.0, seed=2**64 - 1),
        draws_of(top_k=3, seed=11, num_logprobs=4),
        draws_of(logit_bias={3: 9.0}, min_p=0.1, num_logprobs=0),
        draws_of(repetition_penalty=1.3, seed=12),
    ]
    rows, logits = [row_of(each, 2) for each in draws], logits_of(5)
    alone = [Sampler().draw(logits[[index]], [row]).wait()[0] for index, row in enumerate(rows)]

    together = Sampler().draw(logits.clone(), rows).wait()

    assert together == alone


def test_draws_follow_the_distribution():
    row = draws_of(seed=3)
    logits = logits_of(1).expand(2000, V).clone()
    probabilities = torch.softmax(logits[0], 0)

    choices = Sampler().draw(logits, [row_of(row, index) for index in range(2000)]).wait()

    counts = torch.bincount(torch.tensor([choice.id for choice in choices]), minlength=V) / 2000
    assert (counts - probabilities).abs().max() < 0.03  # three standard deviations at most


def test_no_rows_give_no_choices():
    assert Sampler().draw(logits_of(0), []).wait() == []


# ---- penalties and bias ----


def test_presence_penalty_ignores_the_prompt():
    logits = torch.zeros(1, V)
    logits[0, 5], logits[0, 6] = 2.0, 1.5

    (choice,) = Sampler().draw(logits, [row_of(draws_of(prompt=(5,), temperature=0.0, presence_penalty=9.0))]).wait()

    assert choice.id == 5


def test_repetition_penalty_sees_the_prompt():
    logits = torch.zeros(1, V)
    logits[0, 5], logits[0, 6] = 2.0, 1.5

    (choice,) = Sampler().draw(logits, [row_of(draws_of(prompt=(5,), temperature=0.0, repetition_penalty=4.0))]).wait()

    assert choice.id == 6


def test_history_counts_what_was_generated():
    history = History((4, 9, 4))

    for id in (9, 7, 9, 4):
        history.record(id)

    assert dict(zip(history.ids, history.counts, strict=True)) == {4: 1, 9: 2, 7: 1}


def test_history_is_kept_only_for_penalties():
    assert draws_of().history is None
    assert list(draws_of(presence_penalty=1.0).history.ids) == []
    assert list(draws_of(repetition_penalty=1.1).history.ids) == [5, 6]


@pytest.mark.parametrize("generated", [0, 1, 2, 3])
def test_stop_ids_wait_for_min_tokens(generated):
    logits = torch.zeros(1, V)
    logits[0, 8], logits[0, 3] = 50.0, 1.0
    draws = draws_of(temperature=0.0, min_tokens=2, stop_ids=(8,), logit_bias={8: 100.0})

    (choice,) = Sampler().draw(logits, [row_of(draws, generated)]).wait()

    assert choice.id == (3 if generated < 2 else 8)


def test_banning_everything_leaves_a_choice():
    draws = draws_of(min_tokens=1, stop_ids=range(V))

    (choice,) = Sampler().draw(logits_of(1), [row_of(draws)]).wait()

    assert 0 <= choice.id < V


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 1e300, "logit_bias": {1: 1e300}},
        {"frequency_penalty": -1e300, "presence_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300, "frequency_penalty": 1e300},
        {"temperature": 1e-300},
        {"temperature": 1e300},
        {"top_p": 1e-300, "typical_p": 1e-300, "min_p": 1.0},
        {"top_k": 10**18},
    ],
)
def test_extreme_params_hurt_nobody_else(params):
    rows = [row_of(draws_of(generated=(1, 2, 2), **params), 3), row_of(draws_of(seed=5), 3)]
    logits = logits_of(2)
    alone = Sampler().draw(logits[[1]], rows[1:]).wait()[0]

    choices = Sampler().draw(logits, rows).wait()

    assert choices[1] == alone


# ---- log probabilities ----


def test_logprobs_are_of_the_raw_logits():
    logits = logits_of(1)
    expected = torch.log_softmax(logits[0], 0)
    draws = draws_of(generated=(3,), temperature=0.4, presence_penalty=1.0, logit_bias={2: 5.0}, num_logprobs=3)

    (choice,) = Sampler().draw(logits.clone(), [row_of(draws, 1)]).wait()

    assert choice.logprob == pytest.approx(expected[choice.id].item(), abs=1e-5)
    assert [id for id, _ in choice.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in choice.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)


def test_rows_get_the_alternatives_they_asked_for():
    rows = [row_of(draws_of(num_logprobs=wanted)) for wanted in (None, 0, 2, 1000)]

    choices = Sampler().draw(logits_of(4), rows).wait()

    assert [len(choice.top) for choice in choices] == [0, 0, 2, V]
    assert [choice.logprob is None for choice in choices] == [True, False, False, False]


def test_scores_leave_logits_alone():
    logits = logits_of(3)
    before = logits.clone()

    scores = Sampler().score(logits, (1, 2, 96), (0, 1, 2)).wait()

    expected = torch.log_softmax(before, 1)
    assert torch.equal(logits, before)
    assert [score.logprob for score in scores] == pytest.approx(
        [expected[i, id].item() for i, id in enumerate((1, 2, 96))], abs=1e-5
    )


def test_impossible_token_has_logprob_minus_infinity():
    logits = torch.zeros(1, V)
    logits[0, 9] = -inf

    (score,) = Sampler().score(logits, (9,), (0,)).wait()

    assert score.logprob == -inf


# ---- seeds ----


def test_candidates_have_seeds_of_their_own():
    seeds = {candidate_seed(seed, index) for seed in (0, 1, 2, 2**64 - 1) for index in range(128)}

    assert len(seeds) == 4 * 128
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_negative_seed_is_a_seed():
    assert candidate_seed(-1, 0) == candidate_seed(2**64 - 1, 0)

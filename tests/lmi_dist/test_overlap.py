"""Steps that overlap say the same as those that do not: only the order differs in which the device and the host get their work.

On a CPU a forward has run when its call returns, but its tokens are still fed to the next one where they were chosen, and the host
learns of them a step late, as on a GPU.
"""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from lmi_dist import Engine, EngineConfig, Output, Request, SamplingParams, StepError
from lmi_dist.flight import Flight
from lmi_dist.plan import PENDING, Plan

pytestmark = pytest.mark.usefixtures("column_as_before")
BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # of the tiny model: k and v, layers, key heads, tokens, head size, fp32
SMALL = {"kv_cache_memory_bytes": 10 * BLOCK_BYTES, "prefill_chunk_tokens": 24, "max_batch_size": 6}  # preempts and cuts prompts


def make(folder: Path, *, overlap: bool, **values: Any) -> Engine:
    """batch_invariant: steps that overlap have other company, since sequences come in a step later."""
    defaults = {"model": str(folder), "dtype": "fp32", "max_model_len": 128, "max_batch_size": 16, "cpu_threads": 1}
    values = {"batch_invariant": True, **values}
    return Engine(EngineConfig.of({**defaults, **values}), overlap=overlap)


def ask(id: str, prompt: Any = "The quick", **params: Any) -> Request:
    return Request(id=id, prompt=prompt, params=SamplingParams(**{"max_tokens": 12, "seed": 1, "ignore_eos": True, **params}))


def watch_plans(engine: Engine, patch: pytest.MonkeyPatch) -> list[Plan]:
    """What runs from now on."""
    plans: list[Plan] = []
    forward = engine._runner.forward

    def watched(plan: Plan, *given: Any) -> torch.Tensor:
        plans.append(plan)
        return forward(plan, *given)

    patch.setattr(engine._runner, "forward", watched)
    return plans


def run(engine: Engine, requests: list[Request], chance: random.Random | None = None) -> dict[tuple[str, int], list[Output]]:
    """What is said of each candidate; the requests come at any time, if there is chance."""
    said: dict[tuple[str, int], list[Output]] = defaultdict(list)
    to_come = requests[::-1]
    while to_come or engine.has_work:
        while to_come and (chance is None or chance.random() < 0.5):
            engine.add(to_come.pop())
        for output in engine.step():
            said[output.request_id, output.index].append(output)
    return said


def whole(outputs: list[Output]) -> tuple[Any, ...]:
    """All of it, whichever output told it."""
    last = outputs[-1]
    return (
        "".join(output.text for output in outputs),
        [token for output in outputs for token in output.tokens],
        [token for output in outputs for token in output.prompt_tokens],
        last.finish_reason, last.stop_reason, last.num_prompt_tokens, last.num_generated_tokens, last.cumulative_logprob,
    )  # fmt: skip


def random_request(chance: random.Random, id: str) -> Request:
    params = {
        "max_tokens": chance.randrange(1, 60),
        "seed": chance.getrandbits(64),
        "temperature": chance.choice([0.0, 0.7, 1.5]),
        "top_p": chance.choice([1.0, 0.9]),
        "n": chance.choice([1, 1, 1, 3]),
        "stop": chance.choice([(), (), ("a", "the"), (" ",)]),
        "stop_token_ids": chance.choice([(), (5, 60, 70, 80, 90)]),
        "min_tokens": chance.choice([0, 0, 1]),
        "repetition_penalty": chance.choice([1.0, 1.2]),
        "frequency_penalty": chance.choice([0.0, 0.0, 0.5]),
        "logit_bias": chance.choice([{}, {}, {2: 3.0}]),
        "ignore_eos": chance.random() < 0.5,
        "logprobs": chance.choice([None, None, 0, 2]),
        "prompt_logprobs": chance.choice([None, None, None, 1]),
    }
    if chance.random() < 0.2:
        params["best_of"] = params["n"] + 1
    return ask(id, tiny_models.prompt_of(chance.randrange(1, 60), seed=chance.randrange(3)), **params)


@pytest.mark.parametrize("kernels", ["cpu", "sim"])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 60))])
def test_outputs_equal_those_without_overlap(folder: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, seed: int) -> None:
    """Stop strings and ids, end of text and number of tokens, several candidates, penalties, log probabilities, preemptions, cached
    prefixes, prompts cut beside decodes: whatever a chance brings together."""
    chance = random.Random(seed)
    requests = [random_request(chance, f"r{i}") for i in range(6 if kernels == "sim" else 20)]
    plain, overlapped = (make(folder, overlap=overlap, kernels=kernels, **SMALL) for overlap in (False, True))
    plans = watch_plans(overlapped, monkeypatch)

    expected, said = (run(engine, requests, random.Random(seed)) for engine in (plain, overlapped))

    assert {key: whole(outputs) for key, outputs in said.items()} == {key: whole(outputs) for key, outputs in expected.items()}
    stats = overlapped.stats()
    assert stats.num_free_blocks == 10
    assert stats.num_preemptions > 0 or seed > 1 or kernels == "sim"  # those chances come to it
    assert (stats.num_generated_tokens, stats.num_begun) == (plain.stats().num_generated_tokens, len(requests))
    ahead = [plan for plan in plans if any(chunk.token_ids[0] == PENDING for chunk in plan.decodes)]
    assert len(ahead) > len(plans) / 3
    assert [plan for plan in ahead if plan.chunks]


def test_next_forward_begins_before_the_tokens_are_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(folder, overlap=True)
    engine.add(ask("a", max_tokens=4))
    calls: list[str] = []
    forward, wait = engine._runner.forward, Flight.wait
    monkeypatch.setattr(
        engine._runner, "forward", lambda plan, *given: (calls.append(f"run {plan.step}"), forward(plan, *given))[1]
    )
    monkeypatch.setattr(Flight, "wait", lambda flight: (calls.append(f"wait {flight.plan.step}"), wait(flight))[1])

    outputs = [engine.step() for _ in range(4)]

    assert calls == ["run 0", "run 1", "wait 0", "run 2", "wait 1", "run 3", "wait 2", "wait 3"]
    assert [len(each[0].tokens) for each in outputs] == [1, 1, 1, 1]
    assert not engine.has_work


def test_without_overlap_nothing_is_begun_that_is_not_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(folder, overlap=False)
    plans = watch_plans(engine, monkeypatch)
    engine.add(ask("a", max_tokens=4))

    outputs = [engine.step() for _ in range(2)]

    assert [len(each[0].tokens) for each in outputs] == [1, 1]
    assert len(plans) == 2


@pytest.mark.parametrize("length", range(12, 20))
def test_key_behind_the_end_is_found_by_nobody(folder: Path, length: int) -> None:
    """The forward that runs for nothing writes the last token's key; where that fills a block, the block is not to be found."""
    engine, fresh = make(folder, overlap=True), make(folder, overlap=False)
    prompt = tiny_models.prompt_of(length)
    ids = [token.id for token in whole(run(fresh, [ask("a", prompt, max_tokens=4)])["a", 0])[1]]
    stopping = ask("a", prompt, stop_token_ids=(ids[2],))
    ended = whole(run(engine, [stopping])["a", 0])

    next_prompt = (*prompt, *ids[: len(ended[1])], 9, 8, 7)
    answers = [whole(run(each, [ask("b", next_prompt)])["b", 0]) for each in (engine, fresh)]

    assert ended[3:5] == ("stop_sequence", ids[2])
    assert answers[0] == answers[1]
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_sequence_that_has_ended_runs_no_further(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a number of tokens, which is known ahead, not once more; by a stop, once for nothing; and it chooses no token there."""
    engine = make(folder, overlap=True)
    plans, draws, draw = watch_plans(engine, monkeypatch), [], engine._sampler.draw
    monkeypatch.setattr(engine._sampler, "draw", lambda *given: (draws.append(given), draw(*given))[1])
    run(engine, [ask("a", max_tokens=3)])
    assert [plan.num_tokens for plan in plans[1:]] == [1, 1]

    plans.clear()
    run(engine, [ask("b", max_tokens=9, stop_token_ids=(70,), logit_bias={70: 100.0}, min_tokens=2)])

    assert [plan.num_tokens for plan in plans[1:]] == [1, 1, 1]
    assert len(draws) == 3 + 3
    assert engine.stats().num_generated_tokens == 3 + 3
    assert not engine.has_work
    assert engine.step() == []


def test_abort_in_flight_gives_blocks_back_at_once(folder: Path) -> None:
    engine = make(folder, overlap=True)
    expected = run(make(folder, overlap=False), [ask("b", max_tokens=30)])
    engine.add(ask("a", tiny_models.prompt_of(40), n=3, max_tokens=50))
    engine.add(ask("b", max_tokens=30))
    said = [output for _ in range(3) for output in engine.step()]

    aborted = engine.abort("a")

    assert [(output.index, output.finish_reason) for output in aborted] == [(0, "abort"), (1, "abort"), (2, "abort")]
    assert engine.stats().num_free_blocks == engine.stats().num_blocks - 1
    said += [output for outputs in run(engine, []).values() for output in outputs]
    assert whole([output for output in said if output.request_id == "b"]) == whole(expected["b", 0])
    assert [output for output in said if output.request_id == "a" and output.finish_reason] == []
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_step_that_nobody_wants_any_more_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(folder, overlap=True)
    engine.add(ask("a"))
    engine.step()
    engine.abort("a")
    engine.add(ask("b", max_tokens=1))
    waited: list[Plan] = []
    wait = Flight.wait
    monkeypatch.setattr(Flight, "wait", lambda flight: (waited.append(flight.plan), wait(flight))[1])

    (output,) = engine.step()

    assert (output.request_id, output.finish_reason) == ("b", "length")
    assert [[chunk.start for chunk in plan.rows] for plan in waited] == [[0]]


def test_reset_in_flight_leaves_nothing(folder: Path) -> None:
    engine = make(folder, overlap=True)
    expected = run(make(folder, overlap=False), [ask("b")])
    engine.add(ask("a", tiny_models.prompt_of(40)))
    engine.step()

    engine.reset()

    assert engine.step() == []
    assert whole(run(engine, [ask("b")])["b", 0]) == whole(expected["b", 0])


@pytest.mark.parametrize("what", ["forward", "draw"])
def test_failed_step_ends_only_its_requests(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The step behind the one in flight fails: what the latter says is still said."""
    engine = make(folder, overlap=True, max_batch_size=1)
    expected = run(make(folder, overlap=False), [ask("b")])
    engine.add(ask("a"))
    engine.add(ask("b"))
    said = engine.step()
    owner = engine._runner if what == "forward" else engine._sampler
    with monkeypatch.context() as failing:
        failing.setattr(owner, what, lambda *_: 1 / 0)
        said += engine.step()
    said += [output for outputs in run(engine, []).values() for output in outputs]

    (*good, failed) = [output for output in said if output.request_id == "a"]
    assert [len(output.tokens) for output in good] == [1, 1]
    assert isinstance(failed.error, StepError)
    assert isinstance(failed.error.__cause__, ZeroDivisionError)
    assert whole([output for output in said if output.request_id == "b"]) == whole(expected["b", 0])
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert engine.stats().num_failed_steps == 1


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_broken_logits_end_only_their_request(folder: Path, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    engine = make(folder, overlap=True)
    expected = run(make(folder, overlap=False), [ask("b")])
    engine.add(ask("a"))
    engine.add(ask("b"))
    said = engine.step()
    forward = engine._runner.forward

    @torch.inference_mode()
    def broken(*given: Any) -> torch.Tensor:
        logits = forward(*given)
        logits[0] = bad
        return logits

    with monkeypatch.context() as breaking:
        breaking.setattr(engine._runner, "forward", broken)
        said += engine.step()
    said += [output for outputs in run(engine, []).values() for output in outputs]

    assert [output.finish_reason for output in said if output.request_id == "a"][-1] == "error"
    assert whole([output for output in said if output.request_id == "b"]) == whole(expected["b", 0])
    assert engine.stats().num_free_blocks == engine.stats().num_blocks

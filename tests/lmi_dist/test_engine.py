"""The engine on a tiny random Llama: a text does not depend on its company and ends for the right reason; a failure stays alone."""

import random
import threading
import time
from pathlib import Path

import pytest
import tiny_models
import tiny_tokenizers
import torch

from lmi_dist import (
    CheckpointError,
    ConfigError,
    Engine,
    EngineConfig,
    MemoryPlanError,
    Output,
    OverloadedError,
    Request,
    RequestError,
    SamplingParams,
    StepError,
    explain,
)
from lmi_dist.weights import Checkpoint

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x",
    "我能吞下玻璃而不伤身体。",
    "a",
    "The quick brown fox jumps over the lazy dog. And then another one, which is longer than the ones before it.",
)
LENGTH = 128
BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # of the tiny model: k and v, layers, key heads, tokens, head size, fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return make(folder)


@pytest.fixture(autouse=True)
def idle(request):
    """The shared engine is left empty, with all blocks given back."""
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        stats, had_work = engine.stats(), engine.has_work
        engine.reset()
        assert not had_work
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks


def make(folder: Path, **values) -> Engine:
    defaults = {"model": str(folder), "dtype": "fp32", "max_model_len": LENGTH, "max_batch_size": 16, "cpu_threads": 1}
    return Engine(EngineConfig.of({**defaults, **values}))


def ask(id: str, prompt="The quick", *, cache_salt="", **params) -> Request:
    params = SamplingParams(**{"max_tokens": 12, "seed": 1, "ignore_eos": True, **params})
    return Request(id=id, prompt=prompt, params=params, cache_salt=cache_salt)


def run(engine: Engine, *requests: Request) -> dict[str, list[Output]]:
    """Everything that is said about each request."""
    for request in requests:
        engine.add(request)
    outputs = {request.id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def answer(outputs: list[Output], index: int = 0) -> str:
    mine = [output for output in outputs if output.index == index]
    assert [output.finish_reason is not None for output in mine] == [False] * (len(mine) - 1) + [True]
    return "".join(output.text for output in mine)


def tokens_of(outputs: list[Output], index: int = 0) -> list:
    return [token for output in outputs if output.index == index for token in output.tokens]


def ids_of(outputs: list[Output], index: int = 0) -> list[int]:
    return [token.id for token in tokens_of(outputs, index)]


def many(**params) -> list[Request]:
    """Requests of all kinds, each with its own way of choosing."""
    ways = (
        {"temperature": 0.0},
        {"seed": 5, "top_k": 20, "repetition_penalty": 1.2},
        {"seed": 6, "top_p": 0.9, "frequency_penalty": 0.3},
        {"seed": 7, "n": 2},
        {"seed": 8, "min_p": 0.05, "logit_bias": {30: 2.0}},
    )
    return [
        ask(f"r{i}", prompt, **{"max_tokens": 40, **way, **params})
        for i, (prompt, way) in enumerate(zip(PROMPTS, ways, strict=True))
    ]


def alone(folder: Path, requests: list[Request]) -> dict[str, list[list[int]]]:
    engine = make(folder, enable_prefix_caching=False)
    return {r.id: [ids_of(run(engine, r)[r.id], i) for i in range(r.params.n)] for r in requests}


def together(engine: Engine, requests: list[Request]) -> dict[str, list[list[int]]]:
    outputs = run(engine, *requests)
    return {r.id: [ids_of(outputs[r.id], i) for i in range(r.params.n)] for r in requests}


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, list[list[int]]]:
    return alone(folder, many())


# ---- a text does not depend on its company ----


def test_greedy_answer_equals_transformers(folder, engine):
    prompt = tiny_models.prompt_of(20)
    reference = tiny_models.refer(tiny_models.build("llama2-gqa"), prompt, 32)

    outputs = run(engine, ask("a", prompt, max_tokens=32, temperature=0.0))["a"]

    assert tiny_models.gap(reference.logits).min() > tiny_models.LEAST_GAP
    assert ids_of(outputs) == list(reference.ids)


def test_batched_answers_equal_lone_ones(engine, expected):
    assert together(engine, many()) == expected


def test_chunked_answers_equal_lone_ones(folder, expected):
    engine = make(folder, prefill_chunk_tokens=7, max_prefill_tokens=7, enable_prefix_caching=False)

    assert together(engine, many()) == expected


def test_preempted_answers_equal_lone_ones(folder, expected):
    engine = make(folder, kv_cache_memory_bytes=8 * BLOCK_BYTES, enable_prefix_caching=False)

    answers = together(engine, many())

    assert answers == expected
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_free_blocks == 8


def test_prefix_cached_answers_equal_lone_ones(folder, expected):
    engine = make(folder)
    together(engine, many())

    answers = together(engine, many())

    assert answers == expected
    assert engine.stats().num_prefix_hit_tokens > 0


def test_other_salt_shares_no_blocks(folder):
    engine = make(folder)
    run(engine, ask("a", PROMPTS[0], cache_salt="one"))

    run(engine, ask("b", PROMPTS[0], cache_salt="two"))

    assert engine.stats().num_prefix_hit_tokens == 0


def test_answers_without_seed_differ(engine):
    outputs = run(engine, *[ask(f"r{i}", seed=None, max_tokens=16) for i in range(3)])

    assert len({tuple(ids_of(each)) for each in outputs.values()}) == 3


# ---- candidates ----


def test_candidates_differ_and_have_indices(engine):
    outputs = run(engine, ask("a", n=3))["a"]

    assert len({answer(outputs, index) for index in range(3)}) == 3
    assert {output.index for output in outputs} == {0, 1, 2}


def test_candidates_share_the_prompts_blocks(folder):
    engine = make(folder)

    run(engine, ask("a", PROMPTS[0], n=4))

    assert engine.stats().num_prefix_hit_tokens > 0


def test_best_of_returns_the_most_probable(engine):
    all_five = run(engine, ask("a", n=5, logprobs=0))["a"]
    best = sorted(range(5), key=lambda i: -[o for o in all_five if o.index == i][-1].cumulative_logprob)[:2]

    outputs = run(engine, ask("b", n=2, best_of=5))["b"]

    assert [output.index for output in outputs] == [0, 1]
    assert [answer(outputs, i) for i in range(2)] == [answer(all_five, i) for i in best]
    assert [output.cumulative_logprob for output in outputs] == sorted((o.cumulative_logprob for o in outputs), reverse=True)
    assert all(token.logprob is None for output in outputs for token in output.tokens)


# ---- text and endings ----


@pytest.mark.parametrize("skip", [True, False])
def test_stream_equals_batch(engine, skip):
    outputs = run(engine, ask("a", skip_special_tokens=skip, max_tokens=60, temperature=2.0))["a"]

    assert answer(outputs) == engine.tokenizer.decode(ids_of(outputs), skip_special_tokens=skip)
    assert all(output.text == "".join(token.text for token in output.tokens) for output in outputs)


@pytest.mark.parametrize("include", [True, False])
def test_stop_string_cuts_the_text(engine, include):
    whole = answer(run(engine, ask("a", max_tokens=40))["a"])
    stop = whole[len(whole) // 2 :][:3]
    end = whole.index(stop) + (len(stop) if include else 0)

    outputs = run(engine, ask("b", max_tokens=40, stop=(stop,), include_stop_string=include))["b"]

    assert answer(outputs) == whole[:end]
    assert outputs[-1].finish_reason == "stop_sequence"
    assert outputs[-1].stop_reason == stop
    assert len(ids_of(outputs)) == outputs[-1].num_generated_tokens < 40


def test_length_ends_the_answer(engine):
    outputs = run(engine, ask("a", max_tokens=5))["a"]

    assert outputs[-1].finish_reason == "length"
    assert len(ids_of(outputs)) == outputs[-1].num_generated_tokens == 5


def test_max_tokens_is_cut_to_the_models_length(engine):
    outputs = run(engine, ask("a", tiny_models.prompt_of(120), max_tokens=None))["a"]

    assert outputs[-1].finish_reason == "length"
    assert len(ids_of(outputs)) == LENGTH - 120


def test_eos_ends_the_answer_as_empty_token(engine):
    outputs = run(engine, ask("a", ignore_eos=False, logit_bias={2: 100.0}, min_tokens=3, skip_special_tokens=False))["a"]

    last = tokens_of(outputs)[-1]
    assert outputs[-1].finish_reason == "eos_token"
    assert (last.id, last.text, last.is_special) == (2, "", True)
    assert outputs[-1].num_generated_tokens == 4


def test_ignored_eos_goes_on(engine):
    outputs = run(engine, ask("a", max_tokens=4, logit_bias={2: 100.0}))["a"]

    assert ids_of(outputs) == [2, 2, 2, 2]
    assert outputs[-1].finish_reason == "length"


def test_stop_token_ends_the_answer(engine):
    outputs = run(engine, ask("a", stop_token_ids=(70,), logit_bias={70: 100.0}))["a"]

    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop_sequence", 70)
    assert [(token.id, token.text) for token in tokens_of(outputs)] == [(70, "")]


# ---- log probabilities ----


def test_logprobs_equal_transformers(engine):
    prompt = tiny_models.prompt_of(9)
    outputs = run(engine, ask("a", prompt, logprobs=3, temperature=0.7))["a"]
    ids = ids_of(outputs)

    logits = tiny_models.teacher_forced(tiny_models.build("llama2-gqa"), (*prompt, *ids))

    expected = torch.log_softmax(logits, 1)[len(prompt) - 1 : -1]
    for token, row in zip(tokens_of(outputs), expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-3)
        assert [each.id for each in token.top] == row.topk(3).indices.tolist()
        assert [each.logprob for each in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    assert outputs[-1].cumulative_logprob == pytest.approx(sum(token.logprob for token in tokens_of(outputs)))


@pytest.mark.parametrize("values", [{}, {"prefill_chunk_tokens": 7, "max_prefill_tokens": 7}, {"n": 2}, {"n": 1, "best_of": 2}])
def test_prompt_logprobs_equal_transformers(folder, values):
    prompt = tiny_models.prompt_of(23)
    expected = torch.log_softmax(tiny_models.teacher_forced(tiny_models.build("llama2-gqa"), prompt), 1)
    engine = make(folder, **{name: value for name, value in values.items() if "prefill" in name})
    candidates = {name: value for name, value in values.items() if "prefill" not in name}
    run(engine, ask("before", prompt))  # its cached blocks must not stand in for logits

    outputs = run(engine, ask("a", prompt, prompt_logprobs=2, **candidates))["a"]

    tokens = [token for output in outputs for token in output.prompt_tokens]
    assert tuple(token.id for token in tokens) == prompt
    assert tokens[0].logprob is None
    assert [token.logprob for token in tokens[1:]] == pytest.approx(
        [expected[i, id].item() for i, id in enumerate(prompt[1:])], abs=1e-3
    )
    assert [[each.id for each in token.top] for token in tokens[1:]] == expected[:-1].topk(2).indices.tolist()
    assert "".join(token.text for token in tokens) == engine.tokenizer.decode(prompt)
    assert outputs[0].prompt_tokens


# ---- leaving early ----


def test_abort_gives_blocks_back_at_once(engine):
    engine.add(ask("a", PROMPTS[0], n=3))
    engine.add(ask("b", max_tokens=4))
    engine.step()

    outputs = engine.abort("a")

    assert [(output.index, output.finish_reason) for output in outputs] == [(0, "abort"), (1, "abort"), (2, "abort")]
    assert engine.stats().num_running == 1
    assert engine.abort("a") == []
    assert set(run(engine)) == {"b"}


def test_aborted_id_can_be_used_again(engine):
    engine.add(ask("a"))
    engine.abort("a")

    assert answer(run(engine, ask("a"))["a"])


def test_reset_leaves_nothing(folder):
    engine = make(folder)
    run(engine, ask("old", PROMPTS[0]))
    engine.add(ask("a", PROMPTS[0]))
    engine.step()

    outputs = engine.reset()

    hits = engine.stats().num_prefix_hit_tokens
    run(engine, ask("new", PROMPTS[0]))
    assert [output.finish_reason for output in outputs] == ["abort"]
    assert engine.stats().num_prefix_hit_tokens == hits


# ---- failures stay alone ----


def test_failed_step_ends_only_its_requests(folder, monkeypatch):
    engine = make(folder, max_batch_size=1)
    forward, lone = engine._runner.forward, answer(run(engine, ask("b"))["b"])
    engine.add(ask("a"))
    engine.add(ask("b"))
    monkeypatch.setattr(engine._runner, "forward", lambda *_: 1 / 0)
    outputs = engine.step()
    monkeypatch.setattr(engine._runner, "forward", forward)

    (failed,) = outputs
    assert (failed.request_id, failed.finish_reason) == ("a", "error")
    assert isinstance(failed.error, StepError)
    assert isinstance(failed.error.__cause__, ZeroDivisionError)
    assert answer(collect(engine, "b")) == lone
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert engine.stats().num_failed_steps == 1


def collect(engine: Engine, id: str) -> list[Output]:
    outputs = []
    while engine.has_work:
        outputs += [output for output in engine.step() if output.request_id == id]
    return outputs


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_broken_logits_end_only_their_request(engine, monkeypatch, bad):
    lone, forward = answer(run(engine, ask("b"))["b"]), engine._runner.forward
    monkeypatch.setattr(engine._runner, "forward", lambda *given: broken(forward(*given), bad))
    engine.add(ask("a"))
    engine.add(ask("b"))
    outputs = engine.step()
    monkeypatch.setattr(engine._runner, "forward", forward)

    assert [(output.request_id, output.finish_reason) for output in outputs] == [("a", "error"), ("b", None)]
    assert answer([*outputs[1:], *collect(engine, "b")]) == lone


def broken(logits: torch.Tensor, bad: float) -> torch.Tensor:
    with torch.inference_mode():
        logits[0] = bad
    return logits


def test_failing_candidate_of_a_ranked_request_ends_it(folder, monkeypatch):
    engine = make(folder)
    engine.add(ask("a", n=2, best_of=4))
    engine.step()
    monkeypatch.setattr(engine._runner, "forward", lambda *_: 1 / 0)

    outputs = engine.step()

    assert [(output.index, output.finish_reason) for output in outputs] == [(0, "error"), (1, "error")]
    assert not engine.has_work


@pytest.mark.parametrize("num_requests", [24, pytest.param(1000, marks=pytest.mark.soak)])
def test_chaos_leaves_answers_and_blocks_right(folder, monkeypatch, num_requests):
    engine = make(folder, kv_cache_memory_bytes=12 * BLOCK_BYTES, prefill_chunk_tokens=24, max_batch_size=8)
    chance, forward = random.Random(num_requests), engine._runner.forward
    monkeypatch.setattr(engine._runner, "forward", lambda *given: 1 / 0 if chance.random() < 0.02 else forward(*given))
    requests = [random_request(chance, f"r{i}") for i in range(num_requests)]
    to_come, outputs = list(reversed(requests)), {request.id: [] for request in requests}

    while to_come or engine.has_work:
        said = engine.abort(f"r{chance.randrange(num_requests)}") if chance.random() < 0.05 else []
        if to_come and engine.stats().num_waiting < 16 and chance.random() < 0.4:
            engine.add(to_come.pop())
        for output in [*said, *engine.step()]:
            outputs[output.request_id].append(output)

    reasons, quiet = set(), make(folder, enable_prefix_caching=False)
    for request in requests:
        lone = run(quiet, request)[request.id]
        for index in range(request.params.n):
            text, ids = answer(outputs[request.id], index), ids_of(outputs[request.id], index)
            reason = next(o.finish_reason for o in outputs[request.id] if o.index == index and o.finish_reason)
            reasons.add(reason)
            if reason in ("abort", "error"):
                assert ids == ids_of(lone, index)[: len(ids)]
            else:
                assert (text, ids) == (answer(lone, index), ids_of(lone, index))
    assert engine.stats().num_free_blocks == 12
    assert {"length", "abort", "error"} <= reasons


def random_request(chance: random.Random, id: str) -> Request:
    params = {
        "max_tokens": chance.randrange(1, 40),
        "seed": chance.getrandbits(64),
        "temperature": chance.choice([0.0, 0.7, 1.5]),
        "n": chance.choice([1, 1, 1, 3]),
        "stop": chance.choice([(), ("a", "the"), (" ",)]),
        "repetition_penalty": chance.choice([1.0, 1.2]),
        "ignore_eos": chance.random() < 0.5,
        "prompt_logprobs": chance.choice([None, None, 1]),
    }
    return ask(id, tiny_models.prompt_of(chance.randrange(1, 80), seed=chance.randrange(3)), **params)


# ---- refused at the door ----


def test_refused_request_leaves_no_trace(engine):
    with pytest.raises(RequestError, match="prompt is empty"):
        engine.add(ask("a", ""))

    assert not engine.has_work
    assert answer(run(engine, ask("a"))["a"])


def test_live_id_is_refused(engine):
    engine.add(ask("a"))

    with pytest.raises(RequestError, match="id='a' is the id of a request that is still being answered"):
        engine.add(ask("a"))

    engine.abort("a")


def test_full_queue_refuses_more(folder):
    engine = make(folder, max_queue_size=2)
    engine.add(ask("a"))
    engine.add(ask("b"))

    with pytest.raises(OverloadedError, match="max_queue_size=2"):
        engine.add(ask("c"))


# ---- what an engine is made of ----


def test_stats_count_tokens(folder):
    engine = make(folder)

    run(engine, ask("a", tiny_models.prompt_of(10)), ask("b", tiny_models.prompt_of(20), n=2))

    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (30, 36)
    assert stats.num_steps >= 12
    assert stats.step_seconds > 0


def test_engine_does_what_explain_says(folder):
    config = EngineConfig(model=str(folder), max_model_len=64, kv_cache_memory_bytes=10 * BLOCK_BYTES, dtype="fp32")
    told = explain(config)

    engine = Engine(config)

    assert engine.config == told.config
    assert (engine.memory.num_blocks, engine.memory.dtype) == (told.memory.num_blocks, told.memory.dtype)
    assert engine.stats().num_blocks == told.memory.num_blocks == 10


def test_too_small_pool_is_refused_with_arithmetic(folder):
    with pytest.raises(MemoryPlanError, match="kv_cache_memory_bytes=8192 does not hold one sequence"):
        make(folder, kv_cache_memory_bytes=BLOCK_BYTES)


def test_tokenizer_may_lie_elsewhere(folder, tmp_path):
    tiny_tokenizers.byte_fallback().save_pretrained(tmp_path)

    engine = make(folder, tokenizer=str(tmp_path))

    outputs = run(engine, ask("a"))["a"]
    assert engine.tokenizer.convert_ids_to_tokens(5) == "<0x01>"
    assert outputs[-1].finish_reason == "length"


def test_broken_tokenizer_ends_the_loading_of_weights(folder, monkeypatch):
    read, names, begun = Checkpoint.read, set(), threading.Event()

    def read_slowly(self, name, *part):
        names.add(name)
        begun.set()
        time.sleep(0.02)
        return read(self, name, *part)

    def load_tokenizer(*_):
        begun.wait(10)
        raise CheckpointError("tokenizer=x cannot be loaded")

    monkeypatch.setattr(Checkpoint, "read", read_slowly)
    monkeypatch.setattr("lmi_dist.engine.load_tokenizer", load_tokenizer)

    with pytest.raises(CheckpointError, match="tokenizer=x"):
        make(folder)

    assert 0 < len(names) < len(Checkpoint(folder).tensors) // 2


def test_model_len_beyond_the_model_is_refused(folder):
    with pytest.raises(ConfigError, match="max_model_len=300 must be at most 256"):
        make(folder, max_model_len=300)


def test_closed_engine_gives_its_memory_back(folder):
    engine = make(folder)
    engine.add(ask("a"))

    engine.close()

    assert not engine.has_work


def test_windowed_model_holds_a_window_not_the_whole_text(tmp_path: Path) -> None:
    engine = make(tiny_models.save(tiny_models.build("mistral-window"), tmp_path))  # it looks back to 19 keys: 3 blocks at most
    engine.add(ask("r", tiny_models.prompt_of(60), max_tokens=60))
    used = []

    while engine.has_work:
        engine.step()
        stats = engine.stats()
        used.append(stats.num_blocks - stats.num_free_blocks)

    assert used[0] == 2  # of the prompt's four
    assert max(used) <= 3

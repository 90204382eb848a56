"""The LMI schema's parameters from a body to the text of its answer, through a real engine and the formatter; no HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
from lmi_dist_handler.requests import parse
from lmi_dist_handler.settings import HandlerConfig

from lmi_dist import Engine, EngineConfig

PROMPT = "the quick brown fox"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path_factory.mktemp("schema") / "tiny")
    engine = Engine(EngineConfig(model=str(folder), dtype="fp32", kv_cache_memory_bytes=1 << 22))
    engine.tokenizer.chat_template = TEMPLATE
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def told(engine: Engine) -> Any:
    """The text of the answer to a body."""

    def told(body: dict[str, Any], **options: Any) -> str:
        config = HandlerConfig(engine=engine.config, model_name="m", **options)
        parsed = parse(json.dumps(body).encode(), {}, engine, config)
        for request in parsed.requests:
            engine.add(request)
        text = ""
        while not parsed.formatter.is_done:
            text += "".join(parsed.formatter.push(output) for output in engine.step())
        return text

    return told


@pytest.fixture(scope="module")
def answer(told: Any) -> Any:
    """The whole answer to PROMPT with these parameters, 8 tokens long unless told otherwise."""

    def answer(inputs: object = PROMPT, **parameters: Any) -> Any:
        return json.loads(told({"inputs": inputs, "parameters": {"max_new_tokens": 8, "ignore_eos_token": True, **parameters}}))

    return answer


def test_truncate_keeps_the_last_tokens(engine: Engine, answer: Any) -> None:
    ids = engine.tokenizer(PROMPT, add_special_tokens=False)["input_ids"][-3:]

    prefill = answer(truncate=3, details=True, decoder_input_details=True)["details"]["prefill"]

    assert [token["id"] for token in prefill] == ids


def test_eos_ends_the_text_unless_ignored(engine: Engine, answer: Any) -> None:
    eos = engine.tokenizer.eos_token_id
    wants_eos = {"logit_bias": {str(eos): 1e9}, "details": True}

    ended, ignored = answer(ignore_eos_token=False, **wants_eos), answer(**wants_eos)

    assert ended["details"]["finish_reason"] == "eos_token"
    assert [(token["id"], token["text"], token["special_token"]) for token in ended["details"]["tokens"]] == [(eos, "", True)]
    assert (ignored["details"]["finish_reason"], ignored["details"]["generated_tokens"]) == ("length", 8)


def test_details_tell_the_prompt_and_each_token(answer: Any) -> None:
    found = answer(details=True, decoder_input_details=True, top_n_tokens=2)
    details = found["details"]

    assert details["prefill"][0] == {"id": 1, "text": "<s>", "log_prob": None, "special_token": True}
    assert "".join(token["text"] for token in details["prefill"][1:]) == PROMPT == details["inputs"]
    assert "".join(token["text"] for token in details["tokens"]) == found["generated_text"]
    assert [tops[0]["id"] for tops in details["top_tokens"]] == [token["id"] for token in details["tokens"]]
    assert {len(tops) for tops in details["top_tokens"]} == {2}


def test_full_text_begins_with_the_prompt(answer: Any) -> None:
    assert answer(return_full_text=True)["generated_text"] == PROMPT + answer()["generated_text"]


def test_stop_string_ends_the_text(answer: Any) -> None:
    text = answer()["generated_text"]
    stop = text[3:5]

    found = answer(stop_sequences=[stop, "never said"], details=True)

    assert found["generated_text"] == text.partition(stop)[0]
    assert found["details"]["finish_reason"] == "eos_token"  # DJL's word for both since 0.27


def test_seed_decides_what_is_sampled(answer: Any) -> None:
    texts = [answer(do_sample=True, temperature=2.0, seed=seed)["generated_text"] for seed in (1, 1, 2)]

    assert texts[0] == texts[1] != texts[2]


def test_n_candidates_come_best_first(answer: Any) -> None:
    found = answer(n=3, do_sample=True, seed=5, temperature=2.0, return_full_text=True)

    best, others = found["details"], found["details"]["best_of_sequences"]
    sums = [sum(token["log_prob"] for token in one["tokens"]) for one in (best, *others)]
    assert len(others) == 2
    assert sums == sorted(sums, reverse=True)
    assert all(other["generated_text"].startswith(PROMPT) for other in others)


def test_streamed_candidates_are_those_of_the_whole_answer(told: Any, answer: Any) -> None:
    words = {"n": 3, "do_sample": True, "seed": 5, "temperature": 2.0}

    lines = told({"inputs": PROMPT, "stream": True, "parameters": {"max_new_tokens": 8, "ignore_eos_token": True, **words}})

    found = [json.loads(line) for line in lines.splitlines()]
    texts = ["".join(line["token"]["text"] for line in found if line["index"] == index) for index in range(3)]
    whole = answer(**words)
    assert sorted(texts) == sorted(one["generated_text"] for one in (whole, *whole["details"]["best_of_sequences"]))
    assert sorted(line["generated_text"] for line in found if "generated_text" in line) == sorted(texts)


def test_best_of_returns_the_n_best(answer: Any) -> None:
    words = {"do_sample": True, "seed": 5, "temperature": 2.0}

    all_of_them, best = answer(best_of=3, **words), answer(best_of=3, n=1, **words)

    assert len(all_of_them["details"]["best_of_sequences"]) == 2
    assert best == {"generated_text": all_of_them["generated_text"]}


def test_every_parameter_at_once_gives_an_answer(answer: Any) -> None:
    found = answer(
        do_sample=True, temperature=0.9, top_k=20, top_p=0.95, typical_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={"5": -3}, min_new_tokens=2, stop=["zzz"], stop_token_ids=[399],
        skip_special_tokens=False, include_stop_str_in_output=True, truncate=50, logprobs=1, prompt_logprobs=1, details=True,
    )  # fmt: skip

    assert set(found["details"]) == {"finish_reason", "generated_tokens", "inputs", "tokens", "prefill", "top_tokens"}


def test_list_of_inputs_is_answered_in_its_order(answer: Any) -> None:
    prompts = ["one", PROMPT, "three"]

    found = answer(prompts, details=True, return_full_text=True)

    assert found == [answer(prompt, details=True, return_full_text=True) for prompt in prompts]
    assert [entry["details"]["inputs"] for entry in found] == prompts


@pytest.mark.parametrize("form", ["jsonlines", "sse", "none"])
def test_streamed_forms_have_the_whole_ones_text(told: Any, answer: Any, form: str) -> None:
    parameters = {"max_new_tokens": 8, "ignore_eos_token": True, "output_formatter": form, "details": True}

    text = told({"inputs": PROMPT, "parameters": parameters})

    if form == "none":
        assert text == answer()["generated_text"]
        return
    lines = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert "".join(line["token"]["text"] for line in lines) == lines[-1]["generated_text"] == answer()["generated_text"]
    assert lines[-1]["details"] == {"finish_reason": "length", "generated_tokens": 8, "inputs": PROMPT}


def test_tgi_compat_borrows_names(told: Any) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2, "ignore_eos_token": True}}

    (whole,) = json.loads(told(body, tgi_compat=True))
    events = told({**body, "stream": True}, tgi_compat=True)
    listed = json.loads(told({**body, "inputs": [PROMPT, "b"]}, tgi_compat=True))

    assert set(whole["details"]["tokens"][0]) == {"id", "text", "logprob", "special"}
    assert json.loads(events.splitlines()[0].removeprefix("data: "))["token"] == whole["details"]["tokens"][0]
    assert listed[0] == whole


def test_chat_in_djls_words_streams_and_comes_whole(told: Any) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    body = {"messages": [*messages, {"role": "tool", "content": "t"}], "max_tokens": 6, "temperature": 0, "ignore_eos": True}

    whole = json.loads(told({**body, "logprobs": True, "top_logprobs": 2}))
    lines = [json.loads(line) for line in told({**body, "stream": True}).splitlines()]

    content = whole["choices"][0]["message"]["content"]
    assert "".join(line["choices"][0]["delta"]["content"] for line in lines) == content
    assert whole["usage"]["completion_tokens"] == len(lines) == len(whole["choices"][0]["logprobs"]["content"]) == 6
    assert [line["choices"][0]["finish_reason"] for line in lines] == [None] * 5 + ["length"]

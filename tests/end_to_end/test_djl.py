"""Inside DJL Serving of each version, played by the tests' own host (djl_host.py): 200 mixed requests on real worker processes,
whose ids are those of the engine alone and of transformers, and whose headers, codes and bytes are the contract's."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models
from djl_host import VERSIONS, Client, DjlHost, Version
from running_server import until
from warm_python import warm

from lmi_dist import Engine, EngineConfig, Request, SamplingParams

NUM_TOKENS = 8
NUM_REQUESTS = 200
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
PROMPTS = ("The quick brown fox", "def f(x):", "Съешь же ещё", "two spaces,  a tab", "naïve café", "jumps over the lazy dog")
SEED = 20240126
CONTENT_TYPES = {
    "json": "application/json", "jsonlines": "application/jsonlines", "sse": "text/event-stream", "none": "text/plain",
    "completion": "application/json", "completion_lines": "application/jsonlines",
    "json_chat": "application/json", "jsonlines_chat": "application/jsonlines", "sse_chat": "text/event-stream",
}  # fmt: skip
FORMS = {26: (), 27: ("json", "jsonlines", "none", "json_chat", "jsonlines_chat")}
FORMS[28] = FORMS[29] = (*FORMS[27], "sse")
FORMS[36] = (*FORMS[29], "sse_chat")
FORMS_ASYNC = (*FORMS[29], "completion", "completion_lines")  # of today's: OpenAI's bodies, too

# what clients ask for: parameters, and the same in the engine's words
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "ignore_eos_token": True}
DRAWN: dict[str, Any] = {**GREEDY, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 7}
KINDS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    (GREEDY, {"temperature": 0.0}),
    (DRAWN, {"temperature": 0.9, "top_k": 20, "seed": 7}),
    ({name: value for name, value in DRAWN.items() if name != "seed"}, {"temperature": 0.9, "top_k": 20, "seed": SEED}),
    ({**GREEDY, "ignore_eos_token": False, "logit_bias": {"2": 1000}}, {"temperature": 0.0, "logit_bias": {2: 1000.0}}),
    ({**GREEDY, "repetition_penalty": 1.5, "max_new_tokens": 3}, {"temperature": 0.0, "repetition_penalty": 1.5, "max_tokens": 3}),
)
BROKEN: tuple[tuple[bytes, str], ...] = (
    (b"{", "the body is not JSON"),
    (b'{"parameters": {}}', "inputs is missing"),
    (b'{"inputs": "x", "parameters": {"top_p": 2}}', "parameters.top_p=2 is refused"),
    (json.dumps({"inputs": "far too long " * 300}).encode(), "max_model_len"),
)


@dataclass(frozen=True)
class Truth:
    """What the engine alone says."""

    text: str
    ids: tuple[int, ...]
    reason: str


@dataclass
class Model:
    """A checkpoint, and what becomes of a prompt there."""

    folder: Path
    engine: Engine
    known: dict[Any, Truth] = field(default_factory=dict)

    def truth(self, prompt: str, params: dict[str, Any], *, is_chat: bool = False) -> Truth:
        key = (prompt, json.dumps(params), is_chat)
        if key not in self.known:
            values = {"max_tokens": NUM_TOKENS, "ignore_eos": "logit_bias" not in params, "logprobs": 0, **params}
            self.engine.add(Request(id="alone", prompt=prompt, params=SamplingParams(**values), add_special_tokens=not is_chat))
            outputs = []
            while self.engine.has_work:
                outputs += self.engine.step()
            ids = tuple(token.id for output in outputs for token in output.tokens)
            self.known[key] = Truth("".join(output.text for output in outputs), ids, str(outputs[-1].finish_reason))
        return self.known[key]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model whose greedy answers to PROMPTS have no near tie in transformers; and they are the engine's."""
    folder = tmp_path_factory.mktemp("djl") / "tiny"
    for seed in range(50):
        reference = tiny_models.build("llama2-gqa", seed)
        tokenizer = tiny_models.tiny_tokenizers.byte_level()
        said = [tiny_models.refer(reference, tuple(tokenizer(prompt)["input_ids"]), NUM_TOKENS) for prompt in PROMPTS]
        if min(float(tiny_models.gap(one.logits).min()) for one in said) >= tiny_models.LEAST_GAP:
            break
    tiny_models.save(reference, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    engine = Engine(EngineConfig(model=str(folder), dtype="fp32", cpu_threads=1, kv_cache_memory_bytes=1 << 22))
    model = Model(folder, engine)
    assert [model.truth(prompt, {"temperature": 0.0}).ids for prompt in PROMPTS] == [one.ids for one in said]
    yield model
    engine.close()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    with warm(tmp_path_factory.mktemp("warm")) as command:
        yield command


@pytest.fixture
def start(model: Model, python: list[str]) -> Callable[..., DjlHost]:
    """A host of a version with the seed's options and these."""

    def start(version: Version, degree: int = 1, **options: str) -> DjlHost:
        properties = {
            "engine": "MPI", "option.tensor_parallel_degree": str(degree), "option.rolling_batch": "lmi-dist",
            "option.model_id": str(model.folder), "option.max_rolling_batch_prefill_tokens": "4096", "option.dtype": "fp32",
            "option.cpu_threads": "1", **{f"option.{name}": value for name, value in options.items()},
        }  # fmt: skip
        return DjlHost(version, properties, degree=degree, python=python)

    return start


@dataclass
class Asked:
    """A client, the form it wants, and what it must get: a Truth, or the sentence of an error."""

    client: Client
    form: str
    expected: Truth | str


def mixed(model: Model, forms: tuple[str, ...], fixed: str = "", *, has_seeds: bool = True) -> list[Asked]:
    """200 requests of all kinds and forms; `fixed` is the form where a request has no say; `has_seeds`: the host gives seeds."""
    wanted = []
    kinds = KINDS if has_seeds else [kind for kind in KINDS if kind[1].get("seed") != SEED]
    ways = itertools.cycle(itertools.product(kinds, forms or (fixed,)))
    for number in range(NUM_REQUESTS):
        if number % 20 == 13:
            body, sentence = BROKEN[number // 20 % len(BROKEN)]
            wanted.append(Asked(Client(body, {"Content-Type": "application/json"}), "json", sentence))
            continue
        (parameters, params), form = next(ways)
        if form.endswith("_chat"):
            wanted.append(_chat(model, number, form))
        elif form.startswith("completion"):
            wanted.append(_completion(model, number, form))
        else:
            wanted.append(_text(model, number, parameters, params, form, fixed))
    for one in wanted:
        one.client.seed = SEED
    return wanted


def _text(model: Model, number: int, parameters: dict[str, Any], params: dict[str, Any], form: str, fixed: str) -> Asked:
    prompt = PROMPTS[number % len(PROMPTS)]
    asks = {**parameters, "details": True, **({} if fixed else {"output_formatter": form})}
    return Asked(Client.of(inputs=prompt, parameters=asks), form, model.truth(prompt, params))


def _chat(model: Model, number: int, form: str) -> Asked:
    prompt = PROMPTS[number % len(PROMPTS)]
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    is_lines = form == "jsonlines_chat"
    client = Client.of(**body, stream=is_lines, logprobs=True) if form != "sse_chat" else Client.of(**body, stream=False)
    return Asked(
        client, "jsonlines_chat" if is_lines else "json_chat", model.truth(f"user: {prompt}\n", {"temperature": 0.0}, is_chat=True)
    )


def _completion(model: Model, number: int, form: str) -> Asked:
    prompt = PROMPTS[number % len(PROMPTS)]
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": form == "completion_lines"}
    return Asked(Client.of(**body), form, model.truth(prompt, {"temperature": 0.0}))


def check(version: Version, asked: Asked) -> None:
    """The client's answer against what it must be."""
    client = asked.client
    assert client.is_over
    if isinstance(asked.expected, str):
        assert client.status == (200 if version.minor < 29 else 424)
        told = client.json["error"]
        assert asked.expected in told
        return
    assert client.status == 200, client.text
    if version.minor > 26 or asked.form in ("json", "jsonlines"):
        assert client.got["Content-Type"] == CONTENT_TYPES[asked.form]
    text, ids, reason = read(version, asked.form, client)
    assert text == asked.expected.text or (version.minor == 29 and not asked.expected.text and text == "\n")  # never silent there
    assert ids in (None, asked.expected.ids)
    assert reason in (None, asked.expected.reason)


def read(version: Version, form: str, client: Client) -> tuple[str, tuple[int, ...] | None, str | None]:
    """Text, ids and reason of an answer, those that its form tells."""
    if form == "none":
        return client.text, None, None
    if form == "json":
        details = client.json["details"]
        return client.json["generated_text"], ids_of(details["tokens"]), details["finish_reason"]
    if form == "json_chat":
        choice = client.json["choices"][0]
        return choice["message"]["content"], None, choice["finish_reason"]
    lines = [json.loads(line.removeprefix("data: ")) for line in client.text.splitlines() if line]
    if form == "jsonlines_chat":
        choices = [line["choices"][0] for line in lines]
        return "".join(choice["delta"].get("content", "") for choice in choices), None, choices[-1]["finish_reason"]
    if form.startswith("completion"):
        return "".join(line["choices"][0]["text"] for line in lines), None, lines[-1]["choices"][0]["finish_reason"]
    assert lines[-1]["generated_text"] == "".join(line["token"].get("text", "") for line in lines)
    return lines[-1]["generated_text"], ids_of([line["token"] for line in lines]), lines[-1]["details"]["finish_reason"]


def ids_of(tokens: list[dict[str, Any]]) -> tuple[int, ...]:
    """0.27 lists the ids of a token."""
    return tuple(token["id"][0] if isinstance(token["id"], list) else token["id"] for token in tokens)


def answers_alike(host: DjlHost) -> None:
    """Each rank that was asked has sent the same bytes."""
    assert {reply.raw for reply in host.last_replies} == {host.last_replies[0].raw}
    assert len(host.last_replies) == (1 if host.is_passive else host.num_ranks)


def serve(host: DjlHost, wanted: list[Asked]) -> None:
    clients = [one.client for one in wanted]
    with host:
        if host.version.is_async:
            host.go(clients)
        else:
            host.roll(clients, on_step=lambda: answers_alike(host))
    for one in wanted:
        check(host.version, one)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("version", VERSIONS[1:], ids=str)
def test_mixed_requests_get_the_answers_of_the_engine_alone(version: Version, degree: int, model: Model, start: Any) -> None:
    serve(
        start(version, degree),
        mixed(model, FORMS_ASYNC if version.is_async else FORMS[version.minor], has_seeds=not version.is_async),
    )


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("form", ["json", "jsonlines", "none"])
def test_first_version_lets_the_option_choose_the_form(form: str, degree: int, model: Model, start: Any) -> None:
    serve(start(VERSIONS[0], degree, output_formatter=form), mixed(model, (), fixed=form))


@pytest.mark.parametrize("version", VERSIONS[4:], ids=str)
def test_host_may_ask_every_rank_today_too(version: Version, model: Model, start: Any) -> None:
    wanted = mixed(model, FORMS_ASYNC if version.is_async else FORMS[version.minor], has_seeds=not version.is_async)

    serve(start(version, 2, use_passive_workers="false"), wanted[:60])


@pytest.mark.parametrize(("degree", "is_passive"), [(1, "true"), (2, "true"), (2, "false")])
def test_async_worker_is_given_rolled_steps(degree: int, is_passive: str, model: Model, start: Any) -> None:
    """What a host does with `async_mode` and a `rolling_batch` together."""
    wanted = mixed(model, FORMS_ASYNC)[:60]
    host = start(VERSIONS[5], degree, use_passive_workers=is_passive)

    with host:
        host.roll([one.client for one in wanted], on_step=lambda: answers_alike(host))

    for one in wanted:
        check(host.version, one)


def told(host: DjlHost, prompt: str = PROMPTS[0]) -> str:
    """The whole answer to one greedy request."""
    client = Client.of(inputs=prompt, parameters=GREEDY)
    host.roll([client])
    return str(client.json["generated_text"])


@pytest.mark.parametrize(("degree", "num_ranks"), [("1", 1), ("2", 2), ("max", 1)])
@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[4]], ids=str)
@pytest.mark.parametrize("source", ["file", "environment"])
def test_seeds_configuration_starts(
    source: str, version: Version, degree: str, num_ranks: int, model: Model, python: list[str]
) -> None:
    properties = {
        "option.tensor_parallel_degree": degree, "option.rolling_batch": "lmi-dist", "option.model_id": str(model.folder),
        "option.max_rolling_batch_prefill_tokens": "4096",
    }  # fmt: skip
    if source == "file":  # with SERVING_LOAD_MODELS=test::MPI=… there is no such property (contract 3.5)
        properties["engine"] = "MPI"

    with DjlHost(version, properties, degree=num_ranks, python=python, environment={"CUDA_VISIBLE_DEVICES": ""}) as host:
        client = Client.of(inputs=PROMPTS[0], parameters={**GREEDY, "details": True})
        host.roll([client])

    assert client.status == 200
    assert client.json["details"]["finish_reason"] == "length"


@pytest.mark.parametrize("degree", [1, 2])
def test_without_rolling_batch_a_call_is_answered_whole(degree: int, model: Model, start: Any) -> None:
    truths = [model.truth(prompt, {"temperature": 0.0}).text for prompt in PROMPTS[:3]]
    clients = [Client.of(inputs=prompt, parameters=GREEDY) for prompt in PROMPTS[:3]]
    with start(VERSIONS[3], degree, rolling_batch="disable") as host:
        single = host.ask(clients[0])
        answers_alike(host)
        listed = host.ask(Client.of(inputs=list(PROMPTS[:3]), parameters=GREEDY))
        merged = host.merge([*clients, Client.of(inputs="x", parameters={"top_p": 2})])
        answers_alike(host)
        chat = host.ask(Client.of(messages=[{"role": "user", "content": "hi"}]))

    assert (single.code, single.properties["Content-Type"]) == (200, "application/json")
    assert json.loads(single.content[0][1]) == [{"generated_text": truths[0]}]
    assert json.loads(listed.content[0][1]) == [{"generated_text": text} for text in truths]
    assert [json.loads(answer) for answer in merged[:3]] == [[{"generated_text": text}] for text in truths]
    assert "parameters.top_p=2 is refused" in json.loads(merged[3])["error"]
    assert (chat.code, chat.message) == (424, "prediction failure")
    assert b"You must enable rolling batch to use the chat completions format." in chat.content[0][1]


@pytest.mark.parametrize("degree", [1, 2])
def test_enable_streaming_answers_in_frames(degree: int, model: Model, start: Any) -> None:
    truth = model.truth(PROMPTS[0], {"temperature": 0.0}).text
    with start(VERSIONS[2], degree, rolling_batch="disable", enable_streaming="true") as host:
        reply = host.ask(Client.of(inputs=PROMPTS[0], parameters=GREEDY))
        answers_alike(host)
        refused = host.ask(Client(b"{", {"Content-Type": "application/json"}))

    assert (reply.is_stream, reply.properties["Content-Type"]) == (True, "application/jsonlines")
    assert reply.frames[-1] == b""
    lines = [json.loads(line)["outputs"] for line in b"".join(reply.frames).decode().splitlines()]
    assert "".join(text for (text,) in lines) == truth
    assert (refused.code, refused.is_stream) == (424, False)


def test_streaming_of_merged_requests_is_refused_in_djls_words(model: Model, python: list[str]) -> None:
    properties = {"option.rolling_batch": "disable", "option.enable_streaming": "true", "batch_size": "4", "engine": "Python"}
    host = DjlHost(VERSIONS[3], {**properties, "option.model_id": str(model.folder)}, python=python)
    host.start()

    reply = host.load()
    host.stop()

    assert (reply.code, reply.message) == (424, "We cannot enable streaming for dynamic batching")


def test_bad_habits_of_the_host_hurt_nobody(model: Model, start: Any) -> None:
    truth = model.truth(PROMPTS[0], {"temperature": 0.0}).text
    with start(VERSIONS[3], 2) as host:
        crowd = PROMPTS * 10  # who are not done before the host comes again, fast as the model is
        host.batch = [Client.of(inputs=prompt, parameters={**GREEDY, "max_new_tokens": 200}) for prompt in crowd]
        host.step()
        host.step(resend=True)
        assert [client.is_over for client in host.batch] == [False] * len(crowd)
        host.forget()

        assert told(host) == truth
        many = [Client.of(inputs=PROMPTS[0], parameters=GREEDY) for _ in range(999)]
        host.roll(many, limit=999, on_step=lambda: answers_alike(host))
        assert {client.json["generated_text"] for client in many} == {truth}

        host.kill()  # mpirun alone; then the connections
        host.disconnect()
        host.kill_dangling()
        host.start()
        assert host.load().code == 204
        host.must_reset = True
        assert told(host) == truth


def test_python_engine_starts_its_own_ranks(model: Model, python: list[str]) -> None:
    properties = {
        "engine": "Python", "option.tensor_parallel_degree": "2", "option.rolling_batch": "lmi-dist", "option.dtype": "fp32",
        "option.model_id": str(model.folder), "option.cpu_threads": "1",
    }  # fmt: skip
    wanted = mixed(model, (), fixed="json")

    with DjlHost(VERSIONS[0], properties, degree=2, python=python) as host:
        host.roll([one.client for one in wanted])
        single = host.ask(Client.of(inputs=PROMPTS[0], parameters=GREEDY))
        ranks = [line for line in host.lines if "Python engine started" in line]
        behind = psutil.Process(host.process.pid).children(recursive=True)
        host.kill()  # as DJL ends a worker of this engine: nobody tells those behind it
        until(lambda: not any(process.is_running() for process in behind))

    for one in wanted:
        check(host.version, one)
    assert json.loads(single.content[0][1]) == [{"generated_text": model.truth(PROMPTS[0], {"temperature": 0.0}).text}]
    assert len(ranks) == 3, "of this process and its two ranks"


@pytest.fixture
def start_in_front(model: Model, python: list[str]) -> Callable[..., DjlHost]:
    """A host of a version whose engine `Python` has two ranks behind it."""

    def start(version: Version, **options: str) -> DjlHost:
        properties = {
            "engine": "Python", "option.tensor_parallel_degree": "2", "option.model_id": str(model.folder),
            "option.dtype": "fp32", "option.cpu_threads": "1", **{f"option.{name}": value for name, value in options.items()},
        }  # fmt: skip
        return DjlHost(version, properties, degree=2, python=python)

    return start


def test_ranks_behind_one_process_answer_in_async_mode(model: Model, start_in_front: Any) -> None:
    serve(start_in_front(VERSIONS[5]), mixed(model, FORMS_ASYNC, has_seeds=False)[:60])


def test_ranks_behind_one_process_answer_whole_and_in_frames(model: Model, start_in_front: Any) -> None:
    truth = model.truth(PROMPTS[0], {"temperature": 0.0}).text
    client = Client.of(inputs=PROMPTS[0], parameters=GREEDY)
    with start_in_front(VERSIONS[2], rolling_batch="disable", enable_streaming="true") as host:
        reply = host.ask(client)
        refused = host.ask(Client(b"{", {"Content-Type": "application/json"}))
        again = host.ask(client)

    assert (reply.is_stream, reply.properties["Content-Type"]) == (True, "application/jsonlines")
    lines = [json.loads(line)["outputs"] for line in b"".join(reply.frames).decode().splitlines()]
    assert "".join(text for (text,) in lines) == truth
    assert reply.frames[-1] == b""
    assert len(reply.frames) > 2, "as they come"
    assert (refused.code, refused.is_stream) == (424, False)
    assert b"the body is not JSON" in refused.content[0][1]
    assert b"".join(again.frames) == b"".join(reply.frames)


def test_first_version_rolls_batches_even_with_disable(model: Model, start: Any) -> None:
    with start(VERSIONS[0], rolling_batch="disable") as host:
        assert told(host) == model.truth(PROMPTS[0], {"temperature": 0.0}).text

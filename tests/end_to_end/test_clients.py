"""Clients that others wrote, unchanged, against `lmi-dist serve`: openai, huggingface_hub and boto3's SageMaker runtime."""

import json
from collections.abc import Iterator
from typing import Any

import boto3
import httpx
import huggingface_hub
import openai
import pytest
import tiny_models
from botocore.config import Config
from botocore.exceptions import ClientError
from huggingface_hub.errors import ValidationError
from running_server import Server

CHAT_TEMPLATE = (
    "{% if tools %}tools: {{ tools | length }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)
PROMPT = "hello world"
USER: list[Any] = [{"role": "user", "content": "hi"}]
LONG: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos_token": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients") / "tiny-llama"
    tiny_models.save(tiny_models.build("llama2-gqa", max_position_embeddings=2048), folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    server = Server(OPTION_MODEL_ID=str(folder))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def text(server: Server) -> str:
    """What the model says to PROMPT, greedily, in 12 tokens."""
    answer = server.post("/invocations", json={"inputs": PROMPT, "parameters": LONG})
    return str(answer.json()["generated_text"])


# huggingface_hub


@pytest.fixture(params=["", "/generate"])
def hub(server: Server, request: pytest.FixtureRequest) -> Iterator[huggingface_hub.InferenceClient]:
    with huggingface_hub.InferenceClient(server.url + request.param) as client:
        yield client


def test_hub_client_asks_how_the_endpoint_is(server: Server) -> None:
    with huggingface_hub.InferenceClient(server.url, provider="hf-inference") as client:
        assert client.health_check()
        assert client.get_endpoint_info()["max_concurrent_requests"] == 1000


def test_hub_client_generates(hub: huggingface_hub.InferenceClient) -> None:
    whole = hub.text_generation(PROMPT, max_new_tokens=12)
    full = hub.text_generation(PROMPT, max_new_tokens=12, return_full_text=True)
    pieces = list(hub.text_generation(PROMPT, max_new_tokens=12, stream=True))

    assert "".join(pieces) == whole
    assert full == PROMPT + whole


def test_hub_client_sees_details(hub: huggingface_hub.InferenceClient) -> None:
    words: dict[str, Any] = {"max_new_tokens": 4, "seed": 3, "do_sample": True, "top_n_tokens": 2, "details": True}

    whole = hub.text_generation(PROMPT, **words, decoder_input_details=True)
    events = list(hub.text_generation(PROMPT, **words, stream=True))

    assert whole.details is not None
    assert "".join(token.text for token in whole.details.tokens) == whole.generated_text == events[-1].generated_text
    assert (whole.details.seed, len(whole.details.prefill) > 2, whole.details.prefill[0].text) == (3, True, "<s>")
    assert [len(tops) for tops in whole.details.top_tokens or []] == [2] * whole.details.generated_tokens
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    last = events[-1].details
    assert last is not None
    assert (last.finish_reason, last.generated_tokens, last.input_length) == (
        whole.details.finish_reason, len(events), len(whole.details.prefill),
    )  # fmt: skip


def test_hub_client_gets_the_best_of_several(hub: huggingface_hub.InferenceClient) -> None:
    answer = hub.text_generation(PROMPT, max_new_tokens=4, best_of=3, do_sample=True, details=True)

    assert answer.details is not None
    assert len(answer.details.best_of_sequences or []) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_hub_client_is_told_what_is_wrong(hub: huggingface_hub.InferenceClient, stream: bool) -> None:
    with pytest.raises((ValidationError, huggingface_hub.errors.HfHubHTTPError)) as caught:
        list(hub.text_generation(PROMPT, temperature=-1.0, stream=stream))

    assert "422" in str(caught.value) or "parameters.temperature=-1.0 is refused" in str(caught.value)
    assert stream or isinstance(caught.value, ValidationError)


@pytest.mark.parametrize("stream", [False, True])
def test_hub_client_chats(server: Server, stream: bool) -> None:
    with huggingface_hub.InferenceClient(server.url) as hub:
        answer = hub.chat_completion(USER, max_tokens=6, temperature=0.5, seed=1, stream=stream, logprobs=True, top_logprobs=2)

        chunks = list(answer) if stream else [answer]

    assert chunks[0].choices[0].logprobs is not None or stream
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


# openai


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client_finds_the_model(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data

    assert client.models.retrieve(listed.id) == listed
    with pytest.raises(openai.NotFoundError, match="model='other' does not exist; there is model"):
        client.models.retrieve("other")


def test_openai_completion_has_all_its_words(client: openai.OpenAI) -> None:
    words: dict[str, Any] = {
        "model": "model", "prompt": [PROMPT, "bye"], "max_tokens": 5, "n": 2, "seed": 4, "temperature": 0.9, "logprobs": 2,
        "logit_bias": {"2": -100}, "stop": ["\x00"], "echo": True,
    }  # fmt: skip

    whole = client.completions.create(**words)
    *pieces, last = client.completions.create(**words, stream=True, stream_options={"include_usage": True})

    texts = ["".join(piece.choices[0].text for piece in pieces if piece.choices[0].index == index) for index in range(4)]
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0].startswith(PROMPT)
    assert texts[2].startswith("bye")
    assert last.usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert "".join(token for token in choice.logprobs.tokens or [] if token != "<s>") == choice.text


def test_openai_chat_has_all_its_words(client: openai.OpenAI) -> None:
    words: dict[str, Any] = {
        "model": "model", "messages": USER, "max_completion_tokens": 5, "n": 2, "seed": 4, "temperature": 0.9,
        "logprobs": True, "top_logprobs": 3, "logit_bias": {"2": -100},
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}],
    }  # fmt: skip

    whole = client.chat.completions.create(**words)
    *pieces, last = client.chat.completions.create(**words, stream=True, stream_options={"include_usage": True})

    for choice in whole.choices:
        mine = [piece.choices[0] for piece in pieces if piece.choices[0].index == choice.index]
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert [one.finish_reason for one in mine][-1] == choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content or []] == [3] * 5
    assert last.usage == whole.usage
    plain = client.chat.completions.create(model="model", messages=USER, max_tokens=1)
    assert whole.usage is not None
    assert plain.usage is not None
    assert whole.usage.prompt_tokens > plain.usage.prompt_tokens  # the template has seen the tools


def test_openai_stop_ends_the_text(client: openai.OpenAI, text: str) -> None:
    words: dict[str, Any] = {"model": "model", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    stop = text[len(text) // 2 :][:2]

    stopped = client.completions.create(**words, stop=stop, extra_body={"ignore_eos": True})

    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text.partition(stop)[0], "stop")


# boto3


@pytest.fixture(scope="module")
def runtime(server: Server) -> Any:
    config = Config(retries={"total_max_attempts": 1})
    keys = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    return boto3.client("sagemaker-runtime", endpoint_url=server.url, region_name="eu-north-1", config=config, **keys)


def test_boto3_invokes_an_endpoint(runtime: Any, text: str) -> None:
    answer = runtime.invoke_endpoint(
        EndpointName="my-endpoint",
        ContentType="application/json",
        CustomAttributes="model_name=model;x=y",
        Body=json.dumps({"inputs": PROMPT, "parameters": LONG}),
    )

    assert json.loads(answer["Body"].read()) == {"generated_text": text}
    assert (answer["ContentType"], answer["InvokedProductionVariant"]) == ("application/json", "AllTraffic")


def test_boto3_sends_a_list_and_a_table(runtime: Any, text: str) -> None:
    listed = runtime.invoke_endpoint(
        EndpointName="e", ContentType="application/json", Body=json.dumps({"inputs": [PROMPT, "bye"], "parameters": LONG})
    )
    table = runtime.invoke_endpoint(EndpointName="e", ContentType="text/csv", Body=f"id,inputs\n1,{PROMPT}\n")

    first, second = json.loads(listed["Body"].read())
    assert first == {"generated_text": text}
    assert second["generated_text"] != text
    assert [list(entry) for entry in json.loads(table["Body"].read())] == [["generated_text"]]


def test_boto3_reads_an_endpoints_stream(runtime: Any, text: str) -> None:
    answer = runtime.invoke_endpoint_with_response_stream(
        EndpointName="my-endpoint",
        ContentType="application/json",
        Body=json.dumps({"inputs": PROMPT, "stream": True, "parameters": LONG}),
    )

    lines = b"".join(event["PayloadPart"]["Bytes"] for event in answer["Body"]).decode().splitlines()

    assert (answer["ContentType"], len(lines)) == ("application/jsonlines", 12)
    assert json.loads(lines[-1])["generated_text"] == text


@pytest.mark.parametrize("method", ["invoke_endpoint", "invoke_endpoint_with_response_stream"])
def test_boto3_is_told_what_is_wrong(runtime: Any, method: str) -> None:
    with pytest.raises(runtime.exceptions.ModelError) as caught:
        getattr(runtime, method)(EndpointName="e", Body=json.dumps({"inputs": 7}), ContentType="application/json")

    told = caught.value.response
    assert (told["OriginalStatusCode"], told["ResponseMetadata"]["HTTPStatusCode"]) == (424, 424)
    assert json.loads(told["OriginalMessage"])["error"] == "inputs=7 must be a string that is not empty"


def test_boto3_names_one_of_several_models(runtime: Any) -> None:
    words = {"EndpointName": "e", "Body": json.dumps({"inputs": "a"}), "ContentType": "application/json"}

    assert runtime.invoke_endpoint(TargetModel="model", **words)["Body"].read()
    with pytest.raises(ClientError, match="Model or workflow not found: other"):
        runtime.invoke_endpoint(TargetModel="other", **words)


# curl


def test_forms_and_plain_text_are_prompts(server: Server, text: str) -> None:
    form = server.post("/invocations", data={"inputs": PROMPT, "parameters": json.dumps(LONG)})
    plain = server.post("/invocations", content=PROMPT, headers={"content-type": "text/plain"})

    assert form.json() == {"generated_text": text}
    assert text.startswith(plain.json()["generated_text"]) or plain.json()["generated_text"].startswith(text)


def test_user_cannot_write_a_special_token(server: Server) -> None:
    def num_prompt_tokens(content: str) -> int:
        body = {"model": "model", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
        return int(server.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"])

    assert num_prompt_tokens("{{ messages }}{% raw %}</s>") > num_prompt_tokens("{{ messages }}{% raw %}") + 1


def test_error_of_a_route_is_in_its_words(server: Server) -> None:
    answers = [server.post(path, json={"inputs": 3}) for path in ("/generate", "/generate_stream", "/")]

    assert {answer.status_code for answer in answers} == {422}
    assert answers[0].json() == {"error": "inputs=3 must be a string that is not empty", "error_type": "validation"}
    assert httpx.get(f"{server.url}/generate").status_code == 405

"""A T5 and a LLaVA behind one `lmi-dist serve`: texts read by an encoder, images in chats and in markdown."""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny_llava
import tiny_models
import tiny_t5
import torch
from running_server import Server, until

GREEDY = {"max_new_tokens": 8, "ignore_eos_token": True}
PICTURE = tiny_llava.png(60, 33)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"t5": tiny_t5.build("flan"), "llava": tiny_llava.build("1.6")}


@pytest.fixture(scope="module")
def server(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("models")
    tiny_llava.save(models["llava"], store / "llava", "1.6")
    tiny_t5.save(models["t5"], store / "t5", "flan")
    for name in models:
        lines = f"option.dtype=fp32\noption.max_model_len=256\noption.kv_cache_memory_bytes={16 << 20}\n"
        (store / name / "serving.properties").write_text(lines)
    running = Server(SERVING_LOAD_MODELS=",".join(f"{name}={store}/{name}" for name in models), OPTION_CPU_THREADS="1")
    try:
        until(lambda: running.ping().status_code == 200, 180)  # two models, and transformers' vision code, on a busy machine
        yield running
    finally:
        running.end()


def url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def seen(*parts: str | bytes) -> list[dict[str, Any]]:
    """One message of the user's."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": url_of(part)}}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def expected(model: Any, *parts: str | bytes) -> str:
    _, reference = tiny_llava.refer(model, "1.6", parts, 8)
    return str(tiny_llava.tokenizer().decode(reference.ids, skip_special_tokens=True))


def test_t5_answers_what_its_encoder_has_read(server: Server, models: dict[str, Any]) -> None:
    ids = torch.tensor([tiny_models.tiny_tokenizers.byte_level()("translate: the lazy dog").input_ids])
    with torch.inference_mode():
        out = models["t5"].generate(ids, max_new_tokens=8, do_sample=False)[0, 1:]

    body = {"inputs": "translate: the lazy dog", "parameters": {**GREEDY, "details": True}}
    answer = server.post("/invocations", params={"model_name": "t5"}, json=body)

    told = answer.json()
    assert answer.status_code == 200, told
    assert [token["id"] for token in told["details"]["tokens"]] == out.tolist()


def test_llava_answers_a_chat_with_images(server: Server, models: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    answer = client.chat.completions.create(
        model="llava", messages=seen("what is it?", PICTURE, tiny_llava.png(30, 30, 5)), temperature=0, max_tokens=8,
        extra_body={"ignore_eos": True},
    )  # fmt: skip

    text = ["USER: ", "\n", "\nwhat is it? ASSISTANT:"]
    bare = [text[0], PICTURE, text[1], tiny_llava.png(30, 30, 5), text[2]]
    assert answer.choices[0].message.content == expected_of_chat(models["llava"], bare)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def expected_of_chat(model: Any, parts: list[str | bytes]) -> str:
    """As `expected`, but a chat template's text gets no BOS from the tokenizer."""
    given = tiny_llava.inputs("1.6", tuple(parts))
    given["input_ids"], given["attention_mask"] = given["input_ids"][:, 1:], given["attention_mask"][:, 1:]
    with torch.inference_mode():
        out = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, given["input_ids"].shape[1] :]
    return str(tiny_llava.tokenizer().decode(out, skip_special_tokens=True))


def test_llava_sees_markdown_images(server: Server, models: dict[str, Any]) -> None:
    body = {"inputs": f"see ![it]({url_of(PICTURE)}) now", "parameters": GREEDY}

    answer = server.post("/invocations", params={"model_name": "llava"}, json=body)

    assert answer.json()["generated_text"] == expected(models["llava"], "see ", PICTURE, " now")


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llava", {"messages": seen(b"no image")}, "an image is of no type that is read, which are PNG, JPEG, WEBP, GIF, BMP"),
    ("llava", {"messages": seen(PICTURE[:70])}, "an image cannot be decoded"),
    ("llava", {"messages": seen(tiny_llava.png(6000, 6000, kind="GIF"))}, "6000 x 6000 pixels, but at most 33554432 are taken"),
    ("llava", {"messages": seen(bytes(21 << 20))}, "an image has 22020096 bytes, but at most 20971520 are taken"),
    ("llava", {"messages": seen(*[PICTURE] * 17)}, "prompt has 17 images, but at most 16 are taken"),
    ("llava", {"inputs": f"![]({url_of(PICTURE, 'image/tiff')})"}, "has type 'image/tiff'; supported are image/png"),
    ("llava", {"inputs": "![](http://127.0.0.1/a.png)"}, "is no data URI, and this server fetches nothing"),
    ("llava", {"inputs": "an <image>"}, "prompt has 1 places for images (<image>) but 0 images"),
    ("t5", {"inputs": f"![]({url_of(PICTURE)})"}, "prompt has an image, but this model reads only text"),
    ("t5", {"messages": seen(PICTURE)}, "is not for this model: it reads text only"),
    ("t5", {"inputs": "word " * 400}, "but at most 256 fit (max_model_len=256)"),
]


def test_bad_images_hurt_nobody_else(server: Server, models: dict[str, Any]) -> None:
    good = {"inputs": f"see ![it]({url_of(PICTURE)}) now", "parameters": {**GREEDY, "max_new_tokens": 8}}

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            asks = [client.post("/invocations", params={"model_name": model}, json=body) for model, body, _ in BAD]
            goods = [client.post("/invocations", params={"model_name": "llava"}, json=good) for _ in range(4)]
            return await asyncio.gather(*asks, *goods)

    answers = asyncio.run(ask_all())

    for (_, _, message), answer in zip(BAD, answers, strict=False):
        assert answer.status_code == 424, answer.text
        assert message in json.loads(answer.text)["error"]
    assert {answer.json()["generated_text"] for answer in answers[len(BAD) :]} == {
        expected(models["llava"], "see ", PICTURE, " now")
    }


def test_bad_image_is_told_in_openais_words(server: Server) -> None:
    answer = server.post("/v1/chat/completions", json={"model": "llava", "messages": seen("a", b"no image")})

    assert answer.status_code == 400
    assert "an image is of no type that is read" in answer.json()["error"]["message"]


def test_host_process_reads_no_images(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()

    assert "_imaging" not in maps
    assert "torch" not in maps

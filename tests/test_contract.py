"""contract.txt, the table of all that DJL's contract names: each row's test exists, and no word of ours is missing from it.

A row is: section of the contract, name, how it stands here, and the test that shows it, as file::name under tests/.
"""

import ast
import asyncio
import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import httpx
import pytest
from lmi_dist_handler import formatter, options, server_words, words
from lmi_dist_handler.http import Api
from lmi_dist_handler.metrics import Metrics
from lmi_dist_handler.registry import Registry
from lmi_dist_handler.requests import parse
from lmi_dist_handler.settings import HandlerConfig, ServerSettings

import lmi_dist

TESTS = Path(__file__).parent
HANDLER = TESTS.parent / "handlers" / "lmi_dist_handler"
HOW = ("works", "deprecated", "no effect", "refused by name", "unknown")
READERS = {
    "engine": "works", "handler": "works", "host": "works", "replaced": "deprecated", "unbuilt": "refused by name",
    "host_unbuilt": "refused by name", "ignored": "no effect",
}  # fmt: skip
ACCESSORS = ("take", "boolean", "integer", "number", "text", "items", "section", "between", "only", "ignore")
REFUSED_SETTINGS = ("option.quantize",)  # there is the setting; each of its values is refused until it is built
OPTION_SECTIONS = ("5.5", "5.6", "5.8", "5.9", "5.10", "ours")


class Row(NamedTuple):
    section: str
    name: str
    how: str
    test: str


def _rows() -> list[Row]:
    lines = (TESTS / "contract.txt").read_text(encoding="utf-8").splitlines()
    return [Row(*(cell.strip() for cell in line.split("|"))) for line in lines if line.strip() and not line.startswith("#")]


ROWS = _rows()


def names(*sections: str) -> set[str]:
    return {row.name for row in ROWS if row.section in sections}


@cache
def claims_in(file: str) -> frozenset[str]:
    """Names of the tests in a file."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def fields_of(tree: ast.AST) -> Iterator[str]:
    """Names that a module asks a request's Fields for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ACCESSORS:
            asked = node.args if node.func.attr == "ignore" else node.args[:1]
            yield from (word.value for word in asked if isinstance(word, ast.Constant) and isinstance(word.value, str))


def keys(file: str, name: str) -> set[str]:
    """Keys of a module's table."""
    tree = ast.parse((HANDLER / file).read_text(encoding="utf-8"))
    (table,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name]
    assert isinstance(table, ast.Dict)
    return {key.value for key in table.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def routes() -> set[str]:
    """Paths in the sources that make Starlette's routes."""
    calls = [
        node
        for path in HANDLER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Route"
    ]
    return {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)} | set(formatter.TGI_ROUTES)


def test_no_row_stands_twice() -> None:
    named = [(row.section, row.name) for row in ROWS]

    assert len(named) == len(set(named))


@pytest.mark.parametrize("test", sorted({row.test for row in ROWS}))
def test_named_test_exists(test: str) -> None:
    file, _, name = test.partition("::")

    assert name in claims_in(file)


@pytest.mark.parametrize("section", ["7.1", "7.2", "8.1", "openai", "tgi"])
def test_field_is_named_where_it_is_shown(section: str) -> None:
    rows = [row for row in ROWS if row.section == section and not row.test.startswith(Path(__file__).name)]
    texts = {row.test: (TESTS / row.test.partition("::")[0]).read_text(encoding="utf-8") for row in rows}

    assert [row.name for row in rows if " " not in row.name and row.name not in texts[row.test]] == []


def test_every_row_stands_in_one_of_these_ways() -> None:
    assert {row.how for row in ROWS} <= set(HOW)


def test_every_option_is_in_the_table() -> None:
    assert set(options.OPTIONS) <= names(*OPTION_SECTIONS)


def test_option_stands_as_the_table_of_options_says() -> None:
    rows = [row for row in ROWS if row.section in OPTION_SECTIONS and row.name not in REFUSED_SETTINGS]
    known = [row for row in rows if row.name in options.OPTIONS]

    assert [row for row in known if READERS[options.OPTIONS[row.name].reader] != row.how] == []


def test_every_word_of_the_server_is_in_the_table() -> None:
    ours = {*options.SERVER_FIELDS, *options.SERVER_UNBUILT, *options.SERVER_IGNORED, *server_words.SERVER_KEYS}

    assert ours | (set(ServerSettings.model_fields) - {"origin"}) <= names("5.2")


def test_every_translated_variable_is_in_the_table() -> None:
    assert {source for source, _ in words.TRANSLATIONS} <= names("5.4")


def test_every_formatter_is_in_the_table() -> None:
    built = {row.name for row in ROWS if row.section == "7.3" and row.how == "works"}

    assert set(options.FORMATTERS) <= built
    assert set(options.UNBUILT_FORMATTERS) <= names("7.3") - built


def test_every_route_is_in_the_table() -> None:
    named = {row.name.partition(" ")[2] for row in ROWS if row.section in ("6.1", "6.8", "routes")}

    assert routes() <= named


def test_every_field_of_a_request_is_in_the_table() -> None:
    files = ("requests.py", "openai_requests.py", "tgi_requests.py", "chat.py")
    asked = itertools.chain.from_iterable(fields_of(ast.parse((HANDLER / file).read_text(encoding="utf-8"))) for file in files)
    sampled = keys("sampling.py", "COMMON")

    assert set(asked) | sampled <= names("7.1", "7.2", "8.1", "openai", "tgi")


def test_every_status_of_an_error_is_in_the_table() -> None:
    raised = {getattr(lmi_dist, name).code for name in lmi_dist.__all__ if hasattr(getattr(lmi_dist, name), "code")}
    told = raised | set(formatter.JAVA_TYPES) | set(formatter.OPENAI_TYPES) | set(formatter.SERVER_FAULTS)

    assert {str(code) for code in told} <= {row.name.partition(" ")[0] for row in ROWS if row.section in ("6.5", "4.6")}


# what no other test shows


class Tokenizer:
    """Has a template, whose only prompt is `hi`, and no special token."""

    chat_template, all_special_tokens, added_tokens_decoder = "present", (), MappingProxyType({})

    def apply_chat_template(self, *messages: object, **options: object) -> str:
        return "hi"


MODEL: Any = SimpleNamespace(image_token=None, tokenizer=Tokenizer(), max_model_len=64, model=SimpleNamespace(generation={}))
BODIES = {
    "": {"inputs": "hi"}, "/generate": {"inputs": "hi"}, "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}  # fmt: skip


def asked(method: str, path: str, models: Any = None) -> httpx.Response:
    """The answer of a server with these models, without any if there are none."""

    async def main() -> httpx.Response:
        registry = models or Registry([], lambda given: pytest.fail("nothing is registered here"))
        transport = httpx.ASGITransport(Api(registry, ServerSettings(), Metrics()).app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await client.request(method, path)

    return asyncio.run(main())


def request(route: str, **fields: object) -> lmi_dist.Request:
    """The engine's request of a body with these fields."""
    config = HandlerConfig(engine=lmi_dist.EngineConfig(model="m"), model_name="m")
    return parse(json.dumps({**BODIES[route], **fields}).encode(), {"lmi_route": route}, MODEL, config).requests[0]


@pytest.mark.parametrize("row", [row for row in ROWS if row.section == "6.1" and row.how == "unknown"], ids=lambda row: row.name)
def test_place_that_is_not_ours_is_told(row: Row) -> None:
    method, _, path = row.name.partition(" ")

    answer = asked(method, re.sub(r"[{}]", "", path))

    assert answer.status_code in (404, 405)
    assert answer.json()["message"]


def test_options_of_invocations_are_empty() -> None:
    answer = asked("OPTIONS", "/invocations")

    assert (answer.status_code, answer.json()) == (200, {})


def test_bug_is_a_500_that_tells_no_inside() -> None:
    answer = asked("GET", "/ping", SimpleNamespace(all=lambda: 1 / 0, find=None))

    assert answer.status_code == 500
    assert answer.json()["message"] == "internal error: ZeroDivisionError; see the server's log"


def test_name_of_vllm_is_taken_too() -> None:
    assert request("", parameters={"min_tokens": 3}).params.min_tokens == 3


SAMPLING = {
    "temperature": 0.5, "top_p": 0.75, "frequency_penalty": 0.5, "presence_penalty": -0.5, "seed": 7, "stop": ("a",),
    "max_tokens": 9, "logit_bias": {5: 1.0}, "ignore_eos": True, "top_k": 3, "typical_p": 0.5, "min_p": 0.5, "min_tokens": 2,
    "repetition_penalty": 1.5, "stop_token_ids": (5,), "skip_special_tokens": False,
}  # fmt: skip


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "DJL's chat"])
@pytest.mark.parametrize("name", SAMPLING)
def test_word_of_sampling_reaches_the_engine(route: str, name: str) -> None:
    given = {**(BODIES["/v1/chat/completions"] if route == "DJL's chat" else {}), name: SAMPLING[name]}

    found = request("" if route == "DJL's chat" else route, **given)

    assert getattr(found.params, name) == SAMPLING[name]


def test_alternatives_of_tgi_are_asked_for() -> None:
    assert request("/generate", parameters={"details": True, "top_n_tokens": 2}).params.logprobs == 2


@pytest.mark.parametrize("name", options.UNBUILT_FORMATTERS)
def test_unbuilt_formatter_is_refused_by_name(name: str) -> None:
    with pytest.raises(lmi_dist.RequestError, match=f'parameters.output_formatter="{name}" is known but not built yet'):
        request("", parameters={"output_formatter": name})


def test_prompt_of_openai_is_cut_and_salted() -> None:
    found = [request(route, truncate_prompt_tokens=2, cache_salt="mine") for route in BODIES if route.startswith("/v1/")]

    assert [(one.truncate, one.cache_salt) for one in found] == [(2, "mine")] * 2


@pytest.mark.parametrize("name", ["function_call", "audio", "prediction", "web_search_options"])
def test_field_of_openai_is_refused_by_name(name: str) -> None:
    with pytest.raises(lmi_dist.RequestError, match=f'{name}="x" is known but not built yet'):
        request("/v1/chat/completions", **{name: "x"})


LABELS = [row for row in ROWS if row.test.endswith("::test_field_that_only_labels_is_taken")]


@pytest.mark.parametrize("row", LABELS, ids=lambda row: f"{row.section} {row.name}")
def test_field_that_only_labels_is_taken(row: Row, caplog: pytest.LogCaptureFixture) -> None:
    route = {"7.1": "", "tgi": "/generate"}.get(row.section, "/v1/chat/completions")
    given = {"stream": True, "stream_options": {row.name: True}} if row.name.startswith("include_") else {row.name: "x"}

    assert request(route, **given).params == request(route).params
    assert caplog.messages == []

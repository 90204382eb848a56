"""handlers/lmi_dist_handler/openapi.py: the document says what the routes and the parsers' tables say."""

import json

import pytest
from lmi_dist_handler import openapi
from lmi_dist_handler.http import Api
from lmi_dist_handler.metrics import Metrics
from lmi_dist_handler.openai_requests import CHAT, COMPLETION
from lmi_dist_handler.sampling import LMI
from lmi_dist_handler.settings import ServerSettings
from lmi_dist_handler.tgi_requests import TGI


def fields(path: str) -> dict[str, object]:
    """The properties of a route's body, or of its `parameters`."""
    schema = openapi.document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    properties: dict[str, object] = schema.get("anyOf", [schema])[0]["properties"]
    parameters = properties.get("parameters")
    return parameters["properties"] if isinstance(parameters, dict) else properties


def test_document_lists_every_route_and_method() -> None:
    routes = Api(None, ServerSettings(), Metrics()).routes()  # type: ignore[arg-type]  # nothing is asked of the models
    served = {(route.path.replace(":path}", "}"), method) for route in routes for method in route.methods or () if method != "HEAD"}
    served = {each for each in served if each[0] != "/ping" or each[1] == "GET"}  # any method will do there

    listed = {
        (path, method.upper())
        for path, methods in openapi.document()["paths"].items()
        for method in methods
        if method != "parameters"
    }

    assert listed == served


@pytest.mark.parametrize(
    ("path", "table"),
    [("/invocations", LMI), ("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT), ("/generate", TGI)],
)
def test_document_lists_every_field_of_the_tables(path: str, table: dict[str, str]) -> None:
    assert set(table) <= set(fields(path))


def test_document_has_the_rules_of_the_engine() -> None:
    assert fields("/v1/completions")["n"] == {"default": 1, "maximum": 128, "minimum": 1, "type": "integer"}


def test_document_is_json() -> None:
    assert json.loads(json.dumps(openapi.document(), allow_nan=False))["openapi"] == "3.1.0"

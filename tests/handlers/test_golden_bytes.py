"""Every kind of message on DJL's wire, both ways and in both widths, as dumps written by hand from contract 2 and 4.4. What is ours
and what stands in for DJL in the tests must each write and read exactly these bytes."""

import io
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from djl_host import Version, install
from djl_wire import Bytes, HostWire
from lmi_dist_handler.wire import Codec, Input, Output, PairList, read


def dump(text: str) -> bytes:
    """The bytes of lines `hex | what it is`."""
    return bytes.fromhex("".join(line.partition("|")[0] for line in text.splitlines()))


class Golden(NamedTuple):
    """One message in the layout up to 0.26, and from 0.27 on."""

    narrow: str
    wide: str

    def of(self, minor: int) -> bytes:
        return dump(self.narrow if minor <= 26 else self.wide)


REQUEST = Golden(
    """0002                     | two properties
       000a 62617463685f73697a65 | batch_size
       0001 31                   | 1
       0007 68616e646c6572       | handler
       0006 68616e646c65         | handle
       0002                     | two content items
       000e 62617463685f3030302e64617461 | batch_000.data
       0000000f 7b22696e70757473223a22c3a9227d | {"inputs":"é"}
       ffff 00000000            | no key, no bytes""",
    """0002
       0000000a 62617463685f73697a65
       00000001 31
       00000007 68616e646c6572
       00000006 68616e646c65
       0002
       0000000e 62617463685f3030302e64617461
       0000000f 7b22696e70757473223a22c3a9227d
       ffffffff 00000000""",
)
INIT = Golden(
    """0002
       0007 68616e646c6572 0006 68616e646c65 | handler handle
       0008 6d6f64656c5f6964 0002 2f6d       | model_id /m
       0000                                  | no content: this is the init request""",
    """0002
       00000007 68616e646c6572 00000006 68616e646c65
       00000008 6d6f64656c5f6964 00000002 2f6d
       0000""",
)
REPLY = Golden(
    """00c8                | 200
       0002 4f4b           | OK
       0001                | one property
       0014 62617463685f305f436f6e74656e742d54797065 | batch_0_Content-Type
       0010 6170706c69636174696f6e2f6a736f6e         | application/json
       0002                | two content items
       000c 62617463685f302e64617461 | batch_0.data
       00000004 f09f9880   | an emoji
       ffff 00000001 ff    | no key, a byte that is no text""",
    """00c8
       00000002 4f4b
       0001
       00000014 62617463685f305f436f6e74656e742d54797065
       00000010 6170706c69636174696f6e2f6a736f6e
       0002
       0000000c 62617463685f302e64617461
       00000004 f09f9880
       ffffffff 00000001 ff""",
)
NOTHING = Golden(
    """00cc 000a 4e6f20636f6e74656e74 0000 0000 | 204, No content, no properties, no content""",
    """00cc 0000000a 4e6f20636f6e74656e74 0000 0000""",
)
ERROR = Golden(
    """01a8                     | 424
       0012 70726564696374696f6e206661696c757265 | prediction failure
       0001
       000c 636f6e74656e742d74797065             | content-type
       0010 6170706c69636174696f6e2f6a736f6e     | application/json
       0001
       ffff 00000042
       7b0a 2020 22636f6465223a3432342c 0a                                    | {  "code":424,
       2020 226d657373616765223a2270726564696374696f6e206661696c757265222c 0a | "message":"prediction failure",
       2020 226572726f72223a226e6f22 0a 7d                                    | "error":"no" }""",
    """01a8
       00000012 70726564696374696f6e206661696c757265
       0001
       0000000c 636f6e74656e742d74797065
       00000010 6170706c69636174696f6e2f6a736f6e
       0001
       ffffffff 00000042
       7b0a 2020 22636f6465223a3432342c 0a
       2020 226d657373616765223a2270726564696374696f6e206661696c757265222c 0a
       2020 226572726f72223a226e6f22 0a 7d""",
)
STREAM = Golden(
    """00c8 0002 4f4b 0000 | 200, OK, no properties
       ffff                | frames follow
       01 00000001 61      | more: a
       01 00000002 c3a9    | more: é
       00 00000000         | no more""",
    """00c8 00000002 4f4b 0000
       ffff
       01 00000001 61
       01 00000002 c3a9
       00 00000000""",
)
MAP = Golden(
    """0004                     | four entries
       0004 64617461 0003 61c3a9         | data aé
       0004 6c617374 0004 54727565       | last True
       0004 636f6465 0003 343234         | code 424
       0005 6572726f72 0000              | error, empty""",
    """0004
       00000004 64617461 00000003 61c3a9
       00000004 6c617374 00000004 54727565
       00000004 636f6465 00000003 343234
       00000005 6572726f72 00000000""",
)
MINORS = pytest.mark.parametrize("minor", [26, 27, 29])
PROPERTIES = {"batch_size": "1", "handler": "handle"}
CONTENT = [("batch_000.data", '{"inputs":"é"}'.encode()), (None, b"")]
INIT_PROPERTIES = {"handler": "handle", "model_id": "/m"}
VALUES = {"data": "aé", "last": True, "code": 424, "error": ""}


@pytest.fixture
def djl_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minor: int) -> Iterator[ModuleType]:
    """The stand-in for that version's package, for one test."""
    monkeypatch.syspath_prepend(str(install(tmp_path / "cache", Version(f"0.{minor}.0"))))
    import djl_python

    yield djl_python
    for name in [name for name in sys.modules if name.partition(".")[0] == "djl_python"]:
        del sys.modules[name]


def sent(output: Any) -> bytes:
    """What the stand-in's Output writes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        output.send(ours)
        ours.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: theirs.recv(65536), b""))


def replies(output_type: Any) -> list[tuple[Golden, Any]]:
    """Each kind of reply, made with either Output class."""
    full = output_type().add_property("batch_0_Content-Type", "application/json")
    full = full.add("\N{GRINNING FACE}", key="data", batch_index=0).add(b"\xff")
    return [
        (REPLY, full),
        (NOTHING, output_type(204, "No content")),
        (ERROR, output_type().error("no", message="prediction failure")),
        (STREAM, output_type().add_stream_content(["a", "é"], None)),
    ]


@MINORS
def test_requests_are_written_alike(minor: int) -> None:
    codec, host = Codec(minor), HostWire(minor)

    assert codec.encode_request(Input(PROPERTIES, PairList(CONTENT))) == REQUEST.of(minor)
    assert host.request(PROPERTIES, CONTENT) == REQUEST.of(minor)
    assert codec.encode_request(Input(INIT_PROPERTIES)) == INIT.of(minor)
    assert host.request(INIT_PROPERTIES, []) == INIT.of(minor)


@MINORS
def test_requests_are_read_alike(minor: int, djl_python: Any) -> None:
    for golden, properties, content in ((REQUEST, PROPERTIES, CONTENT), (INIT, INIT_PROPERTIES, [])):
        ours = read(Codec(minor).request, io.BytesIO(golden.of(minor)))
        theirs = djl_python.Input()
        theirs.read(Bytes(golden.of(minor)))

        assert (ours.properties, ours.content) == (properties, PairList(content))
        assert theirs.properties == properties
        assert list(zip(theirs.content.get_keys(), theirs.content.get_values(), strict=True)) == content


@MINORS
def test_replies_are_written_alike(minor: int, djl_python: Any) -> None:
    for golden, output in replies(Output):
        assert b"".join(Codec(minor).encode_response(output)) == golden.of(minor)
    for golden, output in replies(djl_python.Output):
        assert sent(output) == golden.of(minor)


@MINORS
def test_replies_are_read_alike(minor: int) -> None:
    for golden, output in replies(Output):
        ours = read(Codec(minor).response, io.BytesIO(golden.of(minor)))
        theirs = HostWire(minor).reply(Bytes(golden.of(minor)))

        content = [(None, "aé".encode())] if output.stream else output.content.pairs
        assert (ours.code, ours.message, ours.properties, ours.content.pairs) == (
            output.code, output.message, output.properties, content
        )  # fmt: skip
        assert (theirs.code, theirs.message, theirs.properties) == (ours.code, ours.message, ours.properties)
        assert b"".join(theirs.frames) == content[0][1] if theirs.is_stream else theirs.content == content
        assert theirs.raw == golden.of(minor)


@MINORS
def test_maps_are_alike(minor: int, djl_python: Any) -> None:
    texts = {name: str(value) for name, value in VALUES.items()}

    assert Codec(minor).encode_map(VALUES) == djl_python.Output.binary_encode(VALUES) == MAP.of(minor)
    assert Codec(minor).decode_map(MAP.of(minor)) == HostWire(minor).map(MAP.of(minor)) == texts


@MINORS
def test_stand_in_knows_its_versions_own_ways(minor: int, djl_python: Any) -> None:
    batch = djl_python.Input()
    batch.properties = {"batch_size": "2", "batch_000.Accept": "a", "batch_001_accept": "b"}
    batch.content.add("batch_001.data", b"x")
    first, second = batch.get_batches()

    assert djl_python.__version__ == f"0.{minor}.0"
    assert (first.get_property("accept"), second.get_property("ACCEPT"), second.get_as_bytes()) == ("a", "b", b"x")
    assert not hasattr(djl_python.Output, "get_property")  # today's only
    with pytest.raises(AttributeError):
        sent(djl_python.Output().add_property("number", 1))  # 0.26 to 0.29 convert nothing

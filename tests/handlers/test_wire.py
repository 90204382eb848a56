"""handlers/lmi_dist_handler/wire.py: DJL's bytes, both ways, as djl-contract 2 has them."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmi_dist_handler.wire import Codec, Disconnected, Input, Output, PairList, Source, WireError, messages, read

T = TypeVar("T")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PROPERTIES = st.dictionaries(TEXTS, TEXTS, max_size=5)
CONTENT = st.lists(st.tuples(st.none() | TEXTS, st.binary(max_size=60)), max_size=4).map(PairList)
VERSIONS = st.sampled_from([26, 27, 29])


def decoded(parse: Callable[[Source], T], data: bytes) -> T:
    stream = io.BytesIO(data)
    value = read(parse, stream)
    assert stream.read() == b""
    return value


def encoded(reply: Output, version: int = 27) -> bytes:
    return b"".join(Codec(version).encode_response(reply))


@given(VERSIONS, PROPERTIES, CONTENT)
def test_requests_survive_the_wire(version: int, properties: dict[str, str], content: PairList) -> None:
    codec = Codec(version)

    request = decoded(codec.request, codec.encode_request(Input(properties, content)))

    assert (request.properties, request.content) == (properties, content)


@given(VERSIONS, st.integers(100, 599), TEXTS, PROPERTIES, CONTENT)
def test_replies_survive_the_wire(version: int, code: int, message: str, properties: dict[str, str], content: PairList) -> None:
    reply = Output(code, message)
    reply.properties, reply.content = properties, content

    again = decoded(Codec(version).response, encoded(reply, version))

    assert (again.code, again.message, again.properties, again.content) == (code, message, properties, content)


@given(VERSIONS, st.dictionaries(TEXTS, TEXTS, max_size=5))
def test_maps_survive_the_wire(version: int, values: dict[str, str]) -> None:
    codec = Codec(version)

    assert codec.decode_map(codec.encode_map(values)) == values


@given(PROPERTIES, CONTENT, st.data())
def test_cut_off_request_is_a_disconnect(properties: dict[str, str], content: PairList, data: st.DataObject) -> None:
    whole = Codec().encode_request(Input(properties, content))
    length = data.draw(st.integers(0, len(whole) - 1))

    with pytest.raises(Disconnected, match="Connection disconnected"):
        read(Codec().request, io.BytesIO(whole[:length]))


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_known_way(data: bytes) -> None:
    parsers: tuple[Callable[[Source], Input | Output], ...] = (Codec().request, Codec().response)
    for parse in parsers:
        with contextlib.suppress(Disconnected, WireError):
            read(parse, io.BytesIO(data))


def test_request_bytes_are_those_of_the_contract() -> None:
    request = Input({"handler": "handle"}, PairList([("data", b"{}"), (None, b"")]))

    wide = b"\0\1\0\0\0\7handler\0\0\0\6handle\0\2\0\0\0\4data\0\0\0\2{}\xff\xff\xff\xff\0\0\0\0"
    narrow = b"\0\1\0\7handler\0\6handle\0\2\0\4data\0\0\0\2{}\xff\xff\0\0\0\0"

    assert Codec(27).encode_request(request) == wide
    assert Codec(26).encode_request(request) == narrow


def test_reply_bytes_are_those_of_the_contract() -> None:
    reply = Output(200, "OK").add_property("Content-Type", "text/plain").add("é", "data")

    assert encoded(reply) == (b"\0\xc8\0\0\0\2OK\0\1\0\0\0\x0cContent-Type\0\0\0\x0atext/plain\0\1\0\0\0\4data\0\0\0\2\xc3\xa9")


def test_map_bytes_are_those_of_the_contract() -> None:
    values = {"data": "hi", "last": True}

    assert Output.binary_encode(values) == b"\0\2\0\0\0\4data\0\0\0\2hi\0\0\0\4last\0\0\0\4True"
    assert Codec(26).encode_map(values) == b"\0\2\0\4data\0\2hi\0\4last\0\4True"


def test_stream_ends_with_an_empty_frame() -> None:
    reply = Output().add_stream_content(["a", b"bc"])

    pieces = list(Codec().encode_response(reply))

    assert pieces[0].endswith(b"\xff\xff")
    assert pieces[1:] == [b"\1\0\0\0\1a", b"\1\0\0\0\2bc", b"\0\0\0\0\0"]
    assert decoded(Codec().response, b"".join(pieces)).content == PairList([(None, b"abc")])


def test_failing_stream_sends_its_error_first() -> None:
    def pieces() -> Iterator[str]:
        yield "a"
        raise RuntimeError("out of paper")

    last_two = list(Codec().encode_response(Output().add_stream_content(pieces())))[-2:]

    assert last_two == [b"\1\0\0\0\x0cout of paper", b"\0\0\0\0\0"]


def test_error_reply_is_that_of_the_stock_worker() -> None:
    reply = Output().error("no such thing")

    assert (reply.code, reply.message, reply.properties) == (424, "invoke handler failure", {"content-type": "application/json"})
    assert reply.content == PairList(
        [(None, b'{\n  "code":424,\n  "message":"invoke handler failure",\n  "error":"no such thing"\n}')]
    )


@pytest.mark.parametrize("text", ["x" * 40000, "é" * 20000])
def test_old_version_refuses_long_texts(text: str) -> None:
    with pytest.raises(WireError, match="40000 bytes does not fit"):
        Codec(26).encode_request(Input({"long": text}))


def test_too_many_properties_are_refused() -> None:
    with pytest.raises(WireError, match="at most 32767"):
        Codec().encode_request(Input({str(i): "" for i in range(32768)}))


@pytest.mark.parametrize(
    ("data", "what"),
    [(b"", "cut off"), (b"\0\1\0\0\0\1a", "cut off"), (b"\0\0x", "left over"), (b"\0\1\0\0\0\1\xff\0\0\0\0", "UTF-8")],
)
def test_bad_maps_are_refused(data: bytes, what: str) -> None:
    with pytest.raises(WireError, match=what):
        Codec().decode_map(data)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_asyncio_reads_the_same(size: int) -> None:
    """Whole messages, wherever the stream is cut, then its end."""
    sent = [Input({"a": "b"}, PairList([("data", b"x" * length)])) for length in (0, 1, 300)]
    data = b"".join(Codec().encode_request(request) for request in sent)

    async def all_of_them() -> list[Input]:
        reader = asyncio.StreamReader()
        task = asyncio.create_task(collect(messages(Codec().request, reader)))
        for start in range(0, len(data), size):
            reader.feed_data(data[start : start + size])
            await asyncio.sleep(0)
        reader.feed_eof()
        return await task

    async def collect(arriving: AsyncIterator[Input]) -> list[Input]:
        found = []
        with contextlib.suppress(Disconnected):
            async for request in arriving:
                found.append(request)  # a comprehension would lose them with the exception
        return found

    found = asyncio.run(all_of_them())

    assert [(one.properties, one.content) for one in found] == [(one.properties, one.content) for one in sent]


def test_asyncio_sees_a_message_cut_off() -> None:
    async def cut() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(Codec().encode_request(Input({"a": "b"}))[:-1])
        reader.feed_eof()
        await anext(messages(Codec().request, reader))

    with pytest.raises(Disconnected):
        asyncio.run(cut())


def test_property_lookup_ignores_case() -> None:
    inputs = Input({"Content-Type": "text/plain", "Handler": "stats"})

    assert inputs.get_property("content-type") == "text/plain"
    assert inputs.get_function_name() == "stats"
    assert inputs.get_property("other") is None


def test_body_is_item_data_or_the_first() -> None:
    inputs = Input({}, PairList([("max", b"1"), ("data", b'{"a": "\xc3\xa9"}')]))

    assert inputs.get_as_json() == {"a": "é"}
    assert inputs.get_as_bytes("max") == b"1"
    assert Input({}, PairList([(None, b"x")])).get_as_string() == "x"
    assert Input().get_as_bytes() is None
    assert Input().is_empty()
    with pytest.raises(KeyError, match="requested data for key:min is not found!"):
        inputs.get_as_bytes("min")


def test_batches_are_cut_by_position() -> None:
    inputs = Input(
        {"batch_size": "2", "batch_000.accept": "a", "batch_001_accept": "b"},
        PairList([("batch_000.data", b"x"), ("batch_001.data", b"y")]),
    )

    first, second = inputs.get_batches()

    assert (first.get_property("accept"), first.get_as_bytes()) == ("a", b"x")
    assert (second.get_property("accept"), second.get_as_bytes()) == ("b", b"y")
    assert Input({"a": "b"}).get_batches()[0].properties == {"a": "b"}


def test_output_encodes_by_type() -> None:
    output = Output().add("é").add(b"\xff", "raw").add([1, "ü"], batch_index=3).add_as_json({"a": 1}, "json", 0)

    assert output.content.get_keys() == [None, "raw", "batch_3.", "batch_0.json"]
    assert output.content.get_values()[:2] == ["é".encode(), b"\xff"]
    assert json.loads(output.content.value_at(2)) == [1, "ü"]


def test_finalizer_failure_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    Output().finalize(lambda: 1 / 0).finish()

    assert "finalizer failed" in caplog.text


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\x7f\xff\xff\xff",  # a property's key
        b"\0\1\0\0\0\1a\x40\0\0\1",  # its value
        b"\0\0\0\1\xff\xff\xff\xff\x7f\0\0\0",  # a content value
        b"\0\0\0\1\xff\xff\xff\xff\xff\xff\xff\xff",  # one of negative length
        b"\x80\0",  # a negative count
    ],
)
def test_length_that_cannot_be_meant_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="must be between 0 and 1073741824"):
        read(Codec().request, io.BytesIO(data))

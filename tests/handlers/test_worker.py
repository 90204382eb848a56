"""handlers/lmi_dist_handler/worker.py: DJL's arguments, files, protocol and end, with an entry point made for the test."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lmi_dist_handler.wire import Codec, Disconnected, Input, Output, PairList, read
from lmi_dist_handler.worker import load_entry_point, parse_arguments

ENTRY_POINT = """
import asyncio, os, time
from lmi_dist_handler.wire import Output

async def handle(inputs):
    if inputs.is_empty():
        return None
    return pieces(inputs)

async def pieces(inputs):
    for letter in inputs.get_as_string():
        await asyncio.sleep(0.01)
        yield Output().add(letter)

def where(inputs):
    return Output().add({"cwd": os.getcwd(), **inputs.get_properties()})

async def pour(inputs):
    async def some():
        for number in range(100):
            yield Output().add(b"%d " % number * 50000)
    return some()

async def fail(inputs):
    raise RuntimeError("no paper")

async def fail_late(inputs):
    async def some():
        yield Output().add("a")
        raise MemoryError("no room")
    return some()

async def nonsense(inputs):
    return 7

def block(inputs):
    open("blocked", "w").close()
    time.sleep(60)
"""


class Client:
    """A host's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.stream = connection.makefile("rb")

    def send(self, handler: str, tracking_id: str, body: bytes | None = b"") -> None:
        content = PairList() if body is None else PairList([("data", body)])
        self.connection.sendall(Codec().encode_request(Input({"handler": handler, "request_tracking_id": tracking_id}, content)))

    def reply(self) -> Output:
        return read(Codec().response, self.stream)

    def ask(self, handler: str, body: bytes | None = b"") -> Output:
        self.send(handler, "t", body)
        return self.reply()

    def close(self) -> None:
        self.stream.close()
        self.connection.close()


def start(folder: Path, *arguments: str, entry_point: str = "model.py") -> "subprocess.Popen[str]":
    (folder / "model.py").write_text(ENTRY_POINT)
    command = [sys.executable, "-m", "lmi_dist_handler.worker", "--model-dir", str(folder), "--entry-point", entry_point]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "Python engine started." in line:
            return process
    raise AssertionError("the worker did not start")


def end(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    process.stdout.close()
    return process.wait(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worker")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    path = folder / "djl_sock.19000"
    unknown = ("--cluster-size", "1", "--no-such-thing", "7", "--async-mode")
    process = start(folder, "--sock-type", "unix", "--sock-name", str(path), "--tensor-parallel-degree", "1", *unknown)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        client = Client(connection)
        yield client
        client.close()
    end(process)


def test_none_is_answered_with_204(client: Client) -> None:
    reply = client.ask("handle", body=None)

    assert (reply.code, reply.message, reply.content.size()) == (204, "No content", 0)


def test_replies_of_requests_interleave(client: Client) -> None:
    client.send("handle", "one", b"abcd")
    client.send("handle", "two", b"wxyz")

    replies = [client.reply() for _ in range(8)]

    texts: dict[Any, str] = {"one": "", "two": ""}
    for reply in replies:
        texts[reply.get_property("request_tracking_id")] += reply.content.value_at(0).decode()
    assert texts == {"one": "abcd", "two": "wxyz"}
    assert [reply.get_property("request_tracking_id") for reply in replies] != ["one"] * 4 + ["two"] * 4


def test_host_that_reads_late_loses_nothing(client: Client) -> None:
    client.send("pour", "t")
    client.send("where", "u")
    time.sleep(0.3)  # as much as the socket holds has come

    replies = [client.reply() for _ in range(101)]

    poured = [reply.content.value_at(0) for reply in replies if reply.get_property("request_tracking_id") == "t"]
    assert poured == [b"%d " % number * 50000 for number in range(100)]
    assert client.ask("where").code == 200


def test_worker_inserts_its_properties(client: Client, folder: Path) -> None:
    reply = client.ask("where")

    told = Input({}, reply.content).get_as_json()
    assert (told["cwd"], told["model_dir"]) == (str(folder), str(folder))
    assert (told["tensor_parallel_degree"], told["device_id"]) == (1, "-1")


def test_failure_of_a_handler_is_a_reply(client: Client) -> None:
    reply = client.ask("fail")

    assert (reply.code, reply.message) == (424, "service.invoke_handler_async() failure")
    assert Input({}, reply.content).get_as_json()["error"] == "no paper"


def test_failure_inside_a_generator_is_a_reply_too(client: Client) -> None:
    client.send("fail_late", "t")

    first, second = client.reply(), client.reply()

    assert (first.code, second.code, second.message) == (200, 507, "no room")


@pytest.mark.parametrize(("handler", "what"), [("nonsense", "Invalid output type: <class 'int'>"), ("no_such", "no_such")])
def test_wrong_handlers_are_told(client: Client, handler: str, what: str) -> None:
    reply = client.ask(handler)

    assert reply.code == 424
    assert what in reply.content.value_at(0).decode()


def test_pid_file_stands_beside_the_socket(client: Client, folder: Path) -> None:
    assert re.fullmatch(r"\d+", (folder / "djl_sock.19000.pid").read_text())


def test_worker_ends_at_eof_in_the_middle_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "s"
    left_behind = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    path.with_name("s.pid").write_text(str(left_behind.pid))
    path.touch()
    process = start(tmp_path, "--sock-type", "unix", "--sock-name", str(path))
    assert left_behind.wait(10) == -signal.SIGKILL

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        client = Client(connection)
        client.send("block", "t")
        while not (tmp_path / "blocked").exists():
            assert process.poll() is None
        client.close()

    assert end(process) == 1
    assert not path.exists()
    assert not path.with_name("s.pid").exists()


def test_tcp_serves_on_loopback(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(tmp_path, "--sock-type", "tcp", "--port", str(port))

    with socket.create_connection(("127.0.0.1", port)) as connection:
        client = Client(connection)
        assert client.ask("handle", b"z").content.value_at(0) == b"z"
        connection.sendall(b"\xff\xff")  # no request begins like this
        with pytest.raises(Disconnected):
            client.reply()
        client.close()

    assert end(process) == 1


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--sock-type", "unix"], "Missing sock-name argument."),
        (["--sock-type", "tcp"], "Missing port argument."),
        (["--sock-type", "pipe"], "Invalid socket-type: pipe."),
    ],
)
def test_bad_arguments_are_told_as_djl_does(words: list[str], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_arguments(["--model-dir", ".", *words])


def test_entry_points_are_files_or_modules(tmp_path: Path) -> None:
    (tmp_path / "own_entry.py").write_text("handle = 7")

    assert load_entry_point("own_entry.py", tmp_path).handle == 7
    assert load_entry_point(str(tmp_path / "own_entry.py"), Path("elsewhere")).handle == 7
    assert load_entry_point("os", tmp_path) is os
    with pytest.raises(ValueError, match=r"entry-point file not found .*missing.py\."):
        load_entry_point("missing.py", tmp_path)

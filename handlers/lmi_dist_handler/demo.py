"""`lmi-dist demo`: train a tiny model once, serve it, ask it something, and stay up.

Knows no torch: the training is a process of its own.
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmi_dist import LmiError
from lmi_dist_handler import cli, properties
from lmi_dist_handler.cache import clear_unfinished, default_cache, leave
from lmi_dist_handler.server import bind
from lmi_dist_handler.settings import ServerSettings

PROMPT = "Return the"
PARAMETERS = {"max_new_tokens": 80, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "seed": 7}
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # addresses to listen at, and where to find them
READY_TIMEOUT_S = 600.0
CLEAN_UP_S = 20.0
READ_TIMEOUT_S = 120.0  # between two pieces of the answer
TRAINER = ("demo_model.py", "demo_text.py")


class DemoError(LmiError):
    """The demo's model could not be trained, or the server did not answer the demo's own request."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder that keeps the trained model (%(default)s)")
    parser.add_argument("--recipe", default="{}", help="JSON object: what to train otherwise, see Recipe in demo_model.py")
    parser.add_argument("--host", help="address to listen at (SERVING_HOST)")
    parser.add_argument("--port", help="port to listen at (SERVING_PORT)")
    parser.set_defaults(model_dir=None, options=[])


def run(arguments: argparse.Namespace) -> int:
    """Train unless that was done before, then serve until a signal. Returns the server's exit status.
    Raises ConfigError on a bad setting or a port in use, DemoError when the training fails."""
    server = _settings(arguments)
    bind(server).close()  # a port in use is told before the training
    folder = trained_model(arguments.cache, arguments.recipe)
    arguments.model_dir = folder
    arguments.options = [f"option.model_id={folder}"]  # against an OPTION_MODEL_ID in the environment
    threading.Thread(target=_present, args=(server, folder), daemon=True).start()
    return cli.serve(arguments)


def _settings(arguments: argparse.Namespace) -> ServerSettings:
    """The server's own words; the model's do not matter yet, so the cache stands in for its folder."""
    arguments.cache.mkdir(parents=True, exist_ok=True)
    given = {"host": arguments.host, "port": arguments.port, "option.model_id": str(arguments.cache)}
    return properties.load(arguments.cache, arguments={key: value for key, value in given.items() if value is not None}).server


def trained_model(cache: Path, recipe: str) -> Path:
    """The folder of the demo's checkpoint, trained now if that has not been done by the same code, recipe and Python."""
    folder = (cache / f"demo-{_digest(recipe)}" / "demo").absolute()
    if folder.exists():
        print(f"the demo model is in {folder}")
    else:
        _train(folder, recipe)
    return folder


def _digest(recipe: str) -> str:
    sources = [Path(__file__).with_name(name).read_bytes() for name in TRAINER]
    return hashlib.sha256(b"\0".join([*sources, recipe.encode(), sys.version.encode()])).hexdigest()[:12]


def _train(folder: Path, recipe: str) -> None:
    """Raises DemoError when the training ends badly."""
    usual = signal.signal(signal.SIGTERM, leave)
    command = [sys.executable, "-m", "lmi_dist_handler.demo_model", str(folder), "--recipe", recipe]
    # torch's threads spin a while for each other: 30 steps took 3.2 s so, 8.2 s when they slept at once (one run each, idle)
    training = subprocess.Popen(["env", "GOMP_SPINCOUNT=100000", *command])
    try:
        status = training.wait()
    finally:
        _end(training, folder)
        signal.signal(signal.SIGTERM, usual)
    if status:
        raise DemoError(f"the training of the demo model ended with exit status {status}; its output is above")


def _end(training: "subprocess.Popen[bytes]", folder: Path) -> None:
    """The training does not outlive us, and gets a while to remove what it has begun to write. Python forgets a signal that comes
    while it calls back from a weak reference or from the tokenizers."""
    training.terminate()
    try:
        training.wait(CLEAN_UP_S)
    except subprocess.TimeoutExpired:
        training.kill()
        training.wait()
        clear_unfinished(folder, training.pid)


def _present(server: ServerSettings, folder: Path) -> None:
    """Ask the server something as soon as it is ready, and show the answer and the way on."""
    access = logging.getLogger("lmi_dist_handler.access")
    access.setLevel(logging.WARNING)  # lest its lines stand amid the answer
    try:
        wait_until_ready(server)
        print(f"\n{outcome(folder)}\nasked to go on from {PROMPT!r}, it answers:\n\n{PROMPT}", end="", flush=True)
        for text in answer(server, PROMPT):
            print(text, end="", flush=True)
    except (DemoError, OSError, ValueError, http.client.HTTPException) as error:
        print(f"\nlmi-dist: error: the demo's own request failed: {error}", file=sys.stderr, flush=True)
    else:
        print("\n\n" + "\n".join(ways_on(server)), flush=True)
    access.setLevel(logging.NOTSET)


def outcome(folder: Path) -> str:
    """What the training came to, in one line."""
    report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return (
        f"the demo model's held-out loss is {report['held_out_loss']:.3f} nats a token, "
        f"that of a bigram model of the same text {report['bigram_loss']:.3f}"
    )


def wait_until_ready(server: ServerSettings, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Returns when /ping says 200. Raises DemoError when that takes too long."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with contextlib.suppress(OSError):  # the port is not bound yet
            connection = _connection(server, timeout_s=5.0)
            connection.request("GET", "/ping")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise DemoError(f"the server was not ready within {timeout_s:g} s")


def answer(server: ServerSettings, prompt: str) -> Iterator[str]:
    """The texts of the tokens that continue `prompt`, as they come. Raises DemoError with the server's own sentence."""
    connection = _connection(server, timeout_s=READ_TIMEOUT_S)
    headers = {"content-type": "application/json"}
    if server.api_key:
        headers["authorization"] = f"Bearer {server.api_key}"
    connection.request("POST", "/invocations", _body(prompt), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise DemoError(f"{response.status} {response.read().decode(errors='replace')}")
    for line in response:
        if line.strip():
            yield _text(json.loads(line))


def _text(event: dict[str, Any]) -> str:
    if event.get("details", {}).get("finish_reason") == "error":
        raise DemoError(str(event))
    return str(event["token"].get("text", ""))


def _body(prompt: str) -> str:
    return json.dumps({"inputs": prompt, "stream": True, "parameters": PARAMETERS})


def _connection(server: ServerSettings, timeout_s: float) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(EVERYWHERE.get(server.host, server.host), server.port, timeout=timeout_s)


def ways_on(server: ServerSettings) -> list[str]:
    """Three lines to try next."""
    host = EVERYWHERE.get(server.host, server.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
    key = "-H 'Authorization: Bearer ...' " if server.api_key else ""
    chat = json.dumps({"model": "demo", "stream": True, "messages": [{"role": "user", "content": "json.dumps"}]})
    return [
        f"curl -N {address}/invocations {key}-H 'Content-Type: application/json' -d '{_body('Raise an error')}'",
        f"curl -N {address}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{chat}'",
        "OPTION_MODEL_ID=<folder or hub id of a model> make run",
    ]

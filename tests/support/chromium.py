"""A headless Chromium, driven over its own debugging pipe: one JSON message after another, each ended by a zero byte.

Needs the program and nothing else: no driver, no package. What a person does is sent as input events, not as calls of the page.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
MISSING = "these tests need Chromium: install the Debian package chromium (apt-get install chromium)"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--hide-scrollbars", "--disable-dev-shm-usage",
)  # fmt: skip
# Chromium reads its pipe from descriptor 3 and writes to 4.
START = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
KEYS = {"Enter": (13, "\r"), "Escape": (27, "")}
PATIENCE_S = 20.0


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are above 9, so that none of them is in the way of 3 and 4."""
    low = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return read, write


class Chromium:
    """One page of a browser of its own. A context manager: the browser ends with it."""

    def __init__(self, width: int = 1100, height: int = 1000, *, dark: bool = False) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._ids = itertools.count(1)
        self._rest = b""
        self.messages: list[dict[str, Any]] = []  # of the browser's console, and what it refused to load
        self._start(f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}")
        (target,) = [info for info in self._call("Target.getTargets")["targetInfos"] if info["type"] == "page"]
        self._session = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def _start(self, *flags: str) -> None:
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        assert program, MISSING
        (theirs_in, self._out), (self._in, theirs_out) = _pipe(), _pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs_in), str(theirs_out), program, *FLAGS, *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session = ""

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        reply = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def until(self, expression: str, timeout_s: float = PATIENCE_S) -> Any:
        """Wait until an expression is true; returns its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {expression}"
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """What a person reads there: nothing of what is hidden."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        find = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'nearest'}});"
        box = self.evaluate(
            f"(() => {{ {find} const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        """Put text in place of what a field holds."""
        self.click(selector)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self._call("Input.insertText", text=text)

    def press(self, key: str, *, control: bool = False) -> None:
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            given = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 2 if control else 0}
            self._call("Input.dispatchKeyEvent", type=kind, **given, **({"text": text} if kind == "keyDown" and text else {}))

    def screenshot(self, path: Path) -> bytes:
        """The whole page as PNG, also written to a file."""
        image = base64.b64decode(self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])
        path.write_bytes(image)
        return image

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser and wait for its reply; events that come in between are kept if they tell of trouble."""
        number = next(self._ids)
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return dict(message["result"])
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.messages.append(message["params"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], PATIENCE_S)
            piece = os.read(self._in, 1 << 16) if ready else b""
            assert piece, "Chromium has ended or does not answer"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

"""An engine without a model: each step gives each request one letter of its prompt, so that answers can be foretold."""

import threading
from dataclasses import dataclass

from lmi_dist import DeviceError, Output, OverloadedError, Request, RequestError, Token


@dataclass(frozen=True)
class FakeStats:
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_steps: int


class FakeEngine:
    """Refuses the prompt `bad`, is full for `full`, fails in the middle of `broken`, raises out of a step for `crash` and out of
    abort, too, for `doom`, loses its GPU for `lost`; the letter `_` has no text. `gate`, once closed, holds every step; `steps`
    counts them."""

    image_token = None

    def __init__(self) -> None:
        self.running: dict[str, tuple[Request, int]] = {}
        self.aborted: list[str] = []
        self.steps = self.resets = 0
        self.gate = threading.Event()
        self.gate.set()

    def add(self, request: Request) -> None:
        if request.prompt == "bad":
            raise RequestError("prompt=bad is refused", "prompt")
        if request.prompt == "full":
            raise OverloadedError("no room")
        if request.prompt == "bug":
            raise ZeroDivisionError("by zero")
        self.running[request.id] = (request, 0)

    def step(self) -> list[Output]:
        self.gate.wait(10)
        self.steps += 1
        return [self._advance(request, place) for request, place in list(self.running.values())]

    def _advance(self, request: Request, place: int) -> Output:
        prompt = str(request.prompt)
        if prompt == "lost" and place == 1:
            raise DeviceError("the GPU is lost")
        if prompt in ("crash", "doom") and place == 1:
            raise RuntimeError(f"a {prompt}")
        if prompt == "broken" and place == 3:
            del self.running[request.id]
            return Output(request_id=request.id, finish_reason="error", error=RuntimeError("a broken step"))
        is_last = place == len(prompt) - 1
        if is_last:
            del self.running[request.id]
        else:
            self.running[request.id] = (request, place + 1)
        text = "" if prompt[place] == "_" else prompt[place] * (5_000_000 if prompt == "h" else 1)
        return Output(
            request_id=request.id,
            text=text,
            tokens=(Token(ord(prompt[place]), text),),
            finish_reason="length" if is_last else None,
            num_prompt_tokens=len(prompt),
            num_generated_tokens=place + 1,
        )

    def abort(self, request_id: str) -> list[Output]:
        if self.running.pop(request_id, None):
            self.aborted.append(request_id)
        return []

    def reset(self) -> list[Output]:
        if any(request.prompt == "doom" for request, _ in self.running.values()):
            raise RuntimeError("doomed")
        self.resets += 1
        self.running.clear()
        return []

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def stats(self) -> FakeStats:
        return FakeStats(len(self.running), 0, 10, 10 - len(self.running), self.steps)

"""A request through a model's own functions: what its @input_formatter reads, and the answer that its @output_formatter writes.

The function that writes is called once a token, as its signature wants it; the answer is what it returned, joined.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lmi_dist import LmiError, Output, RequestError, Token
from lmi_dist_handler.dialects import LmiDialect
from lmi_dist_handler.formatter import Candidate, Formatter, finite
from lmi_dist_handler.model_py import num_arguments
from lmi_dist_handler.request_io import Sequence, TextGenerationOutput, TextInput
from lmi_dist_handler.request_io import Token as DjlToken

END = DjlToken(-1, "", -1.0, True)  # DJL's stand-in where a candidate ends without one more token


class CustomFormatterError(LmiError):
    """The model's own function failed; its request ends, the others go on."""


def read(function: Callable[..., Any], inputs: Any, tokenizer: Any, configs: Mapping[str, Any]) -> Any:
    """The RequestInput that a model's function makes of a request. Raises RequestError."""
    absent = dict.fromkeys(("adapter_registry", "model_config", "peft_config", "rolling_batch", "image_placeholder_token"))
    try:
        asked = function(inputs, configs=dict(configs), tokenizer=tokenizer, is_rolling_batch=True, **absent)
    except Exception as error:  # a stranger's code: its request alone ends
        raise RequestError(f"Input parsing failed: {type(error).__name__}: {error}") from error
    if not all(hasattr(asked, name) for name in ("input_text", "output_formatter")) or not isinstance(asked.parameters, dict):
        raise CustomFormatterError(f"the @input_formatter of model.py must return a TextInput, not {type(asked).__name__}")
    return asked


def body_of(asked: Any) -> dict[str, Any]:
    """What the LMI schema would say in its place."""
    parameters = {**asked.parameters, **(getattr(asked, "server_parameters", None) or {})}
    named = asked.output_formatter if isinstance(asked.output_formatter, str) else None
    return {"inputs": asked.input_text, "parameters": {**parameters, **({"output_formatter": named} if named else {})}}


class CustomFormatter(Formatter):
    """The form of an answer that a model's function writes. It has no content type: only the function knows."""

    content_type: ClassVar[str] = ""

    def __init__(self, function: Callable[..., Any], asked: Any, dialect: LmiDialect) -> None:
        super().__init__(1)
        self._dialect = dialect
        self._function = _taking_output(function)
        self._output = TextGenerationOutput(getattr(asked, "request_id", 0), asked)

    def _piece(self, candidate: Candidate, output: Output, is_first: bool) -> str:
        self._output.prompt_tokens_details = [_djl(token) for token in self.prompt_tokens.get(candidate.request_id, ())]
        sequence = self._output.sequences[candidate.index]
        sequence.cumulative_log_prob = candidate.cumulative_logprob
        tokens = [(_djl(token), _tops(token)) for token in output.tokens]
        if output.finish_reason is not None:
            tokens = tokens or [(END, [])]
        return "".join(
            self._take(sequence, candidate, token, tops, place == len(tokens) - 1) for place, (token, tops) in enumerate(tokens)
        )

    def _take(self, sequence: Sequence, candidate: Candidate, token: DjlToken, tops: list[DjlToken], is_newest: bool) -> str:
        """One token more, and what the function says to it."""
        sequence.tokens.append(token)
        if tops:
            sequence.top_tokens.append(tops)
        if is_newest and candidate.finish_reason is not None:
            sequence.finish_reason = self._dialect.reason(candidate.finish_reason)
            self._output.finished = True
        return self._call()

    def _call(self) -> str:
        try:
            text = self._function(self._output)
        except Exception as error:  # a stranger's code: its request alone ends
            raise CustomFormatterError(f"Custom formatter failed: {type(error).__name__}: {error}") from error
        if not isinstance(text, str):
            raise CustomFormatterError(f"Custom formatter failed: it must return a string, not {type(text).__name__}")
        return text

    def _end(self) -> str:
        return ""


def _taking_output(function: Callable[..., Any]) -> Callable[[TextGenerationOutput], Any]:
    """The function itself, or one of DJL 0.26 or 0.27 with what it takes: the next token, whether it is the first and the last,
    details, the text, and from 0.27 on the request's id (contract 7.8)."""
    count = num_arguments(function)
    return function if count == 1 else lambda output: function(*_taken_apart(output)[:count])


def _taken_apart(output: TextGenerationOutput) -> tuple[Any, ...]:
    sequence = output.sequences[output.best_sequence_index]
    token, is_first, is_last = sequence.get_next_token()
    assert token is not None, "called once a token"
    token.request_id = output.request_id
    asked = output.input
    details = {
        "finish_reason": sequence.finish_reason, "tokens": output.get_tokens_as_dict(), "generated_tokens": len(sequence.tokens),
        "inputs": asked.input_text, "parameters": asked.parameters, "prompt_tokens": len(asked.input_ids),
    }  # fmt: skip
    prompt = asked.input_text if asked.parameters.get("return_full_text") else ""
    text = prompt + "".join(one.text for one in sequence.tokens) if is_last else prompt
    return token, is_first, is_last, details if asked.parameters.get("details") else {}, text, output.request_id


def text_input(prompt: str, parameters: Mapping[str, Any], tokenizer: Any, *, tgi_compat: bool) -> TextInput:
    """What a function that writes sees of a request that our own code has read."""
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    return TextInput(
        parameters=dict(parameters), server_parameters=dict(parameters), tgi_compat=tgi_compat, input_text=prompt, input_ids=ids,
        tokenizer=tokenizer,
    )  # fmt: skip


def _djl(token: Token) -> DjlToken:
    return DjlToken(token.id, token.text, finite(token.logprob), token.is_special)


def _tops(token: Token) -> list[DjlToken]:
    return [DjlToken(entry.id, entry.text, finite(entry.logprob), False) for entry in token.top]

"""The door of the engine: a Request's prompt becomes token ids, or the request is refused with the rule that it breaks.

What depends only on the request was checked when it was made (request.py); here is what depends on model and configuration.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lmi_dist.config import EngineConfig, ModelConfig
from lmi_dist.errors import RequestError
from lmi_dist.request import ImagePart, Request, SamplingParams
from lmi_dist.text import TextDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can say it, UTF-8 and tokenizers cannot
MIN_TEXT_LIMIT = 1 << 20  # characters that are always tokenised, which takes about a second


class Admission:
    """Checks requests against one model. Changes nothing; one request's error concerns nobody else."""

    def __init__(self, config: EngineConfig, model: ModelConfig, max_model_len: int, text: TextDecoder) -> None:
        self._max_logprobs = config.max_logprobs
        self._vocab_size = model.vocab_size
        self._bos_token_id = model.bos_token_id
        self._max_model_len = max_model_len
        self._max_characters = max(MIN_TEXT_LIMIT, max_model_len * text.longest)
        self._tokenizer: PreTrainedTokenizerBase = text.tokenizer

    def admit(self, request: Request) -> tuple[int, ...]:
        """The prompt's token ids. Raises RequestError with the field at fault."""
        if request.adapter:
            raise RequestError(f"adapter={request.adapter!r} is not loaded; leave it out, this model has no adapters", "adapter")
        self._check_params(request.params)
        ids = self._truncate(self._prompt_ids(request), request.truncate)
        if not ids:
            raise RequestError("prompt is empty; it must have at least one token", "prompt")
        most = self._max_model_len - 1
        if len(ids) > most:
            raise RequestError(
                f"prompt has {len(ids)} tokens, but at most {most} fit (max_model_len={self._max_model_len}, of which one is for "
                "the answer); shorten it, or set truncate to keep only its last tokens",
                "prompt",
            )
        return ids

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self._max_logprobs:
                raise RequestError(f"{name}={value} must be at most {self._max_logprobs}; raise max_logprobs of the server", name)
        self._check_ids(params.logit_bias, "logit_bias")
        self._check_ids(params.stop_token_ids, "stop_token_ids")

    def _check_ids(self, ids: Iterable[int], name: str) -> None:
        for id in ids:
            if not 0 <= id < self._vocab_size:
                raise RequestError(f"{name} has token id {id}; ids of this model are 0 to {self._vocab_size - 1}", name)

    def _prompt_ids(self, request: Request) -> tuple[int, ...]:
        prompt = request.prompt
        if isinstance(prompt, str):
            return self._tokenise(prompt, request.add_special_tokens)
        if any(isinstance(part, ImagePart) for part in prompt):
            raise RequestError("prompt has an image, but this model reads only text; send text or token ids", "prompt")
        texts = [part for part in prompt if isinstance(part, str)]
        if texts:
            return self._tokenise("".join(texts), request.add_special_tokens)
        ids = tuple(part for part in prompt if isinstance(part, int))
        self._check_ids(ids, "prompt")
        return ids

    def _tokenise(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of text. A text that starts with BOS of its own (a chat template's) gets no second one."""
        if not text:
            raise RequestError("prompt is empty; it must have at least one character", "prompt")
        if len(text) > self._max_characters:
            raise RequestError(
                f"prompt has {len(text)} characters, but at most {self._max_characters} can fit "
                f"max_model_len={self._max_model_len} tokens; shorten it",
                "prompt",
            )
        if SURROGATE.search(text):
            raise RequestError("prompt has half of a surrogate pair, which is no character; send valid Unicode", "prompt")
        ids = tuple(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        has_two = add_special_tokens and len(ids) > 1 and ids[0] == ids[1] == self._bos_token_id
        self._check_ids(ids, "prompt")  # a tokenizer may know more tokens than the model
        return ids[1:] if has_two else ids

    def _truncate(self, ids: tuple[int, ...], truncate: int | None) -> tuple[int, ...]:
        if truncate is None:
            return ids
        if truncate < 1:
            raise RequestError(f"truncate={truncate} must be at least 1", "truncate")
        return ids[-truncate:]

"""The door of the engine: a Request's prompt becomes token ids, or the request is refused with the rule that it breaks.

What depends only on the request was checked when it was made (request.py); here is what depends on model and configuration.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from lmi_dist.config import EngineConfig, ModelConfig
from lmi_dist.errors import RequestError
from lmi_dist.images import ImageReader
from lmi_dist.plan import Image, PlacedImage
from lmi_dist.request import ImagePart, ModelInput, Prompt, Request, SamplingParams
from lmi_dist.text import TextDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can say it, UTF-8 and tokenizers cannot
MIN_TEXT_LIMIT = 1 << 20  # characters that are always tokenised, which takes about a second


class Admission:
    """Checks requests against one model. Changes nothing; one request's error concerns nobody else."""

    def __init__(
        self, config: EngineConfig, model: ModelConfig, max_model_len: int, text: TextDecoder, images: ImageReader | None = None
    ) -> None:
        """`images`: for a model that sees some."""
        self._max_logprobs = config.max_logprobs
        self._vocab_size = model.vocab_size
        self._bos_token_id = model.bos_token_id
        self._decoder_start = model.decoder_start_token_id
        self._max_model_len = max_model_len
        self._max_characters = max(MIN_TEXT_LIMIT, max_model_len * text.longest)
        self._tokenizer: PreTrainedTokenizerBase = text.tokenizer
        self._images = images
        self._image_token_id = -1 if images is None else images.vision.image_token_id
        self._place = "" if images is None else str(self._tokenizer.convert_ids_to_tokens(self._image_token_id))

    @property
    def image_token(self) -> str | None:
        return self._place or None

    def prepare(self, request: Request) -> Request:
        """The request with its images read, which takes a while and may be done in any thread. Raises RequestError."""
        self._check_images(request.prompt)
        if not request.has_unread_images:
            return request
        parts = tuple(self._read(part) if isinstance(part, ImagePart) else part for part in request.prompt)
        return replace(request, prompt=cast(Prompt, parts))

    def admit(self, request: Request) -> ModelInput:
        """The prompt as the model takes it. Raises RequestError with the field at fault."""
        if request.adapter:
            raise RequestError(f"adapter={request.adapter!r} is not loaded; leave it out, this model has no adapters", "adapter")
        self._check_params(request.params)
        request = self.prepare(request)
        ids, images = self._place_images(self._prompt_ids(request), request.prompt)
        kept = self._truncate(ids, request.truncate)
        if not kept:
            raise RequestError("prompt is empty; it must have at least one token", "prompt")
        if images and len(kept) < len(ids):
            raise RequestError(f"truncate={request.truncate} would cut a prompt that has images; leave it out", "truncate")
        self._check_length(len(kept))
        return ModelInput(kept, (), images) if self._decoder_start is None else ModelInput((self._decoder_start,), kept)

    def _check_length(self, num_tokens: int) -> None:
        """An encoder-decoder's answer does not share the length with the prompt, which its encoder reads."""
        most = self._max_model_len - (1 if self._decoder_start is None else 0)
        if num_tokens > most:
            share = ", of which one is for the answer" if self._decoder_start is None else ""
            raise RequestError(
                f"prompt has {num_tokens} tokens, but at most {most} fit (max_model_len={self._max_model_len}{share}); "
                "shorten it, or set truncate to keep only its last tokens",
                "prompt",
            )

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
        """Token ids of the prompt, one for each image."""
        prompt = request.prompt
        if isinstance(prompt, str):
            return self._tokenise(prompt, request.add_special_tokens)
        if any(isinstance(part, str) for part in prompt):
            text = "".join(part if isinstance(part, str) else self._place for part in prompt)
            return self._tokenise(text, request.add_special_tokens)
        ids = tuple(part if isinstance(part, int) else self._image_token_id for part in prompt)
        self._check_ids(ids, "prompt")
        return ids

    def _check_images(self, prompt: Prompt) -> None:
        num_images = sum(isinstance(part, ImagePart | Image) for part in prompt)
        if num_images and self._images is None:
            raise RequestError("prompt has an image, but this model reads only text; send text or token ids", "prompt")
        if self._images is not None and num_images > self._images.max_images:
            raise RequestError(f"prompt has {num_images} images, but at most {self._images.max_images} are taken", "prompt")

    def _read(self, part: ImagePart) -> Image:
        assert self._images is not None, "the prompt was checked"
        return self._images.read(part.data)

    def _place_images(self, ids: tuple[int, ...], prompt: Prompt) -> tuple[tuple[int, ...], tuple[PlacedImage, ...]]:
        """As many tokens for each image as it has features, and where they begin."""
        if self._images is None:
            return ids, ()
        images = [part for part in prompt if isinstance(part, Image)]
        if ids.count(self._image_token_id) != len(images):
            raise RequestError(
                f"prompt has {ids.count(self._image_token_id)} places for images ({self._place}) but {len(images)} images; "
                f"send as many of the one as of the other, or leave {self._place} to us",
                "prompt",
            )
        whole: list[int] = []
        placed: list[PlacedImage] = []
        for id in ids:
            if id == self._image_token_id:
                placed.append(PlacedImage(len(whole), images[len(placed)]))
            whole += [id] * (placed[-1].image.num_tokens if id == self._image_token_id else 1)
        return tuple(whole), tuple(placed)

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

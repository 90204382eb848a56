"""Images on their way to the model: decoded under caps, cut into what the vision tower takes, and counted in tokens.

Rank 0's business and safe to call from any thread; what becomes of the pixels is the model's (models/llava.py).
"""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmi_dist.config import ConfigKeys, EngineConfig
from lmi_dist.errors import CheckpointError, RequestError
from lmi_dist.plan import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_ASPECT = 100  # the longer side over the shorter one: a thread of an image would be blown up to a sheet
PROCESSORS = {
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "LlavaImageProcessor": "LlavaImageProcessorPil",
    "LlavaNextImageProcessor": "LlavaNextImageProcessorPil",
}  # what preprocessor_config.json names, to transformers' class that needs no torchvision


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """How many tokens an image takes: `side` x `side` patches a tile, with the class token's if `has_class`; if there are
    `pinpoints` (height, width), tiles of `tile` pixels as fit the best of these sizes, and a newline behind each row of patches."""

    image_token_id: int
    tile: int
    side: int
    has_class: bool
    pinpoints: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, keys: ConfigKeys) -> "VisionConfig | None":
        """None for a model that sees nothing. Raises ConfigError."""
        if "vision_config" not in keys:
            return None
        vision = keys.section("vision_config")
        tile, patch = vision.integer("image_size"), vision.integer("patch_size")
        strategy = keys.choice("vision_feature_select_strategy", ("default", "full"), default="default")
        pinpoints = _pinpoints(keys, tile)
        if pinpoints and strategy == "full":
            raise keys.refuse("vision_feature_select_strategy", "must be default where an image is cut into tiles")
        token = keys.integer("image_token_index" if "image_token_index" in keys else "image_token_id", minimum=0)
        return cls(token, tile, tile // patch, strategy == "full", pinpoints)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles for an image of this height and width: those of the size that wastes least of it."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(size, list(self.pinpoints))
        return height // self.tile, width // self.tile

    def unpadded(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Of all tiles' patches the rows and columns that show the image, and not what fills it up to the tiles' shape."""
        grid_height, grid_width = self.grid(size)
        height, width = grid_height * self.side, grid_width * self.side
        if size[1] / size[0] > width / height:
            return _middle(height, int(round(size[0] * (width / size[1]), 7))), slice(0, width)
        return slice(0, height), _middle(width, int(round(size[1] * (height / size[0]), 7)))

    @property
    def max_tiles(self) -> int:
        """Tiles that an image may be cut into, the one that shows it whole among them."""
        return 1 + max((height * width // self.tile**2 for height, width in self.pinpoints), default=0)

    @property
    def max_tokens(self) -> int:
        """Tokens that an image may take, and no fewer."""
        sizes = [(height // self.tile * self.side, width // self.tile * self.side) for height, width in self.pinpoints]
        return self.side * self.side + self.has_class + max((height * (width + 1) for height, width in sizes), default=0)

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of an image of this height and width."""
        num_tokens = self.side * self.side + self.has_class
        if self.pinpoints:
            rows, columns = self.unpadded(size)
            num_tokens += (rows.stop - rows.start) * (columns.stop - columns.start + 1)
        return num_tokens


class ImageReader:
    """Encoded images to the pixels that the vision tower takes, by the checkpoint's own image processor."""

    def __init__(self, config: EngineConfig, vision: VisionConfig, folder: Path) -> None:
        """Raises CheckpointError if the processor's configuration is missing or unlike the model's."""
        self.max_images = config.max_images
        self._max_bytes, self._max_pixels = config.max_image_bytes, config.max_image_pixels
        self.vision, self._processor = vision, _load_processor(folder)
        shape = self._pixels(_blank(vision.tile)).shape
        if shape[1:] != (3, vision.tile, vision.tile):
            raise CheckpointError(
                f"{folder}: the image processor gives images of {shape[1:]}, the model takes {(3, vision.tile, vision.tile)}; "
                "the size in preprocessor_config.json must be image_size of config.json"
            )

    def read(self, data: bytes) -> Image:
        """Raises RequestError for what is no image, of a foreign type, or beyond a cap."""
        if len(data) > self._max_bytes:
            raise RequestError(
                f"an image has {len(data)} bytes, but at most {self._max_bytes} are taken; make it smaller", "prompt"
            )
        picture = self._decode(data)
        size = (picture.height, picture.width)
        pixels = self._pixels(picture)
        raw = pixels.tobytes()
        digest = hashlib.sha256(f"{pixels.shape} {size}".encode() + raw).digest()
        return Image(digest, self.vision.num_tokens(size), tuple(pixels.shape), size, raw)

    def _decode(self, data: bytes) -> Any:
        """A PIL image in RGB, turned as its EXIF says. Its size is known, and checked, before the pixels are."""
        import PIL.Image
        import PIL.ImageOps

        try:
            picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
            self._check_size(*picture.size)
            return PIL.ImageOps.exif_transpose(picture).convert("RGB")
        except RequestError:
            raise
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
            raise RequestError(f"an image has more than {self._max_pixels} pixels; make it smaller", "prompt") from None
        except PIL.UnidentifiedImageError:
            raise RequestError(f"an image is of no type that is read, which are {', '.join(FORMATS)}", "prompt") from None
        except Exception as error:  # decoders raise what they like on broken data: OSError, ValueError, SyntaxError, struct.error
            raise RequestError(f"an image cannot be decoded: {error}; it is broken or cut off", "prompt") from None

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise RequestError(
                f"an image has {width} x {height} pixels, but at most {self._max_pixels} are taken; make it smaller", "prompt"
            )
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise RequestError(
                f"an image has {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other", "prompt"
            )

    def _pixels(self, picture: Any) -> Any:
        """numpy fp32 [tiles,3,height,width]"""
        import numpy as np

        pixels = np.asarray(self._processor(images=[picture], return_tensors="np")["pixel_values"], np.float32)
        return np.ascontiguousarray(pixels[0] if pixels.ndim == 5 else pixels)


def _pinpoints(keys: ConfigKeys, tile: int) -> tuple[tuple[int, int], ...]:
    pairs: Any = keys.values.get("image_grid_pinpoints") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and _are_multiples(pair, tile) for pair in pairs
    ):
        raise keys.refuse("image_grid_pinpoints", f"must be a list of [height, width], multiples of image_size={tile}")
    return tuple((height, width) for height, width in pairs)


def _are_multiples(numbers: Iterable[object], tile: int) -> bool:
    return all(isinstance(number, int) and number > 0 and number % tile == 0 for number in numbers)


def _middle(length: int, kept: int) -> slice:
    """Where `kept` (or one more) of `length` lie if what is too much is taken from both ends alike."""
    padding = (length - kept) // 2
    return slice(padding, length - padding)


def _blank(tile: int) -> Any:
    import PIL.Image

    return PIL.Image.new("RGB", (tile, tile))


def _load_processor(folder: Path) -> Any:
    import transformers

    try:
        values, _ = transformers.CLIPImageProcessorPil.get_image_processor_dict(folder)
        kind = (
            str(values.get("image_processor_type") or values.get("feature_extractor_type")).removesuffix("Fast").removesuffix("Pil")
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no image processor: {error}; add preprocessor_config.json") from error
    if kind not in PROCESSORS:
        raise CheckpointError(f"{folder}: image_processor_type={kind} is not supported; supported are {', '.join(PROCESSORS)}")
    return getattr(transformers, PROCESSORS[kind]).from_pretrained(folder)

"""LLaVA 1.5 and 1.6 (Liu et al. 2023, 2024): what CLIP sees of an image, projected, stands in a Llama's or Mistral's text.

1.6 looks at an image as a whole and at tiles of it, as many as its resolution is worth.
"""

from dataclasses import replace
from typing import cast

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ConfigKeys, ModelConfig
from lmi_dist.images import VisionConfig
from lmi_dist.layers.linear import Linear
from lmi_dist.layers.mlp import ACTIVATIONS
from lmi_dist.models import ARCHITECTURES, model_class
from lmi_dist.models.decoder import Decoder
from lmi_dist.plan import Image
from lmi_dist.weights import Renamed, Weights

TEXT_MODELS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# What text_config may leave out, beyond what its own architecture may.
TEXT_DEFAULTS: dict[str, dict[str, object]] = {
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {"intermediate_size": 14336, "max_position_embeddings": 131072},
}
SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-6}


def standard_keys(keys: ConfigKeys) -> dict[str, object]:
    """The text model's keys, which are those of the whole for everything but images."""
    text = keys.section("text_config")
    kind = text.choice("model_type", TEXT_MODELS, default="llama")
    tied = keys.boolean("tie_word_embeddings", default=text.boolean("tie_word_embeddings", default=False))
    own = ConfigKeys({**SIZES, **TEXT_DEFAULTS[kind], **text.values}, text.where)
    standard = ARCHITECTURES[TEXT_MODELS[kind]].standard(own)
    return {**standard.values, "tie_word_embeddings": tied, "text_architecture": TEXT_MODELS[kind]}


class VisionTower:
    """CLIP's vision transformer (Radford et al. 2021), by transformers, as deep as the layers that are looked at."""

    def __init__(self, keys: ConfigKeys, weights: Weights, prefix: str) -> None:
        section = keys.section("vision_config")
        section.choice("model_type", ("clip_vision_model",), default="clip_vision_model")
        config = CLIPVisionConfig.from_dict(dict(section.values))
        self.dtype, self.device, self.hidden_size = weights.dtype, weights.device, config.hidden_size
        self.depths = [_depth(keys, layer, config.num_hidden_layers) for layer in keys.integers("vision_feature_layer") or (-2,)]
        self.first = 0 if keys.values.get("vision_feature_select_strategy") == "full" else 1  # the class token's place
        with torch.device("meta"):
            model = CLIPVisionModel(config).eval()
        unused = range(max(self.depths), config.num_hidden_layers)
        self.ignored = (
            rf"vision_tower\.(vision_model\.)?(post_layernorm|encoder\.layers\.({'|'.join(map(str, unused)) or 'none'}))\.\w.*",
            r"embeddings\.position_ids",
        )
        del model.encoder.layers[unused.start :], model.post_layernorm
        state = {name: weights.tensor(f"{prefix}.{name}", tuple(x.shape)) for name, x in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model.embeddings.position_ids = torch.arange(model.embeddings.num_positions, device=weights.device)[None]
        self.embeddings, self.norm, self.layers = model.embeddings, model.pre_layrnorm, model.encoder.layers

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels: [tiles,3,size,size]; gives [tiles,patches,hidden of all layers that are looked at]. One tile at a time: the
        bits must not depend on how many there are, nor the memory."""
        return torch.cat([self._look(tile[None].to(self.device, self.dtype)) for tile in pixels])

    def _look(self, tile: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embeddings(tile))
        seen = {0: x}
        for depth, layer in enumerate(self.layers, start=1):
            x = seen[depth] = layer(x, attention_mask=None)
        return torch.cat([seen[depth] for depth in self.depths], -1)[:, self.first :]


class LlavaForConditionalGeneration:
    """Token ids and image features to logits."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        keys, hidden = config.keys, config.hidden_size
        vision = VisionConfig.read(keys)
        if vision is None:
            raise keys.refuse("vision_config", "is missing; a LLaVA has one")
        self.vision = vision
        # transformers 4 had the language model on top, 5 has it inside; each may save as the other did
        prefix = "model." if weights.has("model.language_model.embed_tokens.weight") else ""
        text = _text_names(weights, is_inside=bool(prefix))
        self.text = cast(Decoder, model_class(str(keys.values["text_architecture"]))(config, text, max_model_len))
        tower = f"{prefix}vision_tower.vision_model"
        has_level = weights.has(f"{tower}.pre_layrnorm.weight")
        self.tower = VisionTower(keys, weights, tower if has_level else f"{prefix}vision_tower")
        projector, bias = f"{prefix}multi_modal_projector", keys.boolean("multimodal_projector_bias", default=True)
        inputs = self.tower.hidden_size * len(self.tower.depths)
        self.up = Linear.load(weights, [f"{projector}.linear_1"], "outputs", inputs=inputs, outputs=[hidden], bias=bias)
        self.down = Linear.load(weights, [f"{projector}.linear_2"], "inputs", inputs=hidden, outputs=[hidden], bias=bias)
        self.activation = ACTIVATIONS[keys.choice("projector_hidden_act", ACTIVATIONS, default="gelu")]
        self.newline = weights.tensor(f"{prefix}image_newline", (hidden,)) if vision.pinpoints else None
        self.ignored = (*self.text.ignored, *self.tower.ignored)

    def see(self, image: Image) -> torch.Tensor:
        """An image's features [tokens,E], which stand in the text for its tokens."""
        pixels = torch.frombuffer(bytearray(image.pixels), dtype=torch.float32).view(image.shape)
        seen = self.tower(pixels)
        features = self.project(seen.flatten(0, 1)).view(*seen.shape[:2], -1)
        return features[0] if self.newline is None else self._pack(features, image.size, self.newline)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """[T,vision's] to [T,E]"""
        return self.down(self.up(x, None, activation=self.activation), None)

    def _pack(self, features: torch.Tensor, size: tuple[int, int], newline: torch.Tensor) -> torch.Tensor:
        """The whole image's features, then those of its tiles put together, without what is padding, and a newline behind each row.
        features: [1 + tiles,patches,E]"""
        (height, width), side = self.vision.grid(size), self.vision.side
        rows, columns = self.vision.unpadded(size)
        tiles = features[1:].view(height, width, side, side, -1).transpose(1, 2).reshape(height * side, width * side, -1)
        shown = tiles[rows, columns]
        lines = torch.cat((shown, newline.expand(len(shown), 1, -1)), 1)
        return torch.cat((features[0], lines.flatten(0, 1)))

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        if batch.images:
            merged = self.text.embed(batch)
            for first, features in batch.images:
                merged[first : first + len(features)] = features
            batch = replace(batch, embeddings=merged)
        return self.text(batch)

    def cache_regime(self, prompt_length: int) -> str:
        return self.text.cache_regime(prompt_length)


class LlavaNextForConditionalGeneration(LlavaForConditionalGeneration):
    """As LLaVA, with tiles: image_grid_pinpoints tells."""


def _depth(keys: ConfigKeys, layer: int, num_layers: int) -> int:
    """Layers below the hidden states of this index; 0 are the embeddings, negative ones count from the end."""
    depth = layer if layer >= 0 else num_layers + 1 + layer
    if not 0 <= depth <= num_layers:
        raise keys.refuse("vision_feature_layer", f"must be {-num_layers - 1} to {num_layers}, the layers of this vision tower")
    return depth


def _text_names(weights: Weights, *, is_inside: bool) -> Weights:
    """The text model's weights under the names that it has when it is alone."""
    if is_inside:
        return Renamed(weights, lambda name: name.replace("model.", "model.language_model.", 1))
    return Renamed(weights, lambda name: f"language_model.{name}")

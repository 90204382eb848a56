"""Operations on torch tensors: checks, and the choice between the CPU library and the plain torch version of each (`<name>_torch`
in the same file), which is also the tests' reference. `select` chooses; nothing above this level knows a library."""

from lmi_dist.ops.activation import ACTIVATIONS, Activation, activation, elementwise
from lmi_dist.ops.attention import attention
from lmi_dist.ops.column import chosen, cuda_architectures, describe, select, using
from lmi_dist.ops.embedding import embedding
from lmi_dist.ops.flash import GATHERED_KEYS, PromptCall, Prompts
from lmi_dist.ops.graph import GraphPool
from lmi_dist.ops.linear import PackedWeight, grouped_linear, linear, pack_experts, pack_linear, row_major
from lmi_dist.ops.lora import lora
from lmi_dist.ops.moe import Routing, moe_combine, moe_gather, moe_route
from lmi_dist.ops.norm import layer_norm, rms_norm
from lmi_dist.ops.peers import Peers
from lmi_dist.ops.record import Arena, Recorder, Recording, Replayable
from lmi_dist.ops.rotary import rotary
from lmi_dist.ops.sampling import logprobs, penalize, sample
from lmi_dist.ops.segment import Segment

__all__ = [
    "ACTIVATIONS",
    "GATHERED_KEYS",
    "Activation",
    "Arena",
    "GraphPool",
    "PackedWeight",
    "Peers",
    "PromptCall",
    "Prompts",
    "Recorder",
    "Recording",
    "Replayable",
    "Routing",
    "Segment",
    "activation",
    "attention",
    "chosen",
    "cuda_architectures",
    "describe",
    "elementwise",
    "embedding",
    "grouped_linear",
    "layer_norm",
    "linear",
    "logprobs",
    "lora",
    "moe_combine",
    "moe_gather",
    "moe_route",
    "pack_experts",
    "pack_linear",
    "penalize",
    "rms_norm",
    "rotary",
    "row_major",
    "sample",
    "select",
    "using",
]

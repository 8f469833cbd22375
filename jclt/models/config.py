"""The settings of a language model. Every family that jclt reads is one choice of them."""

from dataclasses import dataclass, replace
from typing import Literal

from jclt.errors import UserError

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]


@dataclass(frozen=True)
class RopeScaling:
    """How published models scale rotary frequencies for longer contexts."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder-only transformer. `family` is the published layout in which it is saved."""

    family: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    context: int
    kv_heads: int | None = None  # None: as many as heads. Code reads `key_heads`
    head_width: int | None = None  # None: width / heads. Code reads `head_size`

    norm: Literal["layer", "rms", "none"] = "rms"  # none divides by one; no published family has it
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0  # Gemma stores gains minus one
    post_norms: bool = False
    qk_norm: bool = False

    activation: Activation = "silu"
    gated: bool = True
    parallel: bool = False  # attention and MLP read the same residual stream (GPT-NeoX)
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False

    learned_positions: bool = False  # otherwise rotary
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    local_layers: tuple[int, ...] = ()  # layers that attend through the sliding window
    window: int = 0
    rope_local_base: float | None = None  # Gemma 3: the base of local layers, which is not scaled

    attn_scale: float | None = None  # None: 1 / sqrt(head_size). Code reads `score_scale`
    attn_scale_by_layer: bool = False  # an option of GPT-2: also divide by layer + 1
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    scaled_embedding: bool = False  # Gemma: token embeddings times sqrt(width)
    tied: bool = False

    bos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "mlp_width", "context", "key_heads", "head_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model: {name}={getattr(self, name)}, expected at least 1")
        if self.heads % self.key_heads:
            raise UserError(f"model: kv_heads={self.key_heads}, expected a divisor of heads={self.heads}")
        if self.rotary_width % 2 or not 0 <= self.rotary_width <= self.head_size:
            limit = self.head_size
            raise UserError(
                f"model: {self.rotary_width} dimensions of each head rotate, expected an even number to {limit}"
            )
        if self.local_layers and self.window < 1:
            raise UserError(f"model: window={self.window}, expected at least 1, since some layers are local")

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // max(1, self.heads) if self.head_width is None else self.head_width

    @property
    def score_scale(self) -> float:
        return self.head_size**-0.5 if self.attn_scale is None else self.attn_scale

    @property
    def rotary_width(self) -> int:
        """The number of dimensions of a head that rotate."""
        return 0 if self.learned_positions else int(self.head_size * self.rope_fraction)

    def explicit(self) -> "ModelConfig":
        """The same settings with every derived value filled in."""
        return replace(self, kv_heads=self.key_heads, head_width=self.head_size, attn_scale=self.score_scale)

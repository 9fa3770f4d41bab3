"""Size and variant of the decoder."""

import dataclasses
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

Family = Literal["opt", "modern"]
Dtype = Literal["float32", "bfloat16", "float64"]
RematPolicy = Literal["none", "minimal", "save_qkv", "save_attention", "offload", "full"]
Attention = Literal["auto", "plain", "splash", "triton"]
Activation = Literal["", "gelu_tanh", "gelu"]
DTYPES = get_args(Dtype)
REMAT_POLICIES = get_args(RematPolicy)
ATTENTIONS = get_args(Attention)
ROPE_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class Traits:
  """What sets the decoders of a family apart.

  Attributes:
    rotary: positions are angles (RoPE); else they have a learned table.
    gated: the feed-forward layer has a gate (SwiGLU), so three products; else two.
    scaled_norms: RMS norms with a scale; else layer norms without parameters.
    head_norms: queries and keys always pass a norm, see `ModelConfig.query_key_norm`.
    tied: one table of tokens serves inputs and outputs.
    starts_as_identity: residual outputs start at 0 (section 2.3).
  """

  rotary: bool = False
  gated: bool = False
  scaled_norms: bool = False
  head_norms: bool = False
  tied: bool = False
  starts_as_identity: bool = False


FAMILIES: dict[str, Traits] = {
  "opt": Traits(tied=True, starts_as_identity=True),
  "modern": Traits(rotary=True, gated=True, scaled_norms=True, head_norms=True),
}


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ModelConfig:
  """One decoder-only transformer.

  The defaults are CM3Leon-7B (Table 3; heads and feed-forward from OPT's table).
  """

  family: Family = "opt"
  """Architecture. `opt` (the paper): pre-LayerNorm without parameters, learned positions, ReLU,
  no biases, tied embeddings. `modern`: RMSNorm, RoPE, SwiGLU, query-key norm, untied
  embeddings."""
  vocab_size: PositiveInt = 64_512
  """Number of text and image ids together. It follows from `vocab`: a config leaves it out."""
  num_layers: PositiveInt = 32
  """Number of layers."""
  width: PositiveInt = 4_096
  """Width of the activations between layers."""
  num_heads: PositiveInt = 32
  """Number of attention heads; without `head_size` a divisor of `width`."""
  head_size: NonNegativeInt = 0
  """Size of a head; 0: `width` / `num_heads`. `modern` needs an even one. Published models may have
  another: Qwen3-0.6B has a width of 1,024 and 16 heads of 128."""
  mlp_width: PositiveInt = 16_384
  """Width of the feed-forward layer."""
  max_positions: PositiveInt = 4_096
  """Longest sample that the learned positions cover; at least `data.sequence_length`."""
  rope_base: NonNegativeFloat = 0.0
  """Base of the wavelengths of `modern`'s rotary positions; 0: 10,000. Qwen3 has 1,000,000."""
  align_images: bool = False
  """Whether positions are counted from the images: the first code of every image stands at position
  0, so the same place of a neighbor's image is at a constant distance. Only `modern`, whose
  positions are relative; samples with one image have the same logits as without. Not for
  interleaved documents: how long the text before the next image will be is not known while it is
  generated."""
  activation: Activation = ""
  """Activation of the feed-forward layer of `opt` in place of the paper's ReLU: `gelu`, with the
  error function, or `gelu_tanh`, its approximation by tanh. Empty: ReLU; `modern` always has
  SwiGLU."""
  query_key_norm: bool = False
  """Whether the queries and keys of every head pass an RMSNorm, for stability; with `modern` they
  always do."""
  init_std: PositiveFloat = 0.006
  """Standard deviation of the truncated normal that parameters start from (the paper's, at width
  4,096; another width starts alike at init_std x sqrt(4,096 / width))."""
  embed_std: PositiveFloat = 0.006
  """Standard deviation of the truncated normal that token embeddings start from."""
  tied_start: bool = False
  """Whether the output table of `modern` starts as the input table, scaled to `init_std`; they
  become two tables in training. Small decoders learn faster so: a token in the context makes itself
  more likely from the first step on. In `opt` both are one table anyway."""
  codebook_start: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of the variance of the image codes' rows, in both tables, that comes from the codebook of
  the image tokenizer when training starts: codes that look alike then start alike."""
  dtype: Dtype = "bfloat16"
  """Dtype of activations, and of parameters while they are used; parameters are stored in
  float32. `float64` (with JAX_ENABLE_X64) is for comparisons with other implementations."""
  remat_policy: RematPolicy = "full"
  """Values of a layer, beside its input, that are kept for the backward pass; the others are
  computed again. From most memory to least: `none` keeps all; `minimal` queries, keys, values,
  attention's result and the feed-forward's inner product (only attention's output projection is
  computed again); `save_qkv` the first four of these; `save_attention` attention's result and the
  residual stream after it; `offload` these two in the host's memory (TPU); `full` nothing."""
  attention: Attention = "auto"
  """Implementation of attention: `plain` on any device; `splash`, the Pallas kernel of TPUs;
  `triton`, the Pallas kernel of GPUs; `auto`, the one of the mesh's devices."""
  unroll_layers: bool = False
  """Whether the loop over layers is unrolled. It then takes longer to compile, and saves the copies
  between iterations: 15 to 20% of a train step of small decoders on a CPU."""
  loss_chunk: PositiveInt = 256
  """Tokens of a row whose logits exist at the same time in the loss."""

  def __post_init__(self) -> None:
    if not self.head_size and self.width % self.num_heads:
      raise ValueError(f"num_heads = {self.num_heads} does not divide width = {self.width}.")
    if self.traits.rotary and self.head_dim % 2:
      what = "head_size" if self.head_size else "width / num_heads"
      raise ValueError(f"{what} = {self.head_dim} is odd; rotary positions need an even head size.")
    if self.rope_base and not self.traits.rotary:
      raise ValueError(
        f"rope_base is {self.rope_base}, and family is '{self.family}'; only {_with('rotary')} has "
        "rotary positions."
      )
    if self.activation and self.traits.gated:
      raise ValueError(
        f"activation is '{self.activation}', and family is '{self.family}', whose feed-forward "
        "layer is SwiGLU: leave it empty."
      )
    if self.align_images and not self.traits.rotary:
      raise ValueError(
        f"align_images is set, and family is '{self.family}'; it must be {_with('rotary')}, whose "
        "positions are relative."
      )

  def computing_in(self, dtype: str) -> "ModelConfig":
    """Returns the same decoder with another dtype of the computation; raises as other fields do."""
    changed: dict[str, Any] = {"dtype": dtype}
    return dataclasses.replace(self, **changed)

  @property
  def traits(self) -> Traits:
    """What sets the family apart."""
    return FAMILIES[self.family]

  @property
  def head_dim(self) -> int:
    """Size of a head."""
    return self.head_size or self.width // self.num_heads

  @property
  def rotary_base(self) -> float:
    """Base of the wavelengths of rotary positions."""
    return self.rope_base or ROPE_BASE


def _with(trait: str) -> str:
  """Names the families that have a trait."""
  return " or ".join(f"'{name}'" for name, traits in FAMILIES.items() if getattr(traits, trait))

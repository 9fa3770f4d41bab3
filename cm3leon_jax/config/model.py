"""Defines the config sections `model`, the decoder's architecture, and `adapter`."""

import dataclasses
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT

Family = Literal["opt", "modern", "chameleon"]
Dtype = Literal["float32", "bfloat16", "float64"]
RematPolicy = Literal["none", "minimal", "save_qkv", "save_attention", "offload", "full"]
Attention = Literal["auto", "plain", "splash", "triton"]
Activation = Literal["", "gelu_tanh", "gelu"]
Matrix = Literal["q", "k", "v", "out", "up", "gate", "down"]
DTYPES = get_args(Dtype)
REMAT_POLICIES = get_args(RematPolicy)
ATTENTIONS = get_args(Attention)
ROPE_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class Traits:
  """Properties that differ between families of architectures.

  Attributes:
    rotary: uses rotary positions (RoPE) instead of a learned table of positions.
    gated: uses a gated feed-forward layer (SwiGLU) with three matrices instead of two.
    scaled_norms: uses RMSNorm with a scale instead of LayerNorm without parameters.
    head_norms: always normalizes queries and keys, see `ModelConfig.query_key_norm`.
    biased_head_norms: normalizes them by LayerNorm over the channels of a head, with a scale and a
      bias for each head, instead of RMSNorm with a scale that all heads share.
    norm_eps: number that norms with a scale add to the variance.
    tied: uses one table for input and output embeddings.
    shared_keys: can share key and value heads, see `ModelConfig.num_kv_heads`.
    starts_as_identity: initializes the output projections of residual branches to 0 (CM3Leon,
      section 2.3).
  """

  rotary: bool = False
  gated: bool = False
  scaled_norms: bool = False
  head_norms: bool = False
  biased_head_norms: bool = False
  norm_eps: float = 1e-6
  tied: bool = False
  shared_keys: bool = False
  starts_as_identity: bool = False


_MODERN = Traits(rotary=True, gated=True, scaled_norms=True, head_norms=True, shared_keys=True)
FAMILIES: dict[str, Traits] = {
  "opt": Traits(tied=True, starts_as_identity=True),
  "modern": _MODERN,
  "chameleon": dataclasses.replace(_MODERN, biased_head_norms=True, norm_eps=1e-5),
}


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ModelConfig:
  """Config of a decoder-only transformer.

  The defaults are those of CM3Leon-7B (table 3 of the paper). Its number of heads and feed-forward
  width are those of OPT.
  """

  family: Family = "opt"
  """Architecture. `opt` is the paper's: pre-LayerNorm without parameters, learned positions, ReLU,
  no biases, tied embeddings. `modern` has RMSNorm, RoPE, SwiGLU, query-key norm and untied
  embeddings. `chameleon` (Chameleon, 2405.09818) differs from `modern` in its query-key norm, which
  is LayerNorm with a scale and a bias per head, and in the eps of its norms, 1e-5."""
  vocab_size: PositiveInt = 64_512
  """Number of text tokens and image codes. Omit it in a config, because it is computed from
  `vocab`."""
  num_layers: Annotated[int, Field(gt=0, le=4_096)] = 32
  """Number of layers."""
  width: PositiveInt = 4_096
  """Width of the activations between layers."""
  num_heads: PositiveInt = 32
  """Number of attention heads. It must divide `width` if `head_size` is 0."""
  num_kv_heads: NonNegativeInt = 0
  """Number of key and value heads, which must divide `num_heads`; 0 means `num_heads`, as in `opt`.
  Each is shared by `num_heads` / `num_kv_heads` adjacent attention heads (grouped-query attention,
  Ainslie et al. 2023), so the cache of generation is smaller by this factor."""
  head_size: NonNegativeInt = 0
  """Size of an attention head; 0 means `width` / `num_heads`. Rotary positions need an even size.
  Some published models need it, such as Qwen3-0.6B with a width of 1,024 and 16 heads of size
  128."""
  mlp_width: PositiveInt = 16_384
  """Width of the feed-forward layer."""
  max_positions: PositiveInt = 4_096
  """Number of learned positions, which is the maximum length of a sample. It must be at least
  `data.sequence_length`."""
  rope_base: NonNegativeFloat = 0.0
  """Base of the rotary wavelengths; 0 means 10,000. Qwen3 uses 1,000,000. `opt` has none."""
  align_images: bool = False
  """Whether to count positions from the images. The first code of every image then has position 0,
  so corresponding codes of two images have the same position. This requires rotary positions, which
  are relative, so not `opt`. The logits of samples with one image do not change. Interleaved
  documents are not supported, because the length of the text before the next image is unknown
  during generation."""
  activation: Activation = ""
  """Activation of the feed-forward layer of `opt`; "" means the paper's ReLU. `gelu` uses the error
  function, `gelu_tanh` its tanh approximation. Other families always use SwiGLU and require an
  empty field."""
  query_key_norm: bool = False
  """Whether to apply RMSNorm to the queries and keys of every head, for stability. Other
  families than `opt` always normalize them."""
  swin_norm: bool = False
  """Whether the two norms of a layer are applied to the results of attention and of the
  feed-forward layer, before their addition, instead of to the inputs. Only `chameleon` supports
  it."""
  init_std: PositiveFloat = 0.006
  """Standard deviation of the truncated normal distribution that initializes the parameters. The
  default is the paper's, for width 4,096. For an equivalent start at another width, multiply it by
  sqrt(4,096 / width)."""
  embed_std: PositiveFloat = 0.006
  """Standard deviation of the truncated normal distribution that initializes the token
  embeddings."""
  tied_start: bool = False
  """Whether the output table starts as a copy of the input table, scaled to `init_std`. Training
  then changes them separately. Small decoders learn faster this way, because a token in the context
  makes its own repetition more likely from the first step. `opt` always uses one table."""
  codebook_start: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of the variance of the initial embeddings of image codes, in the input and output table,
  that comes from the codebook of the image tokenizer. Codes that look alike then start with similar
  embeddings."""
  dtype: Dtype = "bfloat16"
  """Compute dtype of activations and parameters. Parameters are stored in float32. `float64` needs
  JAX_ENABLE_X64 and is for comparisons with other implementations."""
  remat_policy: RematPolicy = "full"
  """Activations of a layer that are saved for the backward pass in addition to its input. The
  others are recomputed. From most to least memory: `none` saves all. `minimal` saves queries, keys,
  values, the attention output and the hidden activations of the feed-forward layer, so only the
  attention output projection is recomputed. `save_qkv` saves queries, keys, values and the
  attention output. `save_attention` saves the attention output and the residual stream after
  attention. `offload` moves the activations of `save_attention` to host memory (TPU). `full` saves
  nothing."""
  attention: Attention = "auto"
  """Implementation of attention: `plain` on any device, the Pallas kernel `splash` on TPUs, or the
  Pallas kernel `triton` on GPUs. `auto` chooses one for the devices of the mesh."""
  unroll_layers: bool = False
  """Whether to unroll the loop over layers. Compilation takes longer, but no arrays are copied
  between iterations. This saves 15 to 20% of the step time of small decoders on a CPU."""
  loss_chunk: PositiveInt = 256
  """Number of tokens per row whose logits are in memory at the same time when the loss is
  computed."""

  def __post_init__(self) -> None:
    if not self.head_size and self.width % self.num_heads:
      raise ValueError(
        f"num_heads ({self.num_heads}) must divide width ({self.width}), unless head_size is set."
      )
    if self.traits.rotary and self.head_dim % 2:
      what = "head_size" if self.head_size else "width / num_heads"
      raise ValueError(
        f"{what} is {self.head_dim}, which is odd; rotary positions need an even head size."
      )
    if self.num_heads % self.key_heads:
      raise ValueError(
        f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})."
      )
    if self.is_grouped and not self.traits.shared_keys:
      raise ValueError(
        f"num_kv_heads is {self.num_kv_heads}, but family is '{self.family}', which has a key head "
        f"for each of its {self.num_heads} heads; only {_with('shared_keys')} can share key heads."
      )
    if self.rope_base and not self.traits.rotary:
      raise ValueError(
        f"rope_base is {self.rope_base}, but family is '{self.family}'; only {_with('rotary')} has "
        "rotary positions."
      )
    if self.activation and self.traits.gated:
      raise ValueError(
        f"activation is '{self.activation}', but family is '{self.family}', whose feed-forward "
        "layer is SwiGLU: leave activation empty."
      )
    if self.swin_norm and not self.traits.biased_head_norms:
      raise ValueError(
        f"swin_norm is True, but family is '{self.family}'; only {_with('biased_head_norms')} can "
        "have norms after attention."
      )
    if self.align_images and not self.traits.rotary:
      raise ValueError(
        f"align_images is True, but family is '{self.family}'; family must be {_with('rotary')}, "
        "whose positions are relative."
      )

  def computing_in(self, dtype: str) -> "ModelConfig":
    """Returns this config with another compute dtype. Raises an error if the dtype is unknown."""
    changed: dict[str, Any] = {"dtype": dtype}
    return dataclasses.replace(self, **changed)

  @property
  def traits(self) -> Traits:
    """Traits of the family."""
    return FAMILIES[self.family]

  @property
  def head_dim(self) -> int:
    """Size of an attention head."""
    return self.head_size or self.width // self.num_heads

  @property
  def key_heads(self) -> int:
    """Number of key heads, and of value heads."""
    return self.num_kv_heads or self.num_heads

  @property
  def is_grouped(self) -> bool:
    """Whether several attention heads share a key head."""
    return self.key_heads < self.num_heads

  @property
  def rotary_base(self) -> float:
    """Base of the rotary wavelengths."""
    return self.rope_base or ROPE_BASE


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class AdapterConfig:
  """Low-rank adapters (LoRA, Hu et al. 2021), which tune a trained model that stays unchanged.

  The trained product of two small matrices is added to a matrix of every layer.
  """

  rank: NonNegativeInt = 0
  """Rank of the product, e.g. 16; 0: no adapters, so training changes all parameters. A run with
  adapters needs --init_from."""
  alpha: PositiveFloat = 16.0
  """The product is multiplied by `alpha` / `rank`, so that runs of different ranks can have the
  same learning rate."""
  targets: tuple[Matrix, ...] = ()
  """Matrices of a layer that get adapters, e.g. ("q", "v"): those of attention are q, k, v and out,
  those of the feed-forward layer up, gate (not in `opt`) and down. () means all."""

  def __post_init__(self) -> None:
    if len(set(self.targets)) < len(self.targets):
      raise ValueError(f"targets is {self.targets}; each matrix must occur only once.")

  def matrices(self, model: ModelConfig) -> tuple[Matrix, ...]:
    """Returns the matrices of a layer that get adapters, in the order of the layer.

    Raises:
      ValueError: a layer of the model has no such matrix, or `rank` is larger than its width.
    """
    present: tuple[Matrix, ...] = ("q", "k", "v", "out", "up", "gate", "down")
    present = tuple(name for name in present if name != "gate" or model.traits.gated)
    if absent := [name for name in self.targets if name not in present]:
      raise ValueError(
        f"adapter.targets names '{absent[0]}', but the layers of family '{model.family}' have "
        f"{', '.join(present)}."
      )
    if self.rank > model.width:
      raise ValueError(
        f"adapter.rank is {self.rank}; it must be at most model.width = {model.width}."
      )
    return tuple(name for name in present if name in self.targets or not self.targets)


def _with(trait: str) -> str:
  """Returns the names of the families that have a trait, for messages."""
  return " or ".join(f"'{name}'" for name, traits in FAMILIES.items() if getattr(traits, trait))

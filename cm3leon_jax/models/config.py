"""Size and variant of the decoder."""

import dataclasses

FAMILIES = ("opt", "modern")
DTYPES = ("float32", "bfloat16", "float64")
REMAT_POLICIES = ("none", "minimal", "save_qkv", "save_attention", "offload", "full")
ATTENTIONS = ("auto", "plain", "splash", "triton")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder-only transformer; the defaults are CM3Leon-7B (Table 3; heads and feed-forward from OPT's table).

  Attributes:
    family: `opt` (the paper): pre-LayerNorm without parameters, learned positions, ReLU, no biases, tied
      embeddings. `modern`: RMSNorm, RoPE, SwiGLU, query-key norm, untied embeddings.
    mlp_width: width of the feed-forward layer.
    max_positions: longest sample that the learned positions cover.
    vocab_size: text and image ids together.
    query_key_norm: RMSNorm of every head's queries and keys, for stability; `modern` has it in any case.
    init_std: of the truncated normal that parameters start from (the paper's; at width 4,096. A network of another
      width starts alike at init_std x sqrt(4,096 / width)).
    embed_std: the same of the token embeddings.
    dtype: of activations and of the parameters while they are used; parameters are stored in float32. float64 (with
      JAX_ENABLE_X64) is for comparisons with other implementations.
    remat_policy: what of a layer, beside its input, is kept for the backward pass; the rest is computed again. From most memory
      to least: `none` everything; `minimal` queries, keys, values, attention's result, the feed-forward's inner product (all
      that is left to do again is attention's output projection); `save_qkv` the first four of these; `save_attention`
      attention's result and the stream behind it; `offload` these two in the host's memory (TPU); `full` nothing.
    attention: `plain` on any device; `splash`, the Pallas kernel of TPUs; `triton`, the Pallas kernel of GPUs; `auto` the
      one of the mesh's devices.
    loss_chunk: tokens of a row whose logits exist at the same time in the loss.
  """

  family: str = "opt"
  vocab_size: int = 64_512
  num_layers: int = 32
  width: int = 4_096
  num_heads: int = 32
  mlp_width: int = 16_384
  max_positions: int = 4_096
  query_key_norm: bool = False
  init_std: float = 0.006
  embed_std: float = 0.006
  dtype: str = "bfloat16"
  remat_policy: str = "full"
  attention: str = "auto"
  loss_chunk: int = 256

  def __post_init__(self):
    for field, allowed in (
      ("family", FAMILIES),
      ("dtype", DTYPES),
      ("remat_policy", REMAT_POLICIES),
      ("attention", ATTENTIONS),
    ):
      if getattr(self, field) not in allowed:
        raise ValueError(
          f"{field} is '{getattr(self, field)}'; it must be one of {', '.join(allowed)}."
        )
    for field in (
      "vocab_size",
      "num_layers",
      "width",
      "num_heads",
      "mlp_width",
      "max_positions",
      "loss_chunk",
    ):
      if getattr(self, field) < 1:
        raise ValueError(f"{field} is {getattr(self, field)}; it must be positive.")
    for field in ("init_std", "embed_std"):
      if getattr(self, field) <= 0:
        raise ValueError(f"{field} is {getattr(self, field)}; it must be positive.")
    if self.width % self.num_heads:
      raise ValueError(f"num_heads = {self.num_heads} does not divide width = {self.width}.")
    if self.family == "modern" and self.head_dim % 2:
      raise ValueError(
        f"width / num_heads = {self.head_dim} is odd; rotary positions need an even head size."
      )

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

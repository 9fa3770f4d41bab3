"""Implements the decoder. NNX modules define the parameters; JAX transforms take them as a dict."""

# B batch, L length, D width, N heads, G key heads, H head size, F feed-forward, V vocabulary, C
# image codes, d code width.

from collections.abc import Callable, Container, Iterator
import functools
from typing import Any, TypeAlias

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from cm3leon_jax.config.model import ROPE_BASE, ModelConfig, RematPolicy
from cm3leon_jax.mesh import gathered, spec
from cm3leon_jax.models import attention, nnx_params, products

# Standard deviation of the initial learned positions, divided by init_std: 0.0002 / 0.006 (CM3Leon,
# section 2.3).
POSITION_RATIO = 1 / 30
LOOKED_UP = ("embed", "positions")  # Tables from which `look_up` reads rows.
# Activations of the feed-forward layer of `opt`.
ACTIVATIONS: dict[str, Callable] = {
  "": jax.nn.relu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
Ids: TypeAlias = Int32[Array, "B L"]
Stream: TypeAlias = Float[Array, "B L D"]
Vectors: TypeAlias = Float[Array, "*batch D"]
# Consecutive layers, stacked, with their adapters. `{}`: these layers are frozen.
Segments: TypeAlias = list[tuple["Block", dict | None]]
Layer: TypeAlias = Callable[["Stream", tuple["Block", dict | None]], tuple["Stream", None]]


def _param(
  rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float
) -> nnx.Param:
  sample = jax.random.truncated_normal(
    rngs.params(), -3.0, 3.0, shape, jnp.float32, out_sharding=spec(*axes)
  )
  return nnx.Param(std * sample)


def normalize(x: Vectors, eps: float, center: bool) -> Vectors:
  """Applies LayerNorm (if `center`) or RMSNorm in fp32, without parameters."""
  x32 = x.astype(attention.wide(x.dtype))
  if center:
    x32 = x32 - x32.mean(-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + eps)).astype(x.dtype)


class Norm(nnx.Module):
  """Normalization of vectors [D], or of the vectors [N, H] of heads. See `apply_norm`."""

  def __init__(self, shape: tuple[int, ...], eps: float, biased: bool = False):
    """`shape` is the shape of the scale and, if `biased`, of the bias; () means neither."""
    self.eps = eps
    axes = spec(*("heads", "head_dim")[-len(shape) :])
    self.scale = nnx.Param(jnp.ones(shape, jnp.float32, out_sharding=axes)) if shape else None
    self.bias = nnx.Param(jnp.zeros(shape, jnp.float32, out_sharding=axes)) if biased else None

  def __call__(self, x: Vectors) -> Vectors:
    return apply_norm(nnx.to_pure_dict(nnx.state(self, nnx.Param)), x, self.eps)


def apply_norm(params: dict, x: Vectors, eps: float) -> Vectors:
  """Normalizes the last axis of `x` with the parameters of a `Norm`.

  With a scale, it is RMSNorm; with a scale and a bias, LayerNorm. Without parameters, it is
  LayerNorm with an eps of 1e-5.
  """
  if not params:
    return normalize(x, 1e-5, center=True)
  params = {
    name: w.astype(x.dtype).reshape((1,) * (x.ndim - w.ndim) + w.shape)
    for name, w in params.items()
  }
  x = normalize(x, eps, center="bias" in params) * params["scale"]
  return x + params["bias"] if "bias" in params else x


def _stream_norm(config: ModelConfig) -> Norm:
  return Norm((config.width,) if config.traits.scaled_norms else (), config.traits.norm_eps)


def rotate(
  x: Float[Array, "B L N H"], positions: Ids, base: float = ROPE_BASE
) -> Float[Array, "B L N H"]:
  """Rotates the pairs (x[i], x[i + H / 2]) by their positions (RoPE, Su et al. 2021)."""
  half, wide = x.shape[-1] // 2, attention.wide(x.dtype)
  frequencies = base ** (-jnp.arange(half, dtype=wide) / half)
  angles = positions[..., None, None].astype(wide) * frequencies[None, None, None]
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  a, b = (part.astype(wide) for part in (x[..., :half], x[..., half:]))
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nnx.Module):
  """One layer, which starts as the identity if its output projections start at 0 (section 2.3)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    D, N, H, F = config.width, config.num_heads, config.head_dim, config.mlp_width
    heads = "embed", "heads", "head_dim"
    std, traits = config.init_std, config.traits
    out_std = 0.0 if traits.starts_as_identity else std
    self.norm1, self.norm2 = _stream_norm(config), _stream_norm(config)
    if config.is_grouped:
      self.q = _param(rngs, (D, N, H), heads, std)
      self.kv = _param(rngs, (2, D, config.key_heads, H), (None, *heads), std)
    else:
      self.qkv = _param(rngs, (3, D, N, H), (None, *heads), std)
    self.out = _param(rngs, (N, H, D), ("heads", "head_dim", "embed"), out_std)
    self.up = _param(rngs, (D, F), ("embed", "mlp"), std)
    self.down = _param(rngs, (F, D), ("mlp", "embed"), out_std)
    if traits.gated:
      self.gate = _param(rngs, (D, F), ("embed", "mlp"), std)
    if traits.head_norms or config.query_key_norm:
      biased = traits.biased_head_norms
      shapes = ((N, H), (config.key_heads, H)) if biased else ((H,), (H,))
      self.q_norm, self.k_norm = (Norm(shape, traits.norm_eps, biased) for shape in shapes)

  def __call__(
    self, x: Stream, positions: Ids, attend: Callable, adapters: dict | None = None
  ) -> Stream:
    params = nnx.to_pure_dict(nnx.state(self, nnx.Param))
    return apply_block(self.config, params, x, positions, attend, adapters)


def apply_block(
  config: ModelConfig,
  params: dict,
  x: Stream,
  positions: Ids,
  attend: Callable,
  adapters: dict | None = None,
) -> Stream:
  """Applies one layer to the residual stream `x`.

  `params` are a `Block`'s parameters as a dict, in which "qkv" may be one array or three arrays.
  `positions` are the positions of tokens in their samples. `attend` maps q [B, L, N, H], k and v
  [B, L, G, H] to the attention output [B, L, N, H]. In decoding, it also reads and writes a cache.
  `adapters` are the layer's adapters, see `adapters.scaled`.
  """
  rows = ("batch", "length")
  heads, mlp, act = (*rows, "heads", "head_dim"), (*rows, "mlp"), (*rows, "act")

  def product(
    name: str, equation: str, x: Array, w: Array | products.Transposed, axes: tuple[str, ...]
  ) -> Array:
    w = jax.tree.map(lambda w: gathered(w.astype(x.dtype)), w)
    if adapters is None:
      return products.product(equation, x, w, axes)
    y = jnp.einsum(equation, x, w, out_sharding=spec(*axes))  # The matrix has no gradient.
    if name not in adapters:
      return y
    # The factors are small, so devices exchange them, and sum their gradients, in fp32.
    a, b = (gathered(adapters[name][factor]).astype(x.dtype) for factor in "ab")
    into, outof = low_rank(equation)
    inner = jnp.einsum(into, x, a, out_sharding=spec(*rows, "rank"))
    return y + jnp.einsum(outof, inner, b, out_sharding=spec(*axes))

  def norm(name: str, x: Vectors, applied: bool = True) -> Vectors:
    return apply_norm(params.get(name, {}), x, config.traits.norm_eps) if applied else x

  swin = config.swin_norm
  h = norm("norm1", x, not swin)
  q, k, v = (
    checkpoint_name(product(name, "BLD,DNH->BLNH", h, w, heads), "qkv")
    for name, w in zip("qkv", projections(params))
  )
  if "q_norm" in params:
    q, k = norm("q_norm", q), norm("k_norm", k)
  if config.traits.rotary:
    q, k = (rotate(x, positions, config.rotary_base) for x in (q, k))
  # The order of the letters matters: einsum contracts them in alphabetical order, uppercase first.
  # With `H`, which sorts before N, XLA would transpose the matrix first.
  h = product("out", "BLNh,NhD->BLD", attend(q, k, v), params["out"], act)
  x = checkpoint_name(x + norm("norm1", h, swin), "middle")
  h = norm("norm2", x, not swin)
  up = checkpoint_name(product("up", "BLD,DF->BLF", h, params["up"], mlp), "mlp")
  if config.traits.gated:
    gate = checkpoint_name(product("gate", "BLD,DF->BLF", h, params["gate"], mlp), "mlp")
    up = up * jax.nn.silu(gate)
  else:
    up = ACTIVATIONS[config.activation](up)
  return x + norm("norm2", product("down", "BLF,FD->BLD", up, params["down"], act), swin)


def projections(params: dict) -> Iterator[Float[Array, "..."]]:
  """Yields the matrices of queries, keys and values of a layer."""
  yield from params["qkv"] if "qkv" in params else (params["q"], *params["kv"])


def places(params: Container[str]) -> list[tuple[str, tuple[int, ...]]]:
  """Returns where a layer stores the matrices of queries, keys and values: (parameter, index)."""
  if "qkv" in params:
    return [("qkv", (i,)) for i in range(3)]
  return [("q", ()), ("kv", (0,)), ("kv", (1,))]


def low_rank(equation: str) -> tuple[str, str]:
  """Splits the product with a matrix into the products with its two factors of rank r.

  low_rank("BLD,DNH->BLNH") = ("BLD,Dr->BLr", "BLr,rNH->BLNH")
  """
  factors, result = equation.split("->")
  x, w = factors.split(",")
  ins, outs = ("".join(c for c in w if (c in x) == shared) for shared in (True, False))
  return f"{x},{ins}r->BLr", f"BLr,r{outs}->{result}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: Float[Array, "V D"], ids: Ids, dtype: str) -> Stream:
  """Looks up rows of a table in `dtype`, but sums the gradient of the table in fp32.

  The gradient of a token's row is a sum over all occurrences of the token, on all devices. In
  bfloat16, this sum has an error of 4 to 10% for a token that occurs 770 times. `table` has the
  sharding in which it is stored. The table is gathered over fsdp in `dtype`.
  """
  return _rows(table.astype(dtype), ids)


def _rows(table: Float[Array, "V D"], ids: Ids) -> Stream:
  # Gathering the fsdp shards first prevents XLA from materializing the whole table on each device.
  # The table's rows remain sharded over `tensor`.
  return gathered(table).at[ids].get(out_sharding=spec("batch", "length", "act"))


def _look_up_forward(
  table: Float[Array, "V D"], ids: Ids, dtype: str
) -> tuple[Stream, tuple[Array, Array]]:
  return look_up(table, ids, dtype), (table, ids)


def _look_up_backward(
  dtype: str, kept: tuple[Array, Array], cotangent: Stream
) -> tuple[Float[Array, "V D"], None]:
  table, ids = kept
  wide = attention.wide(table.dtype)
  _, transposed = jax.vjp(functools.partial(_rows, ids=ids), table.astype(wide))
  return transposed(cotangent.astype(wide))[0].astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Transformer(nnx.Module):
  """Decoder: embeddings, blocks (stacked along a leading layer axis), final norm, output table."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.embed = _param(
      rngs, (config.vocab_size, config.width), ("vocab_stored", None), config.embed_std
    )
    self.blocks = jax.vmap(functools.partial(Block, config))(rngs.split(config.num_layers))
    self.final_norm = _stream_norm(config)
    if not config.traits.rotary:
      self.positions = _param(
        rngs,
        (config.max_positions, config.width),
        (None, "embed"),
        POSITION_RATIO * config.init_std,
      )
    if not config.traits.tied:
      self.head = _param(
        rngs, (config.vocab_size, config.width), ("vocab_stored", None), config.init_std
      )
      if config.tied_start:
        self.head = nnx.Param(self.embed[...] * (config.init_std / config.embed_std))

  def embed_tokens(self, tokens: Ids, positions: Ids) -> Stream:
    """Returns token embeddings, plus learned positions if any, in the compute dtype."""
    x = look_up(self.embed[...], tokens, self.config.dtype)
    if not self.config.traits.rotary:
      x = x + look_up(self.positions[...], positions, self.config.dtype)
    return x

  def stored_table(self) -> Float[Array, "V D"]:
    """Returns the output table in the compute dtype, with the sharding in which it is stored.

    If embeddings are tied, it is also the input table.
    """
    return (self.embed if self.config.traits.tied else self.head)[...].astype(
      jnp.dtype(self.config.dtype)
    )

  def output_table(self) -> Float[Array, "V D"]:
    """Returns the output table in the compute dtype, sharded only over `tensor`."""
    return gathered(self.stored_table())

  def __call__(
    self, tokens: Ids, positions: Ids, segment_ids: Ids, adapters: dict | None = None,
    segments: Segments | None = None,
  ) -> Stream:  # fmt: skip
    """Computes the hidden states of packed rows, after the final norm.

    The logits are `hidden @ output_table().T`. `positions` are the positions of tokens in their
    samples. Tokens attend only to tokens with the same segment id; segment id 0 is padding.
    `adapters` are added to the layers' matrices, see `adapters.scaled`. `segments` replace the
    layers and their adapters.
    """
    attend = functools.partial(
      attention.row_attention, self.config.attention, segment_ids=segment_ids
    )

    def layer(x: Stream, scanned: tuple[Block, dict | None]) -> tuple[Stream, None]:
      block, factors = scanned
      return block(checkpoint_name(x, "input"), positions, attend, factors), None

    x = self.embed_tokens(tokens, positions)
    for scanned in segments or [(self.blocks, adapters)]:
      x, _ = jax.lax.scan(
        _checkpointed(layer, self.config.remat_policy), x, scanned, unroll=self.config.unroll_layers
      )
    return self.final_norm(x)


# Maps a remat policy to the activations that it saves in addition to "input". "middle" is the
# residual stream between attention and feed-forward. "mlp" is the hidden feed-forward layer before
# the activation function.
KEPT: dict[RematPolicy, tuple[str, ...]] = {
  "full": (),
  "save_attention": ("attention", "middle"),
  "save_qkv": ("qkv", "attention"),
  "minimal": ("qkv", "attention", "mlp"),
}


def _checkpointed(layer: Layer, policy: RematPolicy) -> Layer:
  if policy == "none":
    return layer
  if policy == "offload":
    keep = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=list(KEPT["save_attention"]),
      offload_src="device",
      offload_dst="pinned_host",
    )
  else:
    keep = jax.checkpoint_policies.save_only_these_names(*KEPT[policy])
  return jax.checkpoint(layer, policy=keep)


def logits(hidden: Stream, table: Float[Array, "V D"]) -> Float[Array, "B L V"]:
  """Computes fp32 logits from hidden states and the output table, sharded over `tensor`."""
  out: dict[str, Any] = {
    "preferred_element_type": attention.wide(hidden.dtype),
    "out_sharding": spec("batch", "length", "vocab"),
  }
  return jnp.einsum("BLD,VD->BLV", hidden, table, **out)


@functools.cache
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
  return nnx_params.structure(lambda: Transformer(config, nnx.Rngs(0)))


def init_params(config: ModelConfig, key: Key[Array, ""]) -> dict:
  """Initializes fp32 parameters as a dict, sharded over the current mesh (`jax.set_mesh`)."""
  return nnx_params.to_dict(nnx.state(Transformer(config, nnx.Rngs(params=key)), nnx.Param))


def bind(config: ModelConfig, params: dict) -> Transformer:
  """Returns the module with these parameters. It is cheap enough for jitted functions."""
  return nnx_params.fill(*_structure(config), params)


def count_params(params: dict) -> int:
  """Counts the parameters in a dict."""
  return sum(x.size for x in jax.tree.leaves(params))

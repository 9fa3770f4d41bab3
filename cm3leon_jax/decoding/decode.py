"""The programs of decoding: prefill that reads what prompts share once, and a loop of guided steps over a static cache."""

# B prompts' samples, S guidance streams, R = B x S rows, U unique prompts, G tokens that are generated, T cache slots,
# L tokens that are read at once, D width, V vocabulary, I tokens of an image.

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.decoding import weights as weights_lib
from cm3leon_jax.decoding.cache import LayerCache
from cm3leon_jax.decoding.grammar import Grammar, State
from cm3leon_jax.decoding.guidance import combine_streams
from cm3leon_jax.decoding.sampling import SamplingConfig, SamplingValues, sample, select
from cm3leon_jax.decoding.weights import Weights
from cm3leon_jax.mesh import shard, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.attention import wide
from cm3leon_jax.models.config import ModelConfig


class Prompts(NamedTuple):
  """Left-padded prompts, each without its last token, as prefixes that some of them share and the rest of each.

  Attributes:
    prefixes: ([U0, P0] int32 ids, [U0, P0] bool: which are real), or None if nothing is shared.
    rests: ([U, P] int32, [U, P] bool).
    prefix_of: [U] int32, the prefix before each rest.
    row: [R] int32, the unique prompt of each row; a sample's streams stand side by side.
    last: [R] int32, the last token of each row's prompt.
  """

  prefixes: tuple[jax.Array, jax.Array] | None
  rests: tuple[jax.Array, jax.Array]
  prefix_of: jax.Array
  row: jax.Array
  last: jax.Array

  @property
  def slots(self) -> int:
    """Of the cache, that prefixes and rests take."""
    return self.rests[0].shape[1] + (0 if self.prefixes is None else self.prefixes[0].shape[1])


class Control(NamedTuple):
  """What B samples are drawn by.

  Attributes:
    plan: [B, M, 3] int32 of `grammar.plan_array`.
    guidance: [B, I + 1, S] fp32, weights of the streams for each token of an image, and at the end for text.
    seeds: [B] uint32; a sample's result depends on its own only.
    contrastive: [B] bool, which samples are drawn by contrastive decoding.
    values: settings of the sampler that may change without compiling again.
  """

  plan: jax.Array
  guidance: jax.Array
  seeds: jax.Array
  contrastive: jax.Array
  values: SamplingValues


class Loop(NamedTuple):
  """What decoding carries from step to step.

  Attributes:
    tokens: [R] int32, the last token of each row, not yet read.
    lengths: [R] int32, its position.
    cache: of each layer and stream, B rows and T slots; T is the stream's own, for its prompts may be short.
    seen: of each stream [B, T] bool, slots that a row may look at.
    slots: [S] int32, where in each stream's cache the next token is written.
    count: int32 scalar, tokens generated.
    going: bool scalar, some sample is not over.
    state: of the grammar, B rows.
    ids: [B, G] int32, padding where a sample is over.
    log_probs: [B, G] fp32, of each id under the guided distribution, before temperature and filters; 0 at padding.
  """

  tokens: jax.Array
  lengths: jax.Array
  cache: tuple[tuple[LayerCache, ...], ...]
  seen: tuple[jax.Array, ...]
  slots: jax.Array
  count: jax.Array
  going: jax.Array
  state: State
  ids: jax.Array
  log_probs: jax.Array


class Sampler(NamedTuple):
  """What of a `SamplingConfig` is compiled into the program.

  Attributes:
    of_codes: candidates of draws among image codes, as in `sampling.filter_candidates`.
    of_all: candidates of draws in a batch where texts are written, too.
    contrastive_k: of CD-K; 0: no row is drawn by it.
  """

  of_codes: int
  of_all: int
  contrastive_k: int

  @classmethod
  def of(cls, config: SamplingConfig) -> "Sampler":
    k = 0 if config.method == "top_p" else config.contrastive_k
    return cls(
      config.candidates(image=True, text=False), config.candidates(image=True, text=True), k
    )


def extend(config: ModelConfig, params, tokens, positions, attend: Callable):
  """Reads L more tokens a row.

  Args:
    config: of the model.
    params: of `Weights`.
    tokens: [R, L] int32.
    positions: [R, L] int32, index of each token in its sample.
    attend: (layer, q, k, v), each [R, L, N, H] -> [R, L, N, H]; keeps k and v.

  Returns:
    Hidden states after the final norm [R, L, D].
  """
  model = transformer.bind(config, {**params, "blocks": {}})
  x = model.embed_tokens(tokens, positions)
  for i, block in enumerate(params["blocks"]):
    block = weights_lib.dequantized(block, x.dtype)
    x = transformer.apply_block(config, block, x, positions, functools.partial(attend, i))
  return model.final_norm(x)


def _read(config, params, tokens, valid, cache, seen, lengths, slot: int):
  """Reads left-padded tokens [U, L] into slots [slot, slot + L). Returns (cache, seen, lengths) after them."""
  positions = lengths[:, None] + jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
  seen = jnp.concatenate([seen[:, :slot], valid, seen[:, slot + tokens.shape[1] :]], axis=1)
  ends = slot + jnp.arange(tokens.shape[1])
  # A padding query sees only masked keys: a uniform average, finite, and never read.
  mask = seen[:, None, None, :] & (jnp.arange(seen.shape[1])[None] <= ends[:, None])[None, None]
  layers = list(cache)

  def attend(i, q, k, v):
    layers[i] = layers[i].write(slot, k, v)
    return layers[i].attend(q, mask)

  extend(config, params, tokens, positions, attend)
  return tuple(layers), seen, lengths + valid.sum(axis=1, dtype=jnp.int32)


def _rows(x, index):
  return x.at[index].get(out_sharding=spec("batch", *[None] * (x.ndim - 1)))


def prefill(config: ModelConfig, params, prompts: Prompts, cache_dtype: str = "compute"):
  """Reads every prefix and every rest once.

  Args:
    config: of the model.
    params: of `Weights`.
    prompts: U and U0 must divide by the devices that the batch is split over.
    cache_dtype: of `cache.DTYPES`.

  Returns:
    (cache of each layer, U rows and T = `prompts.slots` slots; seen [U, T] bool; lengths [U] int32).
  """
  tokens, valid = (shard(x, "batch", None) for x in prompts.rests)
  count, length = tokens.shape
  if prompts.prefixes is None:
    start, lengths = 0, shard(jnp.zeros(count, jnp.int32), "batch")
    cache, seen = cache_lib.empty(config, count, length, cache_dtype), jnp.zeros_like(valid)
  else:
    shared, shared_valid = (shard(x, "batch", None) for x in prompts.prefixes)
    start, cache = shared.shape[1], cache_lib.empty(config, *shared.shape, cache_dtype)
    nothing = shard(jnp.zeros(len(shared), jnp.int32), "batch")
    cache, seen, lengths = _read(
      config, params, shared, shared_valid, cache, jnp.zeros_like(shared_valid), nothing, 0
    )
    cache = cache_lib.rows(cache, prompts.prefix_of, start, start + length)
    seen, lengths = (
      jnp.pad(_rows(seen, prompts.prefix_of), ((0, 0), (0, length))),
      _rows(lengths, prompts.prefix_of),
    )
  return _read(config, params, tokens, valid, cache, seen, lengths, start)


def begin(
  params,
  prompts: Prompts,
  plan,
  *,
  config,
  grammar: Grammar,
  longest: int,
  room: int,
  widths: tuple[int, ...],
  cache_dtype="compute",
) -> Loop:
  """Prefill. Needs a mesh.

  Args:
    params: of `Weights`.
    prompts: of B x S rows.
    plan: as in `Control`.
    config: of the model.
    grammar: what `plan` is written in.
    longest: G.
    room: tokens behind the prompt that the cache has slots for, until it grows.
    widths: of each stream, of how many of the last slots of the prompts its cache is made.
    cache_dtype: of `cache.DTYPES`.
  """
  cache, seen, lengths = prefill(config, params, prompts, cache_dtype)
  unique = prompts.row.reshape(-1, len(widths))
  streams = [
    cache_lib.rows(cache, unique[:, s], width, width + room) for s, width in enumerate(widths)
  ]
  plan = shard(plan, "batch", None, None)
  full = lambda fill, dtype: jnp.full(
    (len(plan), longest), fill, dtype, out_sharding=spec("batch", None)
  )
  return Loop(
    tokens=shard(prompts.last, "batch"),
    lengths=_rows(lengths, prompts.row),
    cache=tuple(zip(*streams)),
    seen=tuple(
      jnp.pad(_rows(seen, unique[:, s])[:, -width:], ((0, 0), (0, room)))
      for s, width in enumerate(widths)
    ),
    slots=jnp.array(widths, jnp.int32),
    count=jnp.int32(0),
    going=jnp.bool_(True),
    state=grammar.start(plan),
    ids=full(grammar.vocab.pad, jnp.int32),
    log_probs=full(0, jnp.float32),
  )


def over_streams(layers: list[list[LayerCache]], masks, write: Callable) -> Callable:
  """What `extend` attends by when each of S streams has a cache of its own.

  Args:
    layers: caches of each layer and stream, replaced by what is written.
    masks: of each stream, as in `LayerCache.attend`.
    write: (cache, stream, k, v) -> cache, with k and v [B, L, N, H].

  Returns:
    (layer, q, k, v), each [R, L, N, H], a sample's streams side by side -> [R, L, N, H].
  """
  streams, heads = len(masks), ("length", "heads", "head_dim")

  def attend(i, q, k, v):
    apart = lambda x: jnp.reshape(
      x, (-1, streams, *x.shape[1:]), out_sharding=spec("batch", None, *heads)
    )
    q, k, v, out = apart(q), apart(k), apart(v), []
    for s, mask in enumerate(masks):
      layers[i][s] = write(layers[i][s], s, k[:, s], v[:, s])
      out.append(layers[i][s].attend(q[:, s], mask))
    out = jnp.stack(out, axis=1)
    return jnp.reshape(out, (-1, *out.shape[2:]), out_sharding=spec("batch", *heads))

  return attend


def _step(config, params, loop: Loop):
  """Reads the last token of each row. Returns (hidden [R, 1, D], cache, seen)."""
  mark = lambda x, slot: jax.lax.dynamic_update_slice_in_dim(
    x, jnp.ones_like(x[:, :1]), slot, axis=1
  )
  seen = tuple(mark(x, loop.slots[s]) for s, x in enumerate(loop.seen))
  layers = [list(layer) for layer in loop.cache]
  write = lambda cache, s, k, v: cache.write(loop.slots[s], k, v)
  attend = over_streams(layers, [x[:, None, None, :] for x in seen], write)
  hidden = extend(config, params, loop.tokens[:, None], loop.lengths[:, None], attend)
  return hidden, tuple(map(tuple, layers)), seen


def _draw(
  weights: Weights, control: Control, state, hidden, keys, grammar: Grammar, sampler: Sampler
):
  """Guided draw of one id a sample from hidden [R, 1, D]. Returns (ids [B] int32, log_probs [B])."""
  batch, _, streams = control.guidance.shape
  in_image, active = grammar.in_image(control.plan, state), grammar.active(control.plan, state)
  place = jnp.where(
    in_image,
    jnp.minimum(grammar.codes_done(control.plan, state), grammar.image_tokens - 1),
    grammar.image_tokens,
  )
  of_streams = jax.vmap(lambda row, i: row[i])(control.guidance, place)

  def draw_from(head, candidates, is_image, legal=None):
    axis = weights_lib.head_axis(head.shape[1])
    out = jnp.einsum(
      "BLD,DR->BLR",
      hidden,
      head,
      preferred_element_type=wide(hidden.dtype),
      out_sharding=spec("batch", "length", axis),
    )
    out = jnp.reshape(
      out, (batch, streams, head.shape[1]), out_sharding=spec("batch", None, axis)
    ).swapaxes(0, 1)
    logits = (shard(x, "batch", None) for x in (combine_streams(out, of_streams), out[0], out[-1]))
    guided, full, none = (
      logits if legal is None else (jnp.where(legal, x, -jnp.inf) for x in logits)
    )
    rows = select(is_image, control.contrastive, control.values)
    streams_alone = (
      {"expert": full, "amateur": none, "contrastive_k": sampler.contrastive_k}
      if sampler.contrastive_k
      else {}
    )
    return sample(guided, keys, rows, candidates, **streams_alone)

  def among_codes():
    ids, log_probs = draw_from(weights.image_head, sampler.of_codes, jnp.ones_like(in_image))
    return ids + grammar.vocab.text_size, log_probs

  def among_all():
    # Every id is legal for a sample that is over: what is drawn is not kept, and a softmax of nothing would be nan.
    legal = (
      grammar.legal(control.plan, state, weights_lib.head_ids(grammar.vocab)) | ~active[:, None]
    )
    columns, log_probs = draw_from(weights.head, sampler.of_all, in_image, legal)
    return (columns + grammar.vocab.text_size) % grammar.vocab.size, log_probs

  if weights.image_head is None:
    return among_all()
  return jax.lax.cond(jnp.all(in_image | ~active), among_codes, among_all)


def advance(
  weights: Weights,
  control: Control,
  loop: Loop,
  *,
  config,
  grammar: Grammar,
  sampler: Sampler,
  steps: int,
) -> Loop:
  """At most `steps` more tokens of every sample, fewer if all samples are over or the cache is full.

  Needs a mesh; `loop` is used up.

  While only image codes are legal in all samples, only the image rows of the output table are computed.
  """
  streams = control.guidance.shape[2]
  shards = lambda x: shard(x, *["batch"] + [None] * (x.ndim - 1))
  control = Control(*(shards(x) for x in control[:4]), control.values)
  keys = jax.vmap(jax.random.key)(control.seeds)
  free = loop.seen[0].shape[1] - loop.slots[0]  # As much in every stream.
  stop = jnp.minimum(loop.count + jnp.minimum(steps, free), loop.ids.shape[1])

  def go_on(loop: Loop):
    return (loop.count < stop) & loop.going

  def step(loop: Loop):
    hidden, cache, seen = _step(config, weights.params, loop)
    active = grammar.active(control.plan, loop.state)
    now = jax.vmap(jax.random.fold_in, (0, None))(keys, loop.count)
    ids, log_probs = _draw(weights, control, loop.state, hidden, now, grammar, sampler)
    ids, log_probs = jnp.where(active, ids, grammar.vocab.pad), jnp.where(active, log_probs, 0)
    repeat = lambda x: jnp.repeat(
      x, streams, total_repeat_length=len(loop.tokens), out_sharding=spec("batch")
    )
    put = lambda into, x: jax.lax.dynamic_update_slice_in_dim(
      into, x[:, None].astype(into.dtype), loop.count, axis=1
    )
    state = grammar.advance(control.plan, loop.state, ids)
    return Loop(
      tokens=repeat(ids),
      # A sample that is over stays where it is, lest it leave the learned positions.
      lengths=loop.lengths + repeat(active.astype(jnp.int32)),
      cache=cache,
      seen=seen,
      slots=loop.slots + 1,
      count=loop.count + 1,
      going=jnp.any(grammar.active(control.plan, state)),
      state=state,
      ids=put(loop.ids, ids),
      log_probs=put(loop.log_probs, log_probs),
    )

  return jax.lax.while_loop(go_on, step, loop)


def grow(loop: Loop, *, by: int) -> Loop:
  """More slots at the end of the cache: attention looks at all that are there, so there should not be many more than filled."""
  cache = tuple(tuple(cache_lib.grown(layer, by)) for layer in loop.cache)
  return loop._replace(cache=cache, seen=tuple(jnp.pad(x, ((0, 0), (0, by))) for x in loop.seen))


def outcome(loop: Loop):
  """(ids [B, G], log_probs [B, G]), whole on every device: of several processes each can read them."""
  return shard(loop.ids, None, None), shard(loop.log_probs, None, None)

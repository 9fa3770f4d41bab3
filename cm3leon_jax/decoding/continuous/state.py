"""Implements the state of a running batch and the admission of samples to its slots.

The caches of a batch are ring buffers. In each step, all slots write their next token to the same
entry of a stream's cache. After the last entry, writing continues at the first entry. Attention
does not depend on the order of entries. So the prompt of an admitted sample is written to the
entries just before the entry of the next token. A ring has enough entries for the longest prompt
and the tokens after it, so a sample is finished before its entries are overwritten.

  3 entries for prompts, 4 for generated tokens; b is admitted when the next entry is 5:
  a: p p p t t . .     entries 3 and 4 hold the first tokens of a
  b: . . p p p . .     the tokens of b will be written to entries 5, 6, 0 and 1
"""

# B slots, S guidance streams, R = B x S rows, J admitted samples, W entries for a stream's prompts,
# T entries of a stream's ring, C tokens of a chunk, M parts of a plan.

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int32, Shaped

from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.decoding.batch import Padded
from cm3leon_jax.decoding.cache import LayerCache, Layers
from cm3leon_jax.decoding.control import Control
from cm3leon_jax.decoding.grammar import State
from cm3leon_jax.decoding.loop import LoopState, Static, decode_step, read_padded, split_control
from cm3leon_jax.decoding.params import DecodeParams
from cm3leon_jax.mesh import shard, spec


class BatchState(NamedTuple):
  """State of a running batch between two chunks.

  Attributes:
    loop: the decoding state. Its `ids`, `log_probs` and `count` refer to the last chunk only.
    counts: number of tokens that the sample in each slot has so far.
  """

  loop: LoopState
  counts: Int32[Array, " B"]


class Admitted(NamedTuple):
  """Samples to be admitted to slots.

  Attributes:
    prompts: the prompts of each stream, without their last tokens.
    last, last_positions, next_positions: as in `batch.StreamPrompt`.
    plan: result of `grammar.plan_array`.
    slots: slot of each sample, counted within its shard of the batch. A number after the last slot
      means that the element is padding.
  """

  prompts: tuple[Padded, ...]
  last: Int32[Array, "J S"]
  last_positions: Int32[Array, "J S"]
  next_positions: Int32[Array, "J S"]
  plan: Int32[Array, "J M 3"]
  slots: Int32[Array, " J"]


def empty(*, static: Static, slots: int, steps: int) -> BatchState:
  """Makes a batch without samples. Needs a current mesh.

  The caches have capacity for all `static.max_new_tokens` generated tokens. `steps` is C, the
  largest number of steps of a chunk.
  """

  def full(value: int | bool, dtype: DTypeLike, *shape: int) -> Array:
    split = spec("batch", *[None] * (len(shape) - 1))
    return jnp.full(shape, value, dtype, out_sharding=split)

  capacities = [width + static.max_new_tokens for width in static.widths]
  caches = [cache_lib.empty(static.model, slots, n, static.cache_dtype) for n in capacities]
  count, pad = slots * len(capacities), static.grammar.vocab.pad
  loop = LoopState(
    tokens=full(pad, jnp.int32, count),
    positions=full(0, jnp.int32, count),
    next_positions=full(0, jnp.int32, count),
    cache=tuple(zip(*caches)),
    seen=tuple(full(False, bool, slots, n) for n in capacities),
    next_entries=jnp.array(static.widths, jnp.int32),
    count=jnp.int32(0),
    any_active=jnp.bool_(False),
    state=State(*(full(0, jnp.int32, slots) for _ in State._fields)),
    ids=full(pad, jnp.int32, slots, steps),
    log_probs=full(0, jnp.float32, slots, steps),
    divergence=full(0, jnp.float32, slots),
  )
  return BatchState(loop, full(0, jnp.int32, slots))


def _put(
  into: Shaped[Array, "B ..."], x: Shaped[Array, "J ..."], slots: Int32[Array, " J"]
) -> Shaped[Array, "B ..."]:
  """Writes the rows of `x` to the given slots of `into`, separately in each shard of the batch.

  `slots` is as in `Admitted`.
  """
  split = jax.typeof(into).sharding.spec

  def put(into: Array, x: Array, slots: Array) -> Array:
    return into.at[slots].set(x.astype(into.dtype), mode="drop")

  return jax.shard_map(put, in_specs=(split, split, spec("batch")), out_specs=split)(into, x, slots)


def _read_stream(
  static: Static, model: dict, prompts: Padded, end: Int32[Array, ""], capacity: int
) -> tuple[Layers, Bool[Array, "J T"]]:
  """Reads prompts into rings of `capacity` entries, so that they end directly before entry `end`.

  Returns (cache of each layer, mask of the entries that contain a token).
  """
  prompts = Padded(*(shard(x, "batch", None) for x in prompts))
  count, width = prompts.ids.shape
  start = cache_lib.empty(static.model, count, width, static.cache_dtype)
  cache, seen = read_padded(static.model, model, prompts, start, jnp.zeros_like(prompts.valid), 0)
  cache = cache_lib.grown(cache, capacity - width)

  cache = jax.tree.map(lambda x: jnp.roll(x, end - width, axis=2), cache)
  seen = jnp.pad(seen, ((0, 0), (0, capacity - width)))
  return cache, jnp.roll(seen, end - width, axis=1)


def admit(model: dict, state: BatchState, admitted: Admitted, *, static: Static) -> BatchState:
  """Reads the prompts of samples and puts the samples into slots of a batch. Needs a current mesh.

  `model` is `DecodeParams.model`. `state` is donated. J must be a multiple of the number of devices
  over which the batch is sharded.
  """
  loop, slots = state.loop, shard(admitted.slots, "batch")
  layers, seen_of = [list(layer) for layer in loop.cache], list(loop.seen)

  def put(into: Array, x: Array) -> Array:
    return _put(into, x, slots)

  for s, prompts in enumerate(admitted.prompts):
    capacity = seen_of[s].shape[1]
    cache, seen = _read_stream(static, model, prompts, loop.next_entries[s], capacity)
    for layer, new in zip(layers, cache):
      layer[s] = LayerCache(*jax.tree.map(put, layer[s], new))
    seen_of[s] = put(seen_of[s], seen)

  def put_streams(into: Int32[Array, " R"], x: Int32[Array, "J S"]) -> Int32[Array, " R"]:
    pairs = jnp.reshape(into, (-1, x.shape[1]), out_sharding=spec("batch", None))
    return jnp.reshape(put(pairs, shard(x, "batch", None)), into.shape, out_sharding=spec("batch"))

  plan = shard(admitted.plan, "batch", None, None)
  zeros = jnp.zeros_like(slots)
  loop = loop._replace(
    tokens=put_streams(loop.tokens, admitted.last),
    positions=put_streams(loop.positions, admitted.last_positions),
    next_positions=put_streams(loop.next_positions, admitted.next_positions),
    cache=tuple(map(tuple, layers)),
    seen=tuple(seen_of),
    state=State(*map(put, loop.state, static.grammar.start(plan))),
    divergence=put(loop.divergence, zeros),
  )
  return BatchState(loop, put(state.counts, zeros))


OF_ALL_SLOTS = ("next_entries", "count", "any_active")  # LoopState fields without a slot axis.


def _first(x: Shaped[Array, "_ ..."], count: int) -> Shaped[Array, "{count} ..."]:
  """Returns the first `count` elements of an array, with its sharding (see `Grammar.start`)."""
  return jax.sharding.reshard(x[:count], jax.typeof(x).sharding.spec)


def _first_slots(state: BatchState, slots: int) -> BatchState:
  """Returns the state of the first slots. Arrays of shape [R] have S elements per slot."""
  kept = {name: getattr(state.loop, name) for name in OF_ALL_SLOTS}
  without: dict[str, Any] = dict.fromkeys(kept)  # `jax.tree.map` skips None.
  split, count = state._replace(loop=state.loop._replace(**without)), len(state.counts)
  first = jax.tree.map(lambda x: _first(x, slots * (len(x) // count)), split)
  return first._replace(loop=first.loop._replace(**kept))


def _with_first_slots(state: BatchState, first: BatchState) -> BatchState:
  """Writes the state of the first slots back to the state of all slots."""

  def put(x: Array, part: Array) -> Array:
    # True for fields in OF_ALL_SLOTS: the shapes of the other fields differ.
    if x.shape == part.shape:
      return part
    return jax.lax.dynamic_update_slice_in_dim(x, part, 0, 0)

  return jax.tree.map(put, state, first)


def steps(
  params: DecodeParams,
  control: Control,
  state: BatchState,
  limit: Int32[Array, ""],
  *,
  static: Static,
  least: int,
  slots: int | None = None,
) -> BatchState:
  """Runs the steps of one chunk. Needs a current mesh.

  The chunk has at most `limit` <= C steps. After `least` steps, it ends as soon as a sample is
  finished, so that another sample can be admitted. In `control`, the plan of a slot without a
  sample is DONE. `state` is donated.

  If `slots` is not None, only the first `slots` slots are computed. Then no other slot may have a
  sample, and the batch must not be sharded over devices.
  """
  grammar = static.grammar
  ids = jnp.full_like(state.loop.ids, grammar.vocab.pad)
  log_probs = jnp.zeros_like(state.loop.log_probs)
  state = whole = state._replace(loop=state.loop._replace(ids=ids, log_probs=log_probs))
  control = split_control(control)
  if slots is not None:
    state = _first_slots(whole, slots)
    control = Control(*jax.tree.map(lambda x: _first(x, slots), control))
  keys, plan = jax.vmap(jax.random.key)(control.seeds), control.plan
  capacities = jnp.array([seen.shape[1] for seen in state.loop.seen], jnp.int32)
  began = grammar.active(plan, state.loop.state)

  def step(state: BatchState) -> BatchState:
    loop = decode_step(params, control, keys, state.loop, static=static, counts=state.counts)
    active = grammar.active(plan, loop.state)
    ended = jnp.any(began & ~active) & (loop.count >= least)
    entries = loop.next_entries % capacities
    loop = loop._replace(next_entries=entries, any_active=jnp.any(active) & ~ended)
    return BatchState(loop, state.counts + 1)

  loop = state.loop._replace(count=jnp.int32(0), any_active=jnp.any(began))
  state = jax.lax.while_loop(
    lambda state: (state.loop.count < limit) & state.loop.any_active,
    step,
    BatchState(loop, state.counts),
  )
  return state if slots is None else _with_first_slots(whole, state)

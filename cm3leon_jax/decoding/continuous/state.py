"""The state of a running batch: samples are admitted to its slots while the others go on.

The caches of a batch are rings. All slots write their next token into the same entry of a stream,
as in a batch that starts together; after the last entry of a full ring follows its first. The order
of entries means nothing to attention, so a prompt that is admitted is put into the entries before
the current one. A ring has as many entries as the longest prompt and what may follow it, so a
sample is finished before its first entry is written again.

  3 entries of prompt, 4 of tokens; b is admitted when the next entry is 5:
  a: p p p t t . .     entries 3 and 4 hold a's first tokens
  b: . . p p p . .     b's tokens go to entries 5, 6, 0 and 1
"""

# B slots, S guidance streams, R = B x S rows, J samples that are admitted, W entries of a stream's
# prompts, T entries of its ring, C tokens of a chunk, M parts of a plan.

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int32, Shaped

from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.decoding.batch import Padded
from cm3leon_jax.decoding.cache import LayerCache, Layers
from cm3leon_jax.decoding.control import Control
from cm3leon_jax.decoding.grammar import Grammar, State
from cm3leon_jax.decoding.loop import LoopState, decode_step, read_padded, split_control
from cm3leon_jax.decoding.params import DecodeParams
from cm3leon_jax.decoding.sampling.rows import Sampler
from cm3leon_jax.mesh import shard, spec
from cm3leon_jax.models.config import ModelConfig


class BatchState(NamedTuple):
  """State of a running batch between its chunks.

  Attributes:
    loop: its `ids` and `log_probs` are those of the last chunk, and its `count` the steps of it.
    counts: number of tokens that the sample of each slot has so far.
  """

  loop: LoopState
  counts: Int32[Array, " B"]


class Admitted(NamedTuple):
  """Samples that are admitted to slots.

  Attributes:
    prompts: of each stream, without their last tokens.
    last: last token of each stream's prompt.
    last_positions: position of that token.
    next_positions: position of the token after it.
    plan: of `grammar.plan_array`.
    slots: slot that each sample takes, counted in its own shard of the batch; a slot after the last
      one stands for no sample.
  """

  prompts: tuple[Padded, ...]
  last: Int32[Array, "J S"]
  last_positions: Int32[Array, "J S"]
  next_positions: Int32[Array, "J S"]
  plan: Int32[Array, "J M 3"]
  slots: Int32[Array, " J"]


def empty(
  *,
  config: ModelConfig,
  grammar: Grammar,
  slots: int,
  widths: tuple[int, ...],
  max_new_tokens: int,
  steps: int,
  cache_dtype: str = "compute",
) -> BatchState:
  """Makes a batch without samples. Needs a mesh.

  Args:
    config: of the model.
    grammar: of the plans.
    slots: B.
    widths: W of each stream.
    max_new_tokens: largest number of tokens of a sample.
    steps: C, the largest number of steps of a chunk.
    cache_dtype: one of `cache.DTYPES`.
  """

  def full(value: int | bool, dtype: DTypeLike, *shape: int) -> Array:
    split = spec("batch", *[None] * (len(shape) - 1))
    return jnp.full(shape, value, dtype, out_sharding=split)

  caches = [cache_lib.empty(config, slots, width + max_new_tokens, cache_dtype) for width in widths]
  count, pad = slots * len(widths), grammar.vocab.pad
  loop = LoopState(
    tokens=full(pad, jnp.int32, count),
    positions=full(0, jnp.int32, count),
    next_positions=full(0, jnp.int32, count),
    cache=tuple(zip(*caches)),
    seen=tuple(full(False, bool, slots, width + max_new_tokens) for width in widths),
    next_entries=jnp.array(widths, jnp.int32),
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
  """Replaces slots, each in its own shard of the batch; see `Admitted.slots`."""
  split = jax.typeof(into).sharding.spec

  def put(into: Array, x: Array, slots: Array) -> Array:
    return into.at[slots].set(x.astype(into.dtype), mode="drop")

  return jax.shard_map(put, in_specs=(split, split, spec("batch")), out_specs=split)(into, x, slots)


def _read_stream(
  config: ModelConfig,
  model: dict,
  prompts: Padded,
  end: Int32[Array, ""],
  capacity: int,
  dtype: str,
) -> tuple[Layers, Bool[Array, "J T"]]:
  """Reads prompts into rings of `capacity` entries, the last token before entry `end`.

  Returns:
    (cache of each layer, entries that hold a token).
  """
  prompts = Padded(*(shard(x, "batch", None) for x in prompts))
  count, width = prompts.ids.shape
  start = cache_lib.empty(config, count, width, dtype)
  cache, seen = read_padded(config, model, prompts, start, jnp.zeros_like(prompts.valid), 0)
  cache = cache_lib.grown(cache, capacity - width)

  cache = jax.tree.map(lambda x: jnp.roll(x, end - width, axis=2), cache)
  seen = jnp.pad(seen, ((0, 0), (0, capacity - width)))
  return cache, jnp.roll(seen, end - width, axis=1)


def admit(
  model: dict,
  state: BatchState,
  admitted: Admitted,
  *,
  config: ModelConfig,
  grammar: Grammar,
  cache_dtype: str = "compute",
) -> BatchState:
  """Reads the prompts of samples and puts these into slots of a batch. Needs a mesh.

  Args:
    model: `DecodeParams.model`.
    state: donated.
    admitted: J must divide by the number of devices that the batch is split over.
    config: of the model.
    grammar: of the plans.
    cache_dtype: one of `cache.DTYPES`.
  """
  loop, slots = state.loop, shard(admitted.slots, "batch")
  layers, seen_of = [list(layer) for layer in loop.cache], list(loop.seen)

  def put(into: Array, x: Array) -> Array:
    return _put(into, x, slots)

  for s, prompts in enumerate(admitted.prompts):
    capacity = seen_of[s].shape[1]
    cache, seen = _read_stream(config, model, prompts, loop.next_entries[s], capacity, cache_dtype)
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
    state=State(*map(put, loop.state, grammar.start(plan))),
    divergence=put(loop.divergence, zeros),
  )
  return BatchState(loop, put(state.counts, zeros))


OF_ALL_SLOTS = ("next_entries", "count", "any_active")  # Fields of LoopState.


def _by_slots(function: Callable[..., Array], state: BatchState, *others: BatchState) -> BatchState:
  """Applies a function to the arrays of states that have a part for each slot: not OF_ALL_SLOTS."""
  states = (state, *others)
  loop = {
    name: jax.tree.map(function, *(getattr(x.loop, name) for x in states))
    for name in LoopState._fields
    if name not in OF_ALL_SLOTS
  }
  counts = function(*(x.counts for x in states))
  return BatchState(states[-1].loop._replace(**loop), counts)


def _first(x: Shaped[Array, "_ ..."], count: int) -> Shaped[Array, "{count} ..."]:
  """Returns the first entries of an array, split as it is; see `Grammar.start`."""
  return jax.sharding.reshard(x[:count], jax.typeof(x).sharding.spec)


def _first_slots(state: BatchState, slots: int) -> BatchState:
  """Returns the state of the first slots; arrays [R] have S elements for each slot."""
  count = len(state.counts)
  return _by_slots(lambda x: _first(x, slots * (len(x) // count)), state)


def _with_first_slots(state: BatchState, first: BatchState) -> BatchState:
  """Puts the state of first slots back into that of all."""
  return _by_slots(lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, 0, 0), state, first)


def _new_chunk(state: BatchState, pad: int) -> BatchState:
  """Returns the state without the tokens of its last chunk."""
  ids, log_probs = jnp.full_like(state.loop.ids, pad), jnp.zeros_like(state.loop.log_probs)
  return state._replace(loop=state.loop._replace(ids=ids, log_probs=log_probs))


def steps(
  params: DecodeParams,
  control: Control,
  state: BatchState,
  limit: Int32[Array, ""],
  *,
  least: int,
  config: ModelConfig,
  grammar: Grammar,
  sampler: Sampler,
  slots: int | None = None,
) -> BatchState:
  """Makes the steps of one chunk. Needs a mesh.

  Args:
    params: of `params.prepare`.
    control: of B slots; the plan of a slot without a sample is DONE.
    state: donated.
    limit: largest number of steps, at most C.
    least: after so many steps the chunk ends as soon as a sample is finished, so that another may
      be admitted.
    config: of the model.
    grammar: of the plans.
    sampler: compiled settings of sampling.
    slots: only so many first slots are computed; no other may have a sample. Not with a batch that
      is split over devices. Default: all.
  """
  state = whole = _new_chunk(state, grammar.vocab.pad)
  control = split_control(control)
  if slots is not None:
    state = _first_slots(whole, slots)
    control = Control(*jax.tree.map(lambda x: _first(x, slots), control))
  keys, plan = jax.vmap(jax.random.key)(control.seeds), control.plan
  capacities = jnp.array([seen.shape[1] for seen in state.loop.seen], jnp.int32)
  began = grammar.active(plan, state.loop.state)

  def step(state: BatchState) -> BatchState:
    loop = decode_step(
      params,
      control,
      keys,
      state.loop,
      config=config,
      grammar=grammar,
      sampler=sampler,
      counts=state.counts,
    )
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

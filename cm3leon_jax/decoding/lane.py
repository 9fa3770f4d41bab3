"""A batch in motion: samples join and leave the rows of a lane while the others go on.

The caches of a lane are rings. All rows write their next token into the same slot of a stream, as
in a batch that starts together; when the ring is full, the slot after its last is its first. The
order of slots means nothing to attention, so a prompt that joins is put into the slots before the
current one. A ring has as many slots as the longest prompt and what may follow it, so a sample is
over before its first slot is written again.

  3 slots of prompt, 4 of tokens; b joins a when the next slot is 5:
  a: p p p t t . .     slots 3 and 4 hold a's first tokens
  b: . . p p p . .     b's tokens go to slots 5, 6, 0 and 1
"""

# B rows of a lane, S guidance streams, R = B x S, J samples that join, W slots of a stream's
# prompts, T slots of its ring, C tokens of a chunk, M parts of a plan.

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.decoding.batch import Control, Padded
from cm3leon_jax.decoding.cache import LayerCache
from cm3leon_jax.decoding.grammar import Grammar, State
from cm3leon_jax.decoding.loop import LoopState, decode_step, read_padded, split_control
from cm3leon_jax.decoding.params import DecodeParams
from cm3leon_jax.decoding.sampling import Sampler
from cm3leon_jax.mesh import shard, spec
from cm3leon_jax.models.config import ModelConfig


class LaneState(NamedTuple):
  """State of a lane between its chunks.

  Attributes:
    loop: its `ids` and `log_probs` are those of the last chunk, and its `count` the steps of it.
    counts: number of tokens that each row's sample has so far.
  """

  loop: LoopState
  counts: Int32[Array, " B"]


class Arrivals(NamedTuple):
  """Samples that join a lane.

  Attributes:
    prompts: of each stream, without their last tokens.
    last: last token of each stream's prompt.
    last_positions: position of that token.
    next_positions: position of the token after it.
    plan: of `grammar.plan_array`.
    rows: row of the lane that each sample takes, counted in its own shard of the batch; a row after
      the last one stands for no sample.
  """

  prompts: tuple[Padded, ...]
  last: Int32[Array, "J S"]
  last_positions: Int32[Array, "J S"]
  next_positions: Int32[Array, "J S"]
  plan: Int32[Array, "J M 3"]
  rows: Int32[Array, " J"]


def empty(
  *,
  config: ModelConfig,
  grammar: Grammar,
  rows: int,
  widths: tuple[int, ...],
  room: int,
  steps: int,
  cache_dtype: str = "compute",
) -> LaneState:
  """Makes a lane without samples. Needs a mesh.

  Args:
    config: of the model.
    grammar: of the plans.
    rows: B.
    widths: W of each stream.
    room: largest number of tokens of a sample.
    steps: C, the largest number of steps of a chunk.
    cache_dtype: one of `cache.DTYPES`.
  """

  def full(value, dtype, *shape):
    split = spec("batch", *[None] * (len(shape) - 1))
    return jnp.full(shape, value, dtype, out_sharding=split)

  caches = [cache_lib.empty(config, rows, width + room, cache_dtype) for width in widths]
  count, pad = rows * len(widths), grammar.vocab.pad
  loop = LoopState(
    tokens=full(pad, jnp.int32, count),
    positions=full(0, jnp.int32, count),
    next_positions=full(0, jnp.int32, count),
    cache=tuple(zip(*caches)),
    seen=tuple(full(False, bool, rows, width + room) for width in widths),
    slots=jnp.array(widths, jnp.int32),
    count=jnp.int32(0),
    going=jnp.bool_(False),
    state=State(*(full(0, jnp.int32, rows) for _ in State._fields)),
    ids=full(pad, jnp.int32, rows, steps),
    log_probs=full(0, jnp.float32, rows, steps),
    divergence=full(0, jnp.float32, rows),
  )
  return LaneState(loop, full(0, jnp.int32, rows))


def _put(into: Shaped[Array, "B ..."], x: Shaped[Array, "J ..."], rows) -> Shaped[Array, "B ..."]:
  """Replaces rows, each in its own shard of the batch; see `Arrivals.rows`."""
  split = jax.typeof(into).sharding.spec

  def put(into, x, rows):
    return into.at[rows].set(x.astype(into.dtype), mode="drop")

  return jax.shard_map(put, in_specs=(split, split, spec("batch")), out_specs=split)(into, x, rows)


def _read_stream(config: ModelConfig, model: dict, prompts: Padded, end, slots: int, dtype: str):
  """Reads prompts into rings of `slots` slots, the last token before slot `end`.

  Returns:
    (cache of each layer, slots that hold a token).
  """
  prompts = Padded(*(shard(x, "batch", None) for x in prompts))
  count, width = prompts.ids.shape
  start = cache_lib.empty(config, count, width, dtype)
  cache, seen = read_padded(config, model, prompts, start, jnp.zeros_like(prompts.valid), 0)
  cache = cache_lib.grown(cache, slots - width)

  cache = jax.tree.map(lambda x: jnp.roll(x, end - width, axis=2), cache)
  seen = jnp.pad(seen, ((0, 0), (0, slots - width)))
  return cache, jnp.roll(seen, end - width, axis=1)


def join(
  model: dict,
  lane: LaneState,
  arrivals: Arrivals,
  *,
  config: ModelConfig,
  grammar: Grammar,
  cache_dtype: str = "compute",
) -> LaneState:
  """Reads the prompts of samples and puts these into rows of a lane. Needs a mesh.

  Args:
    model: `DecodeParams.model`.
    lane: donated.
    arrivals: J must divide by the number of devices that the batch is split over.
    config: of the model.
    grammar: of the plans.
    cache_dtype: one of `cache.DTYPES`.
  """
  loop, rows = lane.loop, shard(arrivals.rows, "batch")
  layers, seen_of = [list(layer) for layer in loop.cache], list(loop.seen)

  def put(into, x):
    return _put(into, x, rows)

  for s, prompts in enumerate(arrivals.prompts):
    slots = seen_of[s].shape[1]
    cache, seen = _read_stream(config, model, prompts, loop.slots[s], slots, cache_dtype)
    for layer, new in zip(layers, cache):
      layer[s] = LayerCache(*jax.tree.map(put, layer[s], new))
    seen_of[s] = put(seen_of[s], seen)

  def put_streams(into, x):
    pairs = jnp.reshape(into, (-1, x.shape[1]), out_sharding=spec("batch", None))
    return jnp.reshape(put(pairs, shard(x, "batch", None)), into.shape, out_sharding=spec("batch"))

  plan = shard(arrivals.plan, "batch", None, None)
  zeros = jnp.zeros_like(rows)
  loop = loop._replace(
    tokens=put_streams(loop.tokens, arrivals.last),
    positions=put_streams(loop.positions, arrivals.last_positions),
    next_positions=put_streams(loop.next_positions, arrivals.next_positions),
    cache=tuple(map(tuple, layers)),
    seen=tuple(seen_of),
    state=State(*map(put, loop.state, grammar.start(plan))),
    divergence=put(loop.divergence, zeros),
  )
  return LaneState(loop, put(lane.counts, zeros))


OF_ALL_ROWS = ("slots", "count", "going")  # Fields of LoopState.


def _by_rows(function, lane: LaneState, *others: LaneState) -> LaneState:
  """Applies a function to the arrays of lanes that have a part for each row; see `OF_ALL_ROWS`."""
  lanes = (lane, *others)
  loop = {
    name: jax.tree.map(function, *(getattr(x.loop, name) for x in lanes))
    for name in LoopState._fields
    if name not in OF_ALL_ROWS
  }
  counts = function(*(x.counts for x in lanes))
  return LaneState(lanes[-1].loop._replace(**loop), counts)


def _first(x, count: int):
  """Returns the first entries of an array, split as it is; see `Grammar.start`."""
  return jax.sharding.reshard(x[:count], jax.typeof(x).sharding.spec)


def _first_rows(lane: LaneState, rows: int) -> LaneState:
  """Returns a lane of the first rows. Arrays [R] of all streams have S entries for each row."""
  count = len(lane.counts)
  return _by_rows(lambda x: _first(x, rows * (len(x) // count)), lane)


def _with_first_rows(lane: LaneState, first: LaneState) -> LaneState:
  """Puts a lane of first rows back into the lane of all."""
  return _by_rows(lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, 0, 0), lane, first)


def steps(
  params: DecodeParams,
  control: Control,
  lane: LaneState,
  limit: Int32[Array, ""],
  *,
  least: int,
  config: ModelConfig,
  grammar: Grammar,
  sampler: Sampler,
  rows: int | None = None,
) -> LaneState:
  """Makes the steps of one chunk. Needs a mesh.

  Args:
    params: of `params.prepare`.
    control: of B rows; the plan of a row without a sample is DONE.
    lane: donated.
    limit: largest number of steps, at most C.
    least: after so many steps the chunk ends as soon as a sample is over, so that another may join.
    config: of the model.
    grammar: of the plans.
    sampler: compiled settings of sampling.
    rows: only so many first rows are computed; no other may have a sample. Not with a batch that
      is split over devices. Default: all.
  """
  pad, nothing = (
    jnp.full_like(lane.loop.ids, grammar.vocab.pad),
    jnp.zeros_like(lane.loop.log_probs),
  )
  whole = lane._replace(loop=lane.loop._replace(ids=pad, log_probs=nothing))
  lane, control = whole, split_control(control)
  if rows is not None:
    lane = _first_rows(whole, rows)
    control = Control(*jax.tree.map(lambda x: _first(x, rows), control))
  keys, plan = jax.vmap(jax.random.key)(control.seeds), control.plan
  slots = jnp.array([seen.shape[1] for seen in lane.loop.seen], jnp.int32)
  began = grammar.active(plan, lane.loop.state)

  def step(lane: LaneState) -> LaneState:
    loop = decode_step(
      params,
      control,
      keys,
      lane.loop,
      config=config,
      grammar=grammar,
      sampler=sampler,
      counts=lane.counts,
    )
    active = grammar.active(plan, loop.state)
    ended = jnp.any(began & ~active) & (loop.count >= least)
    loop = loop._replace(slots=loop.slots % slots, going=jnp.any(active) & ~ended)
    return LaneState(loop, lane.counts + 1)

  loop = lane.loop._replace(count=jnp.int32(0), going=jnp.any(began))
  lane = jax.lax.while_loop(
    lambda lane: (lane.loop.count < limit) & lane.loop.going, step, LaneState(loop, lane.counts)
  )
  return lane if rows is None else _with_first_rows(whole, lane)

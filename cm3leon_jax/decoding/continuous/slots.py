"""A running batch: which request each of its slots has, and the chunks that are generated."""

# B slots, S guidance streams, G tokens so far, M parts of a plan.

import dataclasses

import jax
from jaxtyping import Float32, Int32
import numpy as np

from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.batch import Control
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.continuous import programs as compile_lib
from cm3leon_jax.decoding.continuous.buckets import Bucket
from cm3leon_jax.decoding.continuous.state import Admitted
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling.methods import choose_methods
from cm3leon_jax.decoding.sampling.rows import SamplingValues, uses_of
from cm3leon_jax.decoding.sampling.top_p import TOP_P

FIXED = (grammar.CODES, grammar.EOSS, grammar.MASK, grammar.END)  # Parts whose length is known.


@dataclasses.dataclass(frozen=True)
class Update:
  """What is known of a sample after a chunk.

  Attributes:
    ticket: of `ContinuousGenerator.admit`.
    tokens: all ids generated after the prompt so far.
    log_probs: of each id, as in `generator.Result`.
    finished: whether these are all; the slot is free.
    divergence: mean over the image codes so far, as in `generator.Result`.
    steps: number of steps of the chunk.
  """

  ticket: int
  tokens: Int32[np.ndarray, " G"]
  log_probs: Float32[np.ndarray, " G"]
  finished: bool
  divergence: float | None
  steps: int


@dataclasses.dataclass(eq=False)
class ActiveRequest:
  """A request in a slot, and the tokens of its sample so far."""

  ticket: int
  request: Request
  seed: int
  sampling: SamplingConfig
  tokens: np.ndarray
  log_probs: np.ndarray

  @property
  def left(self) -> int | None:
    """Number of tokens that remain; None if it depends on the tokens."""
    plan = self.request.plan
    fixed = all(part.kind in FIXED for part in plan)
    return grammar.max_new_tokens(plan) - len(self.tokens) if fixed else None


class RunningBatch:
  """The slots of one bucket, with their arrays on the devices."""

  def __init__(self, bucket: Bucket, generator: Generator, slots: int, chunk: int, shards: int):
    self.bucket, self.generator, self.shards = bucket, generator, shards
    self.chunk, self.least = chunk, max(1, chunk // 4)
    self.slots: list[ActiveRequest | None] = [None] * slots
    self.admitted: list[int] = []  # Slots whose prompts are not yet read.
    self.draining = False
    streams, codes = len(bucket.static.widths), generator.config.image_tokens
    self.control = Control(
      np.zeros((slots, bucket.parts, 3), np.int32),
      np.zeros((slots, codes + 1, streams), np.float32),
      np.zeros(slots, np.uint32),
      uses_of([TOP_P] * slots),
      SamplingValues(*(np.repeat(x, slots) for x in SamplingValues.of(generator.config.sampling))),
    )
    self.placed: Control | None = None  # `control` on the devices, while it is the same.
    self.state = self.program = None
    # Steps of the first slots alone, for a batch with few samples.
    self.few, self.program_of_few = slots // 4 if shards == 1 else 0, None

  @property
  def active(self) -> bool:
    """Whether a slot has a request."""
    return any(self.slots)

  @property
  def can_admit(self) -> bool:
    """Whether a slot is free and may be taken."""
    return not self.draining and not all(self.slots)

  def admit(self, request: ActiveRequest) -> int:
    """Takes a free slot in the shard of the batch with the fewest prompts to read; returns it."""
    size = len(self.slots) // self.shards
    free = [slot for slot, taken in enumerate(self.slots) if taken is None]
    slot = min(free, key=lambda slot: sum(x // size == slot // size for x in self.admitted))
    self.slots[slot] = request
    self.admitted.append(slot)
    return slot

  def remove(self, slot: int) -> None:
    """Frees a slot; its plan is DONE from the next chunk on."""
    self.slots[slot] = None
    self.admitted = [x for x in self.admitted if x != slot]
    self.control.plan[slot] = grammar.DONE
    self.placed = None

  def step(self) -> list[Update]:
    """Reads the prompts of admitted requests, then generates a chunk."""
    params, programs, static = self.generator.params, self.generator.programs, self.bucket.static
    if self.state is None:
      self.state, self.program = compile_lib.empty_batch(
        programs, params, self._place(), static, self.chunk + self.least, self.least
      )
    for slots in self._groups():
      admitted = self._admitted(slots)
      self.state = compile_lib.admit(programs, self.state, admitted, params, self.program, static)
      self.placed = None
    self.admitted = []
    program = self._program()
    self.state = program(params, self._place(), self.state, np.int32(self._limit()))
    return self._updates()

  def _program(self) -> jax.stages.Compiled:
    """Returns the steps of all slots, or of the first ones if the requests are in these."""
    if any(self.slots[self.few :]):
      return self.program
    if self.program_of_few is None:
      self.program_of_few = compile_lib.steps_of_first_slots(
        self.generator.programs,
        self.few,
        self.state,
        self.generator.params,
        self._place(),
        self.program,
        self.bucket.static,
        self.least,
      )
    return self.program_of_few

  def _limit(self) -> int:
    """Returns the number of steps of the next chunk: it ends where a sample is known to end."""
    known = [x.left for x in self.slots if x is not None and x.left is not None]
    if known and min(known) <= self.chunk + self.least:
      return max(min(known), self.least)
    return self.chunk

  def _place(self) -> Control:
    if self.placed is None:
      whole = jax.NamedSharding(self.generator.programs.mesh, jax.P())
      self.placed = jax.device_put(self.control, whole)
    return self.placed

  def _groups(self) -> list[list[int | None]]:
    """Divides the admitted slots into groups that are read in one call, padded with None.

    A call reads one prompt for each shard of the batch, or prompts for all slots: two programs.
    """
    size = len(self.slots) // self.shards
    by_shard = [[x for x in self.admitted if x // size == i] for i in range(self.shards)]
    most = max(map(len, by_shard))
    count = 1 if 2 * most <= size else size
    return [
      [slot for slots in by_shard for slot in [*slots[i : i + count], *[None] * count][:count]]
      for i in range(0, most, count)
    ]

  def _admitted(self, slots: list[int | None]) -> Admitted:
    """Writes the control of admitted requests; returns the arrays of their prompts."""
    config, size = self.generator.config, len(self.slots) // self.shards
    for slot in slots:
      if slot is not None:
        self._write_control(slot)
    streams = [self._prompts(slot) for slot in slots]
    tokens, places = zip(*streams)
    widths = self.bucket.static.widths
    prompts = tuple(
      batch_lib.pad_left([of_slot[s] for of_slot in tokens], config.vocab.pad, width)
      for s, width in enumerate(widths)
    )
    last, last_positions, next_positions = np.array(places, np.int32).transpose(2, 0, 1)
    plan = self.control.plan[[slot or 0 for slot in slots]]
    local = np.array([size if slot is None else slot % size for slot in slots], np.int32)
    return Admitted(prompts, last, last_positions, next_positions, plan, local)

  def _write_control(self, slot: int) -> None:
    active, plan = self.slots[slot], self.control.plan
    request, sampling = active.request, active.sampling
    plan[slot] = grammar.DONE
    plan[slot, : len(request.plan)] = request.plan
    image_tokens = self.generator.config.image_tokens
    self.control.guidance[slot] = request.guidance_weights(sampling, image_tokens)
    self.control.seeds[slot] = active.seed
    methods = choose_methods(sampling.method, [active.seed], 1, [len(request.streams)])
    for name, used in uses_of(methods[0]).items():
      self.control.uses[name][slot] = used[0]
    for into, value in zip(self.control.values, SamplingValues.of(sampling)):
      into[slot] = value

  def _prompts(self, slot: int | None):
    """Returns (tokens that prefill reads of each stream; last id, its position, the next one)."""
    config = self.generator.config
    if slot is None:
      streams = len(self.bucket.static.widths)
      return [np.zeros((0, 2), np.int32)] * streams, [(config.vocab.pad, 0, 0)] * streams
    request = self.slots[slot].request
    tokens, places = [], []
    for prompt in request.streams:
      at = batch_lib.prompt_positions(prompt, request.plan, config.vocab, config.model.align_images)
      tokens.append(batch_lib.prompt_tokens(prompt, at))
      places.append((prompt[-1], at[-2], at[-1]))
    return tokens, places

  def _updates(self) -> list[Update]:
    """Reads what a chunk generated, and frees the slots of finished samples."""
    loop, vocab = self.state.loop, self.generator.config.vocab
    ids, log_probs, apart, parts, steps = jax.device_get(
      (loop.ids, loop.log_probs, loop.divergence, loop.state.part, loop.count)
    )
    updates = []
    for slot, active in enumerate(self.slots):
      if active is None:
        continue
      count = int((ids[slot] != vocab.pad).sum())
      active.tokens = np.append(active.tokens, ids[slot, :count])
      active.log_probs = np.append(active.log_probs, log_probs[slot, :count])
      codes = int(vocab.is_image(active.tokens).sum()) if len(active.request.streams) > 1 else 0
      finished = bool(self.control.plan[slot, parts[slot], 0] == grammar.DONE)
      updates.append(
        Update(
          active.ticket,
          active.tokens,
          active.log_probs,
          finished,
          float(apart[slot] / codes) if codes else None,
          int(steps),
        )
      )
      if finished:
        self.slots[slot] = None
    return updates

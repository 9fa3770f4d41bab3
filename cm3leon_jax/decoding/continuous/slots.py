"""Assigns requests to the slots of a running batch and generates their tokens in chunks."""

from collections.abc import Callable
import dataclasses
import functools

import jax
from jaxtyping import PyTree
import numpy as np

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.batch import StreamPrompt
from cm3leon_jax.decoding.continuous import state as state_lib
from cm3leon_jax.decoding.continuous.buckets import Bucket
from cm3leon_jax.decoding.continuous.state import Admitted, BatchState
from cm3leon_jax.decoding.control import Control, control_of, put_sample, without_samples
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.decoding.programs import jit_before, lower_loop
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.result import Result, cut
from cm3leon_jax.decoding.sampling.methods import is_contrastive
from cm3leon_jax.mesh import abstract

FIXED = (grammar.CODES, grammar.EOSS, grammar.MASK, grammar.END)  # Parts with a fixed length.


@dataclasses.dataclass(frozen=True)
class Update:
  """Tokens of a sample after a chunk.

  Attributes:
    ticket: the ticket from `ContinuousGenerator.admit`.
    result: all tokens of the sample so far; `request` and `sample` are 0.
    finished: whether the sample is complete and its slot is free again.
  """

  ticket: int
  result: Result
  finished: bool
  steps: int


@dataclasses.dataclass(eq=False)
class ActiveRequest:
  """A request in a slot, and the tokens of its sample so far."""

  ticket: int
  request: Request
  seed: int
  sampling: SamplingConfig
  tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  log_probs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))

  @property
  def left(self) -> int | None:
    """Number of remaining tokens; None if it is not known in advance."""
    plan = self.request.plan
    fixed = all(part.kind in FIXED for part in plan)
    return grammar.max_new_tokens(plan) - len(self.tokens) if fixed else None

  @property
  def contrastive(self) -> bool:
    return is_contrastive(self.sampling.method, self.seed, len(self.request.streams))


class RunningBatch:
  """A running batch: the slots of one bucket, with their arrays on the devices."""

  def __init__(self, bucket: Bucket, generator: Generator, slots: int, chunk: int, shards: int):
    self.bucket, self.generator, self.shards = bucket, generator, shards
    self.chunk, self.least = chunk, max(1, chunk // 4)
    self.slots: list[ActiveRequest | None] = [None] * slots
    self.admitted: list[int] = []  # Slots whose prompts must still be read.
    self.draining = False
    config, streams = generator.config, len(bucket.static.widths)
    self.control = without_samples(
      slots, streams, config.sampling, config.image_tokens, bucket.parts
    )
    self.placed: Control | None = None  # Copy of `control` on the devices; None if outdated.
    self.state: BatchState | None = None
    self.program: jax.stages.Compiled = None  # The first step sets it.
    # Number of slots of a smaller program, which is used while all later slots are empty.
    self.few = slots // 4 if shards == 1 else 0
    self.program_of_few: jax.stages.Compiled | None = None

  @property
  def active(self) -> bool:
    """Whether any slot has a request."""
    return any(self.slots)

  @property
  def can_admit(self) -> bool:
    """Whether a request may be admitted to a free slot."""
    return not self.draining and not all(self.slots)

  def admit(self, request: ActiveRequest) -> int:
    """Puts a request into a slot of the shard with the fewest unread prompts. Returns the slot."""
    size = len(self.slots) // self.shards
    free = [slot for slot, taken in enumerate(self.slots) if taken is None]
    slot = min(free, key=lambda slot: sum(x // size == slot // size for x in self.admitted))
    self.slots[slot] = request
    self.admitted.append(slot)
    return slot

  def remove(self, slot: int) -> None:
    """Frees a slot and sets its plan to DONE for the next chunk."""
    self.slots[slot] = None
    self.admitted = [x for x in self.admitted if x != slot]
    self.control.plan[slot] = grammar.DONE
    self.placed = None

  def step(self) -> list[Update]:
    """Reads the prompts of admitted requests, then generates a chunk."""
    if self.state is None:
      self._start()
    for slots in self._groups():
      self._read_prompts(self._admitted(slots))
      self.placed = None
    self.admitted = []
    program, params = self._program(), self.generator.params
    self.state = program(params, self._place(), self.state, np.int32(self._limit()))
    return self._updates()

  def _start(self) -> None:
    """Makes the state of a batch without requests, and compiles the program of its steps."""
    programs, static, steps = self.generator.programs, self.bucket.static, self.chunk + self.least
    empty = functools.partial(state_lib.empty, static=static, slots=len(self.slots), steps=steps)

    def make() -> tuple[Callable, jax.stages.Compiled]:
      program = self._compiled(jax.eval_shape(empty))
      return jit_before(empty, program), program

    name = ("running batch", static, steps, self.least)
    jitted, self.program = programs.once(name, (self.generator.params, self._place()), make)
    self.state = jitted()

  def _compiled(
    self, state: BatchState, slots: int | None = None, formats: PyTree = None
  ) -> jax.stages.Compiled:
    """Compiles `state.steps`. `formats` are the memory layouts of `state`; see `lower_loop`."""
    mesh, arguments = self.generator.programs.mesh, (self.generator.params, self._place(), state)
    types = [abstract(x, mesh) for x in (*arguments, np.int32(0))]
    static, least = self.bucket.static, self.least
    function = functools.partial(state_lib.steps, static=static, least=least, slots=slots)
    return lower_loop(mesh, function, *types, formats=formats).compile()

  def _read_prompts(self, admitted: Admitted) -> None:
    """Runs `state.admit`. The state keeps the memory layout of `program`."""
    programs, params, static = self.generator.programs, self.generator.params, self.bucket.static

    def make() -> Callable:
      function = functools.partial(state_lib.admit, static=static)
      return jax.jit(function, donate_argnums=1, out_shardings=self.program.input_formats[0][2])

    arguments = params.model, self.state, admitted
    self.state = programs.once(("admit", static), arguments, make)(*arguments)

  def _program(self) -> jax.stages.Compiled:
    """Returns the program for all slots, or a smaller one if only the first slots are occupied."""
    if any(self.slots[self.few :]):
      return self.program
    if self.program_of_few is None:
      name = ("first slots", self.few, self.bucket.static, self.least)
      assert self.state is not None
      arguments = self.generator.params, self._place(), self.state
      formats = self.program.input_formats[0][2]
      make = functools.partial(self._compiled, self.state, self.few, formats)
      self.program_of_few = self.generator.programs.once(name, arguments, make)
    return self.program_of_few

  def _limit(self) -> int:
    """Returns the number of steps in the next chunk.

    If a sample is about to finish, the chunk ends with its last token.
    """
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
    """Divides the admitted slots into groups. One call reads the prompts of a group.

    A group has either one slot per shard of the batch, or as many slots as the whole batch. So only
    two programs are compiled. Groups are padded with None.
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
    """Writes the `control` of admitted requests, and returns the arrays of their prompts."""
    config, size = self.generator.config, len(self.slots) // self.shards
    for slot in slots:
      if slot is not None:
        self._write_control(slot)
    read = [self._prompts(slot) for slot in slots]
    prompts = tuple(
      batch_lib.pad_left([streams[s].tokens for streams in read], config.vocab.pad, width)
      for s, width in enumerate(self.bucket.static.widths)
    )
    places = [[(p.last, p.last_position, p.next_position) for p in streams] for streams in read]
    last, last_positions, next_positions = np.array(places, np.int32).transpose(2, 0, 1)
    plan = self.control.plan[[slot or 0 for slot in slots]]
    local = np.array([size if slot is None else slot % size for slot in slots], np.int32)
    return Admitted(prompts, last, last_positions, next_positions, plan, local)

  def _write_control(self, slot: int) -> None:
    active, codes = self.slots[slot], self.generator.config.image_tokens
    assert active is not None
    requests, seeds, contrastive = [active.request], [active.seed], [active.contrastive]
    one = control_of(requests, seeds, contrastive, active.sampling, codes, self.bucket.parts)
    put_sample(self.control, slot, one)

  def _prompts(self, slot: int | None) -> list[StreamPrompt]:
    """Returns the prompts of a slot's streams. If the slot is None, the prompts are empty."""
    config = self.generator.config
    if slot is None:
      nothing = StreamPrompt(np.zeros((0, 2), np.int32), config.vocab.pad, 0, 0)
      return [nothing] * len(self.bucket.static.widths)
    active = self.slots[slot]
    assert active is not None
    return batch_lib.prompts_of(active.request, config.vocab, config.model.align_images)

  def _updates(self) -> list[Update]:
    """Reads the tokens of the last chunk and frees the slots of finished samples."""
    assert self.state is not None
    loop, vocab = self.state.loop, self.generator.config.vocab
    ids, log_probs, apart, parts, steps = jax.device_get(
      (loop.ids, loop.log_probs, loop.divergence, loop.state.part, loop.count)
    )
    updates = []
    for slot, active in enumerate(self.slots):
      if active is None:
        continue
      tokens, of_tokens = cut(ids[slot], log_probs[slot], vocab.pad)
      active.tokens = np.append(active.tokens, tokens)
      active.log_probs = np.append(active.log_probs, of_tokens)
      finished = bool(self.control.plan[slot, parts[slot], 0] == grammar.DONE)
      known = active.seed, active.contrastive, active.tokens, active.log_probs
      result = Result.of((0, 0), *known, apart[slot], len(active.request.streams), vocab)
      updates.append(Update(active.ticket, result, finished, int(steps)))
      if finished:
        self.slots[slot] = None
    return updates

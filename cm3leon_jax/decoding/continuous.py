"""Continuous batching: requests join and leave compiled batches while others are generated."""

# B rows of a lane, S guidance streams, G tokens so far, I tokens of an image, M parts of a plan.

from collections.abc import Sequence
import dataclasses
import itertools

import jax
from jaxtyping import Float32, Int32
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.batch import Control
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.decoding.lane import Arrivals
from cm3leon_jax.decoding.lane_kinds import Kind, kind_of
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling import SamplingConfig, SamplingValues, contrastive_rows
from cm3leon_jax.mesh import batch_shards

FIXED = (grammar.CODES, grammar.EOSS, grammar.MASK, grammar.END)  # Parts whose length is known.


class NoRoom(Exception):
  """The lane of a request has no free row, or all lanes are at work: try again after a step."""


class StepFailed(Exception):
  """A chunk failed, e.g. for want of memory; its lane and the samples `tickets` are lost."""

  def __init__(self, tickets: Sequence[int]):
    super().__init__(f"a chunk of {len(tickets)} samples failed; they must be added again.")
    self.tickets = list(tickets)


@dataclasses.dataclass(frozen=True)
class Update:
  """What is known of a sample after a chunk.

  Attributes:
    ticket: of `ContinuousGenerator.add`.
    tokens: all ids generated after the prompt so far.
    log_probs: of each id, as in `generator.Result`.
    over: whether these are all; the row is free.
    divergence: mean over the image codes so far, as in `generator.Result`.
    steps: number of steps of the chunk.
  """

  ticket: int
  tokens: Int32[np.ndarray, " G"]
  log_probs: Float32[np.ndarray, " G"]
  over: bool
  divergence: float | None
  steps: int


@dataclasses.dataclass(eq=False)
class _Sample:
  """A sample in a row of a lane."""

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
    return grammar.longest(plan) - len(self.tokens) if fixed else None


class _Lane:
  """Rows of one kind, with their arrays on the devices."""

  def __init__(self, kind: Kind, generator: Generator, slots: int, chunk: int, shards: int):
    self.kind, self.generator, self.shards = kind, generator, shards
    self.chunk, self.least = chunk, max(1, chunk // 4)
    self.rows: list[_Sample | None] = [None] * slots
    self.arriving: list[int] = []  # Rows whose prompts are not yet read.
    self.draining = False
    streams, codes = len(kind.static.widths), generator.config.image_tokens
    self.control = Control(
      np.zeros((slots, kind.parts, 3), np.int32),
      np.zeros((slots, codes + 1, streams), np.float32),
      np.zeros(slots, np.uint32),
      np.zeros(slots, bool),
      SamplingValues(*(np.repeat(x, slots) for x in generator.config.sampling.values)),
    )
    self.placed: Control | None = None  # `control` on the devices, while it is the same.
    self.state = self.program = None

  @property
  def busy(self) -> bool:
    return any(self.rows)

  @property
  def has_room(self) -> bool:
    return not self.draining and not all(self.rows)

  def add(self, sample: _Sample) -> int:
    """Takes a free row in the shard of the batch with the fewest samples to read; returns it."""
    size = len(self.rows) // self.shards
    free = [row for row, taken in enumerate(self.rows) if taken is None]
    row = min(free, key=lambda row: sum(x // size == row // size for x in self.arriving))
    self.rows[row] = sample
    self.arriving.append(row)
    return row

  def remove(self, row: int) -> None:
    """Frees a row; its plan is DONE from the next chunk on."""
    self.rows[row] = None
    self.arriving = [x for x in self.arriving if x != row]
    self.control.plan[row] = grammar.DONE
    self.placed = None

  def step(self) -> list[Update]:
    """Reads the prompts that wait, then makes a chunk."""
    params, programs, static = self.generator.params, self.generator.programs, self.kind.static
    if self.state is None:
      self.state, self.program = programs.empty_lane(
        params, self._place(), static, self.chunk + self.least, self.least
      )
    for rows in self._groups():
      self.state = programs.join(self.state, self._arrivals(rows), params, self.program, static)
      self.placed = None
    self.arriving = []
    self.state = self.program(params, self._place(), self.state, np.int32(self._limit()))
    return self._updates()

  def _limit(self) -> int:
    """Returns the number of steps of the next chunk: it ends where a sample is known to end."""
    known = [x.left for x in self.rows if x is not None and x.left is not None]
    if known and min(known) <= self.chunk + self.least:
      return max(min(known), self.least)
    return self.chunk

  def _place(self) -> Control:
    if self.placed is None:
      whole = jax.NamedSharding(self.generator.programs.mesh, jax.P())
      self.placed = jax.device_put(self.control, whole)
    return self.placed

  def _groups(self) -> list[list[int | None]]:
    """Divides the arriving rows into groups that join in one call, padded with None.

    A call reads one prompt for each shard of the batch, or prompts for all rows: two programs.
    """
    size = len(self.rows) // self.shards
    by_shard = [[x for x in self.arriving if x // size == i] for i in range(self.shards)]
    most = max(map(len, by_shard))
    count = 1 if 2 * most <= size else size
    return [
      [row for rows in by_shard for row in [*rows[i : i + count], *[None] * count][:count]]
      for i in range(0, most, count)
    ]

  def _arrivals(self, rows: list[int | None]) -> Arrivals:
    """Writes the control of samples that join; returns the arrays of their prompts."""
    config, size = self.generator.config, len(self.rows) // self.shards
    for row in rows:
      if row is not None:
        self._write_control(row)
    streams = [self._prompts(row) for row in rows]
    tokens, places = zip(*streams)
    widths = self.kind.static.widths
    prompts = tuple(
      batch_lib.pad_left([of_row[s] for of_row in tokens], config.vocab.pad, width)
      for s, width in enumerate(widths)
    )
    last, last_positions, next_positions = np.array(places, np.int32).transpose(2, 0, 1)
    plan = self.control.plan[[row or 0 for row in rows]]
    local = np.array([size if row is None else row % size for row in rows], np.int32)
    return Arrivals(prompts, last, last_positions, next_positions, plan, local)

  def _write_control(self, row: int) -> None:
    sample, plan = self.rows[row], self.control.plan
    request, sampling = sample.request, sample.sampling
    plan[row] = grammar.DONE
    plan[row, : len(request.plan)] = request.plan
    image_tokens = self.generator.config.image_tokens
    self.control.guidance[row] = request.guidance_weights(sampling, image_tokens)
    self.control.seeds[row] = sample.seed
    # Without a stream to contrast with, a sample uses top_p.
    contrastive = contrastive_rows(sampling.method, [sample.seed], 1)[0, 0]
    self.control.contrastive[row] = contrastive and len(request.streams) > 1
    for into, value in zip(self.control.values, sampling.values):
      into[row] = value

  def _prompts(self, row: int | None):
    """Returns (tokens that prefill reads of each stream; last id, its position, the next one)."""
    config = self.generator.config
    if row is None:
      streams = len(self.kind.static.widths)
      return [np.zeros((0, 2), np.int32)] * streams, [(config.vocab.pad, 0, 0)] * streams
    request = self.rows[row].request
    tokens, places = [], []
    for prompt in request.streams:
      at = batch_lib.prompt_positions(prompt, request.plan, config.vocab, config.model.align_images)
      tokens.append(batch_lib.prompt_tokens(prompt, at))
      places.append((prompt[-1], at[-2], at[-1]))
    return tokens, places

  def _updates(self) -> list[Update]:
    """Reads what a chunk made, and frees the rows of samples that are over."""
    loop, vocab = self.state.loop, self.generator.config.vocab
    ids, log_probs, apart, parts, steps = jax.device_get(
      (loop.ids, loop.log_probs, loop.divergence, loop.state.part, loop.count)
    )
    updates = []
    for row, sample in enumerate(self.rows):
      if sample is None:
        continue
      count = int((ids[row] != vocab.pad).sum())
      sample.tokens = np.append(sample.tokens, ids[row, :count])
      sample.log_probs = np.append(sample.log_probs, log_probs[row, :count])
      codes = int(vocab.is_image(sample.tokens).sum()) if len(sample.request.streams) > 1 else 0
      over = bool(self.control.plan[row, parts[row], 0] == grammar.DONE)
      updates.append(
        Update(
          sample.ticket,
          sample.tokens,
          sample.log_probs,
          over,
          float(apart[row] / codes) if codes else None,
          int(steps),
        )
      )
      if over:
        self.rows[row] = None
    return updates


class ContinuousGenerator:
  """Generates for requests that come at any time; one thread drives it.

  engine = ContinuousGenerator(generator)
  ticket = engine.add(request.text_to_image(vocab, 256, caption), seed=0)
  while engine.busy:
    for update in engine.step():
      ...  # engine.add and engine.remove are allowed between steps.

  A request joins a lane: a batch of a compiled shape whose rows are at different tokens. A sample
  is that of `Generator.generate` for its request and seed, whatever joins or leaves beside it.
  """

  def __init__(self, generator: Generator, slots: int = 8, chunk: int = 16, lanes: int = 4):
    """Prepares the lanes. Nothing is compiled or allocated before the first step.

    Args:
      generator: of one process; its mesh becomes the current one in each call.
      slots: samples of a lane at once, a multiple of the devices that a batch is split over.
      chunk: steps of a call; then requests join and results are read.
      lanes: largest number of lanes that hold arrays. A lane without samples makes room for one
        that is needed; a busy one takes no more samples if another kind of request waits.

    Raises:
      UserError: a wrong number, or a generator with drafts.
    """
    self.generator, self.mesh = generator, generator.programs.mesh
    with jax.set_mesh(self.mesh):
      self.shards = shards = batch_shards()
    for name, value in (("slots", slots), ("chunk", chunk), ("lanes", lanes)):
      if value < 1:
        raise UserError(f"{name} is {value}; it must be positive.")
    if slots % shards:
      raise UserError(
        f"slots is {slots}; it must be a multiple of {shards}, the devices that share a batch."
      )
    if generator.config.draft_window:
      raise UserError(
        f"draft_window is {generator.config.draft_window}; requests that join at any time are "
        "generated one code a step: set it to 0."
      )
    self.slots, self.chunk, self.limit = slots, chunk, lanes
    self._tickets = itertools.count()
    self._lanes: list[_Lane] = []  # The next to step first.
    self._places: dict[int, tuple[_Lane, int]] = {}

  @property
  def busy(self) -> bool:
    """Whether a sample is under way."""
    return any(lane.busy for lane in self._lanes)

  def has_room(self, request: Request, sampling: SamplingConfig | None = None) -> bool:
    """Returns whether `add` would take a request.

    If all lanes are busy with other kinds of requests, one of them takes no more from now on, so
    that there will be room.
    """
    return self._opens(kind_of(request, sampling or self.generator.config.sampling, self.generator))

  def add(self, request: Request, seed: int, sampling: SamplingConfig | None = None) -> int:
    """Takes a request; the next step of its lane reads its prompts.

    Args:
      request: of `request`.
      seed: an integer in [0, 2^32).
      sampling: default: the config's. A top_k above the config's sorts all logits, in a lane of
        its own; another contrastive_k compiles again.

    Returns:
      Ticket of its updates.

    Raises:
      UserError: it takes more positions than were trained, or a wrong seed.
      NoRoom: see there.
    """
    self.generator.check(request)
    if not 0 <= seed < 2**32:
      raise UserError(f"the seed is {seed}; it must be at least 0 and less than 2^32.")
    sampling = sampling or self.generator.config.sampling
    kind = kind_of(request, sampling, self.generator)
    if not self._opens(kind):
      raise NoRoom("the lane of this request is full: try again after a step.")
    lane = self._open_lane(kind) or self._new_lane(kind)
    ticket = next(self._tickets)
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    self._places[ticket] = lane, lane.add(_Sample(ticket, request, seed, sampling, *none))
    return ticket

  def warm(self, request: Request, sampling: SamplingConfig | None = None) -> None:
    """Compiles all programs of a request's lane, so that no sample waits for them later.

    Raises:
      ValueError: a sample is under way.
      UserError, StepFailed: as `add` and `step`.
    """
    if self.busy:
      raise ValueError("warm is called while samples are under way; call it before them.")
    for of_shard in sorted({1, self.slots // self.shards}):
      tickets = [self.add(request, 0, sampling) for _ in range(of_shard * self.shards)]
      self.step()
      for ticket in tickets:
        self.remove(ticket)

  def remove(self, ticket: int) -> None:
    """Ends a sample; its row is free at once. A ticket that is over or unknown is ignored."""
    if ticket in self._places:
      lane, row = self._places.pop(ticket)
      lane.remove(row)

  def step(self) -> list[Update]:
    """Makes a chunk of the next lane that has samples; returns an update of each of them, or [].

    Raises:
      StepFailed: from the error of JAX; other lanes go on.
    """
    lane = next((lane for lane in self._lanes if lane.busy), None)
    if lane is None:
      return []
    self._lanes.remove(lane)
    try:
      with jax.set_mesh(self.mesh):
        updates = lane.step()
    except Exception as error:
      tickets = [sample.ticket for sample in lane.rows if sample is not None]
      for ticket in tickets:
        del self._places[ticket]
      raise StepFailed(tickets) from error
    self._lanes.append(lane)
    for update in updates:
      if update.over:
        del self._places[update.ticket]
    return updates

  def _open_lane(self, kind: Kind) -> _Lane | None:
    """Returns a lane with a free row: one of this kind, or the smallest busy one that fits."""
    fits = [x for x in self._lanes if x.has_room and kind.fits(x.kind)]
    fits = [x for x in fits if x.busy or x.kind == kind]
    return min(fits, key=lambda lane: lane.kind.slots, default=None)

  def _opens(self, kind: Kind) -> bool:
    """Returns whether a lane has a free row, or could be made."""
    for lane in self._lanes:
      lane.draining &= lane.busy
    if self._open_lane(kind):
      return True
    if any(lane.kind == kind for lane in self._lanes):
      return False
    if len(self._lanes) < self.limit or not all(lane.busy for lane in self._lanes):
      return True
    # Else lanes that are refilled without end would keep this kind from ever having one.
    if not any(lane.draining for lane in self._lanes):
      max(self._lanes, key=lambda lane: lane.rows.count(None)).draining = True
    return False

  def _new_lane(self, kind: Kind) -> _Lane:
    """Makes a lane, in place of the one that was idle for longest if there are too many."""
    if len(self._lanes) >= self.limit:
      self._lanes.remove(next(lane for lane in self._lanes if not lane.busy))
    self._lanes.append(_Lane(kind, self.generator, self.slots, self.chunk, self.shards))
    return self._lanes[-1]

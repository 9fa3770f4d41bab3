"""The samples of a lane: which row each has, the chunks they are made in, what is known of them."""

# B rows of a lane, S guidance streams, G tokens so far, M parts of a plan.

import dataclasses

import jax
from jaxtyping import Float32, Int32
import numpy as np

from cm3leon_jax.decoding import batch as batch_lib
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.batch import Control
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.decoding.lane import Arrivals
from cm3leon_jax.decoding.lane_kinds import Kind
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling import SamplingValues, contrastive_rows

FIXED = (grammar.CODES, grammar.EOSS, grammar.MASK, grammar.END)  # Parts whose length is known.


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
class LaneSample:
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


class Lane:
  """Rows of one kind, with their arrays on the devices."""

  def __init__(self, kind: Kind, generator: Generator, slots: int, chunk: int, shards: int):
    self.kind, self.generator, self.shards = kind, generator, shards
    self.chunk, self.least = chunk, max(1, chunk // 4)
    self.rows: list[LaneSample | None] = [None] * slots
    self.arriving: list[int] = []  # Rows whose prompts are not yet read.
    self.draining = False
    streams, codes = len(kind.static.widths), generator.config.image_tokens
    self.control = Control(
      np.zeros((slots, kind.parts, 3), np.int32),
      np.zeros((slots, codes + 1, streams), np.float32),
      np.zeros(slots, np.uint32),
      np.zeros(slots, bool),
      SamplingValues(*(np.repeat(x, slots) for x in SamplingValues.of(generator.config.sampling))),
    )
    self.placed: Control | None = None  # `control` on the devices, while it is the same.
    self.state = self.program = None
    # Steps of the first rows alone, for a lane with few samples.
    self.few, self.program_of_few = slots // 4 if shards == 1 else 0, None

  @property
  def busy(self) -> bool:
    return any(self.rows)

  @property
  def has_room(self) -> bool:
    return not self.draining and not all(self.rows)

  def add(self, sample: LaneSample) -> int:
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
    program = self._program()
    self.state = program(params, self._place(), self.state, np.int32(self._limit()))
    return self._updates()

  def _program(self) -> jax.stages.Compiled:
    """Returns the steps of all rows, or of the first ones if the samples are in these."""
    if any(self.rows[self.few :]):
      return self.program
    if self.program_of_few is None:
      self.program_of_few = self.generator.programs.lane_steps(
        self.few,
        self.state,
        self.generator.params,
        self._place(),
        self.program,
        self.kind.static,
        self.least,
      )
    return self.program_of_few

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
    for into, value in zip(self.control.values, SamplingValues.of(sampling)):
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

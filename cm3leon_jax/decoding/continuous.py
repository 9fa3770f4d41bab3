"""Continuous batching: requests join and leave compiled batches while others are generated."""

from collections.abc import Sequence
import itertools

import jax
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.decoding.lane_kinds import Kind, kind_of, largest
from cm3leon_jax.decoding.lane_samples import Lane, LaneSample, Update
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.mesh import batch_shards


class NoRoom(Exception):
  """The lane of a request has no free row, or all lanes are at work: try again after a step."""


class StepFailed(Exception):
  """A chunk failed, e.g. for want of memory; its lane and the samples `tickets` are lost."""

  def __init__(self, tickets: Sequence[int]):
    super().__init__(f"a chunk of {len(tickets)} samples failed; they must be added again.")
    self.tickets = list(tickets)


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

  def __init__(
    self,
    generator: Generator,
    slots: int = 8,
    chunk: int = 16,
    lanes: int = 4,
    usual: Sequence[Kind] = (),
  ):
    """Prepares the lanes. Nothing is compiled or allocated before the first step.

    Args:
      generator: of one process; its mesh becomes the current one in each call.
      slots: samples of a lane at once, a multiple of the devices that a batch is split over.
      chunk: steps of a call; then requests join and results are read.
      lanes: largest number of lanes that hold arrays. A lane without samples makes room for one
        that is needed; a busy one takes no more samples if another kind of request waits.
      usual: kinds that `warm` has added, of another engine of this generator.

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
    self.usual = list(usual)
    self._tickets = itertools.count()
    self._lanes: list[Lane] = []  # The next to step first.
    self._places: dict[int, tuple[Lane, int]] = {}

  @property
  def busy(self) -> bool:
    """Whether a sample is under way."""
    return any(lane.busy for lane in self._lanes)

  def has_room(self, request: Request, sampling: SamplingConfig | None = None) -> bool:
    """Returns whether `add` would take a request.

    If all lanes are busy with other kinds of requests, one of them takes no more from now on, so
    that there will be room.
    """
    return self._opens(self._kind(request, sampling or self.generator.config.sampling))

  def add(self, request: Request, seed: int, sampling: SamplingConfig | None = None) -> int:
    """Takes a request; the next step of its lane reads its prompts.

    Args:
      request: of `request`.
      seed: an integer in [0, 2^32).
      sampling: default: the config's. A top_k above the config's sorts all logits, in another
        lane; another contrastive_k compiles again.

    Returns:
      Ticket of its updates.

    Raises:
      UserError: it takes more positions than were trained, or a wrong seed.
      NoRoom: see there.
    """
    sampling = sampling or self.generator.config.sampling
    return self._add(self._kind(request, sampling), request, seed, sampling)

  def _add(self, kind: Kind, request: Request, seed: int, sampling: SamplingConfig) -> int:
    self.generator.check(request)
    if not 0 <= seed < 2**32:
      raise UserError(f"the seed is {seed}; it must be at least 0 and less than 2^32.")
    if not self._opens(kind):
      raise NoRoom("the lane of this request is full: try again after a step.")
    lane = self._open_lane(kind) or self._new_lane(kind)
    ticket = next(self._tickets)
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    self._places[ticket] = lane, lane.add(LaneSample(ticket, request, seed, sampling, *none))
    return ticket

  def warm(
    self, request: Request, sampling: SamplingConfig | None = None, longest: bool = False
  ) -> None:
    """Compiles all programs of a request's lane, so that no sample waits for them later.

    From then on a request takes the smallest lane that is warm and can hold it, else the `largest`
    one of its number of streams: requests of any lengths compile one more lane for each number.

    Args:
      request: of `request`.
      sampling: default: the config's.
      longest: warms the `largest` lane of its number of streams instead.

    Raises:
      ValueError: a sample is under way.
      UserError, StepFailed: as `add` and `step`.
    """
    if self.busy:
      raise ValueError("warm is called while samples are under way; call it before them.")
    sampling = sampling or self.generator.config.sampling
    kind = kind_of(request, sampling, self.generator)
    if longest:
      kind = largest(kind, self.generator.config)
    for of_shard in sorted({1, self.slots // self.shards}):
      tickets = [self._add(kind, request, 0, sampling) for _ in range(of_shard * self.shards)]
      self.step()
      for ticket in tickets:
        self.remove(ticket)
    if kind not in self.usual:
      self.usual.append(kind)

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

  def _kind(self, request: Request, sampling: SamplingConfig) -> Kind:
    """Returns the kind of a request: its own if nothing is warm, else as `warm` says."""
    own = kind_of(request, sampling, self.generator)
    if not self.usual:
      return own
    known = [*self.usual, largest(own, self.generator.config)]
    fits = [kind for kind in known if kind.takes(request, own)]
    return min(fits, key=lambda kind: kind.slots, default=own)

  def _open_lane(self, kind: Kind) -> Lane | None:
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

  def _new_lane(self, kind: Kind) -> Lane:
    """Makes a lane, in place of the one that was idle for longest if there are too many."""
    if len(self._lanes) >= self.limit:
      self._lanes.remove(next(lane for lane in self._lanes if not lane.busy))
    self._lanes.append(Lane(kind, self.generator, self.slots, self.chunk, self.shards))
    return self._lanes[-1]

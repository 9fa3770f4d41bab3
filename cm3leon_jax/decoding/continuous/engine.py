"""Continuous batching: requests are admitted to running batches while others are generated."""

from collections.abc import Sequence
import itertools

import jax

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.continuous.buckets import Bucket, bucket_of, largest
from cm3leon_jax.decoding.continuous.slots import ActiveRequest, RunningBatch, Update
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.mesh import batch_shards


class NoFreeSlot(Exception):
  """No batch has a free slot for a request, or all are active: try again after a step."""


class StepFailed(Exception):
  """A chunk failed, e.g. for want of memory; its batch and the samples `tickets` are lost."""

  def __init__(self, tickets: Sequence[int]):
    super().__init__(f"a chunk of {len(tickets)} samples failed; they must be admitted again.")
    self.tickets = list(tickets)


class ContinuousGenerator:
  """Generates for requests that come at any time; one thread drives it.

  engine = ContinuousGenerator(generator)
  ticket = engine.admit(request.text_to_image(vocab, 256, caption), seed=0)
  while engine.active:
    for update in engine.step():
      ...  # engine.admit and engine.remove are allowed between steps.

  A request is admitted to a slot of a running batch. The batch has the compiled shapes of a bucket,
  and its slots are at different tokens. A sample is that of `Generator.generate` for its request
  and seed, whatever is admitted or removed beside it.
  """

  def __init__(
    self,
    generator: Generator,
    slots: int = 8,
    chunk: int = 16,
    buckets: int = 4,
    usual: Sequence[Bucket] = (),
  ):
    """Prepares the generator. Nothing is compiled or allocated before the first step.

    Args:
      generator: of one process; its mesh becomes the current one in each call.
      slots: requests of a batch at once, a multiple of the devices that a batch is split over.
      chunk: steps of a call; then requests are admitted and results are read.
      buckets: largest number of running batches, each of one bucket. A batch without requests gives
        its memory to one that is needed; an active one admits no more if a request of another
        bucket waits.
      usual: buckets that `warm` has added, of another engine of this generator.

    Raises:
      UserError: a wrong number, or a generator with drafts.
    """
    self.generator, self.mesh = generator, generator.programs.mesh
    with jax.set_mesh(self.mesh):
      self.shards = shards = batch_shards()
    for name, value in (("slots", slots), ("chunk", chunk), ("buckets", buckets)):
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
    self.slots, self.chunk, self.limit = slots, chunk, buckets
    self.usual = list(usual)
    self._tickets = itertools.count()
    self._batches: list[RunningBatch] = []  # The next to step first.
    self._places: dict[int, tuple[RunningBatch, int]] = {}

  @property
  def active(self) -> bool:
    """Whether a request is active."""
    return any(batch.active for batch in self._batches)

  def can_admit(self, request: Request, sampling: SamplingConfig | None = None) -> bool:
    """Returns whether `admit` would take a request.

    If all batches are active with requests of other buckets, one of them admits no more from now
    on, so that there will be memory for this one.
    """
    return self._admits(self._bucket(request, sampling or self.generator.config.sampling))

  def admit(self, request: Request, seed: int, sampling: SamplingConfig | None = None) -> int:
    """Admits a request; the next step of its batch reads its prompts.

    Args:
      request: of `request`.
      seed: an integer in [0, 2^32).
      sampling: default: the config's. A top_k above the config's sorts all logits, in another
        bucket; another method or contrastive_k compiles again.

    Returns:
      Ticket of its updates.

    Raises:
      UserError: it takes more positions than were trained, or a wrong seed.
      NoFreeSlot: see there.
    """
    sampling = sampling or self.generator.config.sampling
    return self._admit(self._bucket(request, sampling), request, seed, sampling)

  def _admit(self, bucket: Bucket, request: Request, seed: int, sampling: SamplingConfig) -> int:
    self.generator.check(request)
    if not 0 <= seed < 2**32:
      raise UserError(f"the seed is {seed}; it must be at least 0 and less than 2^32.")
    if not self._admits(bucket):
      raise NoFreeSlot("this request's bucket has no free slot: try again after a step.")
    batch = self._free_batch(bucket) or self._new_batch(bucket)
    ticket = next(self._tickets)
    slot = batch.admit(ActiveRequest(ticket, request, seed, sampling))
    self._places[ticket] = batch, slot
    return ticket

  def warm(
    self, request: Request, sampling: SamplingConfig | None = None, in_largest: bool = False
  ) -> None:
    """Compiles all programs of a request's bucket, so that no sample waits for them later.

    From then on a request takes the smallest bucket that is warm and can hold it, else the
    `largest` one of its number of streams: requests of any lengths compile one more bucket for each
    number.

    Args:
      request: of `request`.
      sampling: default: the config's.
      in_largest: warms the `largest` bucket of its number of streams instead.

    Raises:
      ValueError: a request is active.
      UserError, StepFailed: as `admit` and `step`.
    """
    if self.active:
      raise ValueError("warm is called while samples are under way; call it before them.")
    sampling = sampling or self.generator.config.sampling
    bucket = bucket_of(request, sampling, self.generator)
    if in_largest:
      bucket = largest(bucket, self.generator.config)
    for of_shard in sorted({1, self.slots // self.shards}):
      tickets = [self._admit(bucket, request, 0, sampling) for _ in range(of_shard * self.shards)]
      self.step()
      for ticket in tickets:
        self.remove(ticket)
    if bucket not in self.usual:
      self.usual.append(bucket)

  def remove(self, ticket: int) -> None:
    """Ends a sample; its slot is free at once. A ticket that is finished or unknown is ignored."""
    if ticket in self._places:
      batch, slot = self._places.pop(ticket)
      batch.remove(slot)

  def step(self) -> list[Update]:
    """Generates a chunk of the next active batch; returns an update of each request, or [].

    Raises:
      StepFailed: from the error of JAX; other batches go on.
    """
    batch = next((batch for batch in self._batches if batch.active), None)
    if batch is None:
      return []
    self._batches.remove(batch)
    try:
      with jax.set_mesh(self.mesh):
        updates = batch.step()
    except Exception as error:
      tickets = [active.ticket for active in batch.slots if active is not None]
      for ticket in tickets:
        del self._places[ticket]
      raise StepFailed(tickets) from error
    self._batches.append(batch)
    for update in updates:
      if update.finished:
        del self._places[update.ticket]
    return updates

  def _bucket(self, request: Request, sampling: SamplingConfig) -> Bucket:
    """Returns the bucket of a request: its own if nothing is warm, else as `warm` says."""
    own = bucket_of(request, sampling, self.generator)
    if not self.usual:
      return own
    known = [*self.usual, largest(own, self.generator.config)]
    fits = [bucket for bucket in known if bucket.holds(request, own)]
    return min(fits, key=lambda bucket: bucket.capacity, default=own)

  def _free_batch(self, bucket: Bucket) -> RunningBatch | None:
    """Returns a batch with a free slot: of this bucket, or the smallest active one that fits."""
    fits = [x for x in self._batches if x.can_admit and bucket.fits(x.bucket)]
    fits = [x for x in fits if x.active or x.bucket == bucket]
    return min(fits, key=lambda batch: batch.bucket.capacity, default=None)

  def _admits(self, bucket: Bucket) -> bool:
    """Returns whether a batch has a free slot, or could be made."""
    for batch in self._batches:
      batch.draining &= batch.active
    if self._free_batch(bucket):
      return True
    if any(batch.bucket == bucket for batch in self._batches):
      return False
    if len(self._batches) < self.limit or not all(batch.active for batch in self._batches):
      return True
    # Else batches that are refilled without end would keep this bucket from ever having one.
    if not any(batch.draining for batch in self._batches):
      max(self._batches, key=lambda batch: batch.slots.count(None)).draining = True
    return False

  def _new_batch(self, bucket: Bucket) -> RunningBatch:
    """Makes a batch, in place of the one that was idle for longest if there are too many."""
    if len(self._batches) >= self.limit:
      self._batches.remove(next(batch for batch in self._batches if not batch.active))
    self._batches.append(RunningBatch(bucket, self.generator, self.slots, self.chunk, self.shards))
    return self._batches[-1]

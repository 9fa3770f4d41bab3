"""Implements continuous batching: requests enter and leave slots of running batches."""

from collections.abc import Sequence
import itertools

import jax

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding.continuous.buckets import Bucket, bucket_of, largest
from cm3leon_jax.decoding.continuous.slots import ActiveRequest, RunningBatch, Update
from cm3leon_jax.decoding.generator import Generator
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import batch_shards


class NoFreeSlot(Exception):
  """No slot is free for a request, and no batch can be made yet. Try again after a `step`."""


class StepFailed(Exception):
  """A chunk failed, for example for lack of memory. The samples with these `tickets` are lost."""

  def __init__(self, tickets: Sequence[int]):
    super().__init__(f"a chunk of {len(tickets)} samples failed; they must be admitted again.")
    self.tickets = list(tickets)


class ContinuousGenerator:
  """Generates samples for requests that arrive at any time. Only one thread may use it.

  engine = ContinuousGenerator(generator)
  ticket = engine.admit(request.text_to_image(vocab, 256, caption), seed=0)
  while engine.active:
    for update in engine.step():
      ...  # engine.admit and engine.remove are allowed between steps.

  A request is admitted to a slot of a running batch. The batch has the compiled shapes of a bucket.
  Samples in different slots may have different numbers of tokens. A sample equals the result of
  `Generator.generate` for the same request and seed, whatever the other slots contain.
  """

  def __init__(
    self,
    generator: Generator,
    slots: int = 8,
    chunk: int = 16,
    buckets: int = 4,
    usual: Sequence[Bucket] = (),
  ):
    """Creates an engine. Nothing is compiled or allocated before the first step.

    Args:
      generator: a generator in a job of one process. The methods make its mesh the current mesh.
      slots: number of slots of a running batch, a multiple of the number of devices over which a
        batch is sharded.
      chunk: usual number of decoding steps per call of `step`.
      buckets: largest number of running batches, each with a different bucket. A batch without
        requests is replaced when another bucket needs a batch. If all batches are active and a
        request of another bucket waits, one batch stops admitting requests.
      usual: buckets of the requests to expect. A request uses the smallest of them that can hold
        it, or else the `largest` bucket of its number of streams. So at most one more bucket is
        compiled for each number of streams. Without `usual`, each request uses its own bucket.

    Raises:
      UserError: `slots` is not a multiple of the number of devices.
    """
    self.generator, self.mesh = generator, generator.programs.mesh
    with jax.set_mesh(self.mesh):
      self.shards = shards = batch_shards()
    if slots % shards:
      raise UserError(
        f"slots is {slots}; it must be a multiple of {shards}, the number of devices that share a "
        "batch."
      )
    self.slots, self.chunk, self.limit = slots, chunk, buckets
    self.usual = list(usual)
    self._tickets = itertools.count()
    self._batches: list[RunningBatch] = []  # In the order of their next steps.
    self._places: dict[int, tuple[RunningBatch, int]] = {}

  @property
  def active(self) -> bool:
    """Whether any request is unfinished."""
    return any(batch.active for batch in self._batches)

  def can_admit(self, request: Request, sampling: SamplingConfig | None = None) -> bool:
    """Returns whether `admit` would accept a request now.

    If all batches are active with other buckets, one of them stops admitting requests, so that this
    request gets a batch later.
    """
    return self.has_place(self.bucket(request, sampling or self.generator.config.sampling))

  def admit(self, request: Request, seed: int, sampling: SamplingConfig | None = None) -> int:
    """Admits a request to a free slot. The next step of its batch reads its prompts.

    Args:
      seed: an integer in [0, 2^32).
      sampling: sampling settings; default: the config's. A top_k above the config's needs another
        bucket, which sorts all logits. A new method or contrastive_k causes recompilation.

    Returns:
      A ticket, which the updates of the sample contain.

    Raises:
      UserError: the request needs more positions than were trained, or the seed is out of range.
      NoFreeSlot: no slot is free and no batch can be made; try again after a step.
    """
    sampling = sampling or self.generator.config.sampling
    return self._admit(self.bucket(request, sampling), request, seed, sampling)

  def _admit(self, bucket: Bucket, request: Request, seed: int, sampling: SamplingConfig) -> int:
    self.generator.check(request)
    if not 0 <= seed < 2**32:
      raise UserError(f"the seed is {seed}; it must be at least 0 and less than 2^32.")
    if not self.has_place(bucket):
      raise NoFreeSlot("this request's bucket has no free slot: try again after a step.")
    batch = self._free_batch(bucket) or self._new_batch(bucket)
    ticket = next(self._tickets)
    slot = batch.admit(ActiveRequest(ticket, request, seed, sampling))
    self._places[ticket] = batch, slot
    return ticket

  def warm(self, bucket: Bucket, request: Request, sampling: SamplingConfig, together: int) -> None:
    """Compiles the programs that `together` requests need which enter a bucket at the same time.

    Two calls compile all programs of a bucket, so that no sample waits for compilation later: with
    one request for each device that shares a batch, and with `slots` requests.

    Raises:
      ValueError: a request is active.
      UserError, StepFailed: see `admit` and `step`.
    """
    if self.active:
      raise ValueError("warm was called while requests are active; call it before admitting any.")
    tickets = [self._admit(bucket, request, 0, sampling) for _ in range(together)]
    self.step()
    for ticket in tickets:
      self.remove(ticket)

  def remove(self, ticket: int) -> None:
    """Ends a sample and immediately frees its slot. Finished or unknown tickets are ignored."""
    if ticket in self._places:
      batch, slot = self._places.pop(ticket)
      batch.remove(slot)

  def step(self) -> list[Update]:
    """Generates a chunk in the next active batch. Returns an update for each request of the batch.

    Returns [] if no batch is active.

    Raises:
      StepFailed: JAX failed; its error is the cause. Other batches are not affected.
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

  def bucket(self, request: Request, sampling: SamplingConfig) -> Bucket:
    """Returns the bucket that a request uses, see `usual`. It stays the same."""
    own = bucket_of(request, sampling, self.generator)
    if not self.usual:
      return own
    known = [*self.usual, largest(own, self.generator.config)]
    fits = [bucket for bucket in known if bucket.holds(request, own)]
    return min(fits, key=lambda bucket: bucket.capacity, default=own)

  def _free_batch(self, bucket: Bucket) -> RunningBatch | None:
    """Returns the batch of smallest capacity that fits the bucket and has a free slot."""
    fits = [x for x in self._batches if x.can_admit and bucket.fits(x.bucket)]
    fits = [x for x in fits if x.active or x.bucket == bucket]
    return min(fits, key=lambda batch: batch.bucket.capacity, default=None)

  def has_place(self, bucket: Bucket) -> bool:
    """Returns whether a batch has a free slot for a bucket or a new batch can be made."""
    for batch in self._batches:
      batch.draining &= batch.active
    if self._free_batch(bucket):
      return True
    if any(batch.bucket == bucket for batch in self._batches):
      return False
    if len(self._batches) < self.limit or not all(batch.active for batch in self._batches):
      return True
    # Drain one batch. Otherwise steady requests for other buckets could block this bucket forever.
    if not any(batch.draining for batch in self._batches):
      max(self._batches, key=lambda batch: batch.slots.count(None)).draining = True
    return False

  def _new_batch(self, bucket: Bucket) -> RunningBatch:
    """Makes a batch. If there are too many batches, it replaces the batch that was idle longest."""
    if len(self._batches) >= self.limit:
      self._batches.remove(next(batch for batch in self._batches if not batch.active))
    self._batches.append(RunningBatch(bucket, self.generator, self.slots, self.chunk, self.shards))
    return self._batches[-1]

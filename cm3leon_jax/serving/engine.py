"""Runs all computation in one thread, which accepts jobs, decodes chunks and delivers events."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import itertools
import logging
import threading

import jax
import numpy as np

from cm3leon_jax.decoding.continuous.buckets import Bucket, largest
from cm3leon_jax.decoding.continuous.engine import ContinuousGenerator, StepFailed
from cm3leon_jax.decoding.continuous.slots import Update
from cm3leon_jax.decoding.result import sample_seed
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.serving import jobs as jobs_lib
from cm3leon_jax.serving.errors import QUEUE_FULL, ApiError, internal, stopping
from cm3leon_jax.serving.jobs import Event, Failed, Job, Neighbor, OpenJob, Progress
from cm3leon_jax.serving.tasks import refused

PAUSE = 1.0  # Seconds without a job after which the next program is compiled.
_LOG = logging.getLogger("cm3leon_jax.serving")
_Part = tuple[OpenJob, int, Update]  # Job, index of a sample, its tokens so far.


class Engine:
  """Prepares jobs, decodes them chunk by chunk and delivers their events, all in one thread."""

  def __init__(
    self,
    pipeline: Pipeline,
    mesh: jax.sharding.Mesh,
    *,
    slots: int = 8,
    chunk: int = 16,
    buckets: int = 8,
    queue_limit: int = 64,
    store: Callable[[], object] = lambda: None,
  ):
    """Creates an engine. `start` starts its thread.

    Args:
      mesh: mesh on which the pipeline was loaded.
      slots: number of slots of each bucket.
      chunk: number of steps between two deliveries of events.
      buckets: number of buckets between which decoding alternates; see `ContinuousGenerator`.
      queue_limit: largest number of jobs with samples that wait for a slot.
      store: stores compiled programs; it is called after each that no request waits for.

    Raises:
      UserError: `slots` is not divisible by the number of devices that share a batch.
    """
    self.pipeline, self.slots, self.queue_limit = pipeline, slots, queue_limit
    self._mesh, self._chunk, self._buckets, self._store = mesh, chunk, buckets, store
    # Decode a single image as a batch of one, and several images as a batch padded to `slots`.
    self._tokenizers = {n: pipeline.image_tokenizer.in_batches(n) for n in (1, slots)}
    self._changed = threading.Condition()
    self._incoming: deque[Job] = deque()
    self._places: set[object] = set()  # Reserved for requests that are being read.
    self._open: deque[OpenJob] = deque()
    self._known: dict[tuple[str, str], Neighbor] = {}  # See `open_jobs`.
    # Ticket -> a job and the index of one of its samples.
    self._running: dict[int, tuple[OpenJob, int]] = {}
    self._generator = self._fresh()
    self._closing, self._warming = False, self._warm_up()
    self._pause: float | None = PAUSE  # Seconds until `_turn` compiles; None: all is compiled.
    self.is_warm = False  # Whether all programs of usual requests are compiled.
    self._ready = threading.Event()
    self.failure: BaseException | None = None
    self.samples = self.tokens = 0
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def start(self) -> None:
    """Starts the thread. `is_ready` becomes True when the first programs are compiled."""
    self._thread.start()

  def close(self, seconds: float = 10) -> bool:
    """Ends the thread after its current chunk. Returns whether it ended within `seconds`."""
    with self._changed:
      self._closing = True
      self._changed.notify()
    self._thread.join(seconds)
    return not self._thread.is_alive()

  @property
  def is_ready(self) -> bool:
    """Whether the first programs are compiled and the engine is not closing."""
    return self._ready.is_set() and not self._closing

  def wait_until_ready(self) -> bool:
    """Waits until `is_ready`. Returns False if the engine ended instead."""
    self._ready.wait()
    return self.is_ready

  @contextlib.contextmanager
  def place(self) -> Iterator[object]:
    """Reserves a place in the queue while a request is read. For errors, see `submit`."""
    place = object()
    with self._changed:
      self._check_queue()
      self._places.add(place)
    try:
      yield place
    finally:
      self._places.discard(place)

  def submit(self, job: Job, place: object = None) -> None:
    """Queues a job and frees the place that was reserved for it.

    Raises:
      ApiError: 429 if too many jobs wait, 503 if the engine has ended.
    """
    with self._changed:
      self._places.discard(place)
      self._check_queue()
      self._incoming.append(job)
      self._changed.notify()

  def _check_queue(self) -> None:
    if self._closing or self.failure is not None:
      raise stopping()
    if self.waiting >= self.queue_limit:
      message = f"{self.queue_limit} requests are already waiting: try again later."
      raise ApiError(429, message, code=QUEUE_FULL)

  def cancel(self, job: Job) -> None:
    """Cancels a job. It leaves the queue immediately, and frees its slots before the next chunk."""
    with self._changed:
      job.cancelled = True
      with contextlib.suppress(ValueError):
        self._incoming.remove(job)
      self._changed.notify()

  @property
  def waiting(self) -> int:
    """Number of jobs with a sample that has no slot yet, plus reserved places."""
    return len(self._places) + len(self._incoming) + sum(o.waits for o in list(self._open))

  @property
  def active(self) -> int:
    """Number of jobs that are not answered yet, plus reserved places."""
    running = {id(opened) for opened, _ in list(self._running.values())}
    begun = len({id(o) for o in list(self._open)} | running)
    return len(self._places) + len(self._incoming) + begun

  @property
  def running(self) -> int:
    """Number of samples that have a slot."""
    return len(self._running)

  @property
  def _busy(self) -> bool:
    return bool(self._incoming or self._open or self._running)

  def _run(self) -> None:
    try:
      with jax.set_mesh(self._mesh):
        next(self._warming)
        self._ready.set()
        while self._turn():
          pass
    except BaseException as error:
      _LOG.exception("the engine has ended")
      self.failure = error
    finally:
      with self._changed:
        self._closing = True
        self._ready.set()
        jobs = [*self._incoming, *(o.job for o in self._open)]
        jobs += [o.job for o, _ in self._running.values()]
        self._incoming.clear()
      for job in dict.fromkeys(jobs):
        job.deliver(Failed(stopping()))

  def _fresh(self, usual: Sequence[Bucket] = ()) -> ContinuousGenerator:
    sizes = self.slots, self._chunk, self._buckets
    return ContinuousGenerator(self.pipeline.generator, *sizes, usual)

  def _warm_up(self) -> Iterator[bool]:
    """Tries all usual tasks, then compiles one of the other programs at a time."""
    pipeline, tasks, events = self.pipeline, jobs_lib.usual_tasks(self.pipeline), list[Event]()
    usual = jobs_lib.usual_buckets(pipeline, tasks)
    self._generator = self._fresh(list(usual))
    for job in jobs_lib.warm_up_jobs(tasks, events.append):
      self._prepare([job])
      while self._open or self._running:
        self._compute()
      if isinstance(events[-1], Failed) and isinstance(job.task, TextToImage):
        raise RuntimeError(f"the server cannot start: a test of {job.task.name} failed.")
      self._store()
    yield True
    large = {largest(bucket, pipeline.generator.config): usual[bucket] for bucket in usual}
    sizes = sorted({self._generator.shards, self.slots})
    for cases, together in itertools.product((usual, large), sizes):
      for bucket, case in cases.items():
        # A new generator for each large bucket: only one of them has arrays at a time.
        generator = self._generator if cases is usual else self._fresh()
        try:
          generator.warm(bucket, *case, together)
        except StepFailed:
          _LOG.exception("a program could not be compiled or run")
          events.append(Failed(internal()))
        self._store()
        yield True
    self.is_warm = not any(isinstance(event, Failed) for event in events)

  def _turn(self) -> bool:
    """Waits for jobs and computes one chunk. Returns False if the engine is closing.

    If no job comes for a moment, it compiles the next program of `_warm_up`.
    """
    with self._changed:
      self._changed.wait_for(lambda: self._closing or self._busy, self._pause)
      if self._closing:
        return False
      # Prepare jobs together, because retrieval costs the same for one job and for a batch.
      most = self.slots if sum(o.begun == 0 for o in self._open) < self.slots else 0
      taken = [self._incoming.popleft() for _ in range(min(most, len(self._incoming)))]
    self._prepare([job for job in taken if not job.cancelled])
    try:
      if self._busy:
        self._compute()
        self._pause = None if self._pause is None else PAUSE
      else:
        self._pause = 0.0 if next(self._warming, False) else None
    except Exception:
      _LOG.exception("decoding has failed")
      self._fail_running()
    return True

  def _prepare(self, jobs: Sequence[Job]) -> None:
    """Opens jobs together and delivers `Started`. A failure to open a job affects only this job."""
    if not jobs:
      return
    try:
      opened = jobs_lib.open_jobs(self.pipeline, jobs, self._decoded, self._known)
    except Exception as error:
      for job in jobs if len(jobs) > 1 else ():
        self._prepare([job])
      if len(jobs) == 1:
        jobs[0].deliver(Failed(self._error(error, "a request could not be prepared")))
      return
    for one, started in opened:
      self._open.append(one)
      one.job.deliver(started)

  def _decoded(self, codes: Sequence[np.ndarray]) -> Iterable[np.ndarray]:
    tokenizer = self._tokenizers[1 if len(codes) == 1 else self.slots]
    return tokenizer.decode(np.stack(codes)) if len(codes) else ()

  def _error(self, error: Exception, what: str) -> ApiError:
    """Converts an error to one for the client, without paths. Logs unexpected errors."""
    if not isinstance(error, UserError):
      _LOG.exception(what)
      return internal()
    bank = self.pipeline.bank
    return refused(str(error) if bank is None else str(error).replace(str(bank), "the bank"))

  def _compute(self) -> None:
    """Removes cancelled jobs, admits samples to free slots, decodes a chunk and delivers it."""
    self._drop()
    self._fill()
    try:
      updates = self._generator.step()
    except StepFailed as error:
      _LOG.exception("a chunk has failed")
      for ticket in error.tickets:
        opened, _ = self._running.pop(ticket)
        self._fail(opened, internal())
      self._drop()
      return
    self._deliver(updates)

  def _drop(self) -> None:
    for ticket, (opened, _) in list(self._running.items()):
      if opened.job.cancelled or opened.failed:
        self._generator.remove(ticket)
        del self._running[ticket]
    self._open = deque(o for o in self._open if not (o.job.cancelled or o.failed))

  def _fill(self) -> None:
    """Starts samples while slots are free. A slot goes to the job with the fewest running samples.

    Among several, it goes to the one that got no slot for the longest time, if its bucket has one.
    """
    running, full = Counter(opened for opened, _ in self._running.values()), list[Bucket]()
    while waiting := [opened for opened in self._open if opened.bucket not in full]:
      opened = min(waiting, key=lambda one: running[one])
      if opened.bucket is None:
        opened.bucket = self._generator.bucket(opened.request, opened.job.task.sampling)
      if not self._generator.has_place(opened.bucket):
        full.append(opened.bucket)
        continue
      full.clear()  # A new batch also has slots for requests of smaller buckets.
      running[opened] += self._begin(opened)
      self._open.remove(opened)
      if opened.waits and not opened.failed:
        self._open.append(opened)

  def _begin(self, opened: OpenJob) -> bool:
    job, index = opened.job, opened.begun
    try:
      seed = sample_seed(job.task.seed, index)
      ticket = self._generator.admit(opened.request, seed, job.task.sampling)
    except Exception as error:
      self._fail(opened, self._error(error, "a sample could not begin"))
      return False
    opened.begun += 1
    self._running[ticket] = (opened, index)
    return True

  def _fail(self, opened: OpenJob, error: ApiError) -> None:
    if not opened.failed:
      opened.failed = True
      opened.job.deliver(Failed(error))

  def _fail_running(self) -> None:
    """Reports a failure to all jobs that have slots. Jobs without slots stay in the queue."""
    for opened, _ in self._running.values():
      self._fail(opened, internal())
    self._running.clear()
    self._open = deque(o for o in self._open if not o.failed)
    self._generator = self._fresh(self._generator.usual)

  def _deliver(self, updates: Sequence[Update]) -> None:
    finished, shown = [], []  # Images of several samples are decoded and scored together.
    for update in updates:
      opened, index = self._running[update.ticket]
      if update.finished:
        del self._running[update.ticket]
        if not opened.job.warms_up:
          self.samples += 1
          self.tokens += len(update.result.tokens)
      if opened.job.cancelled or opened.failed:
        continue
      if update.finished:
        finished.append((opened, index, update))
      elif opened.job.shows_progress:
        shown.append((opened, index, update))
    self._together(self._show, shown)
    self._together(self._finish, finished)

  def _together(self, deliver: Callable[[Sequence[_Part]], None], parts: Sequence[_Part]) -> None:
    """Delivers parts together. After an error, delivers them one by one, so only one job fails."""
    if not parts:
      return
    try:
      deliver(parts)
    except Exception:
      if len(parts) > 1:
        for part in parts:
          self._together(deliver, [] if part[0].failed else [part])
      else:
        _LOG.exception("a sample could not be made of its tokens")
        self._fail(parts[0][0], internal())

  def _finish(self, finished: Sequence[_Part]) -> None:
    opened = [one for one, _, _ in finished]
    results = [dataclasses.replace(update.result, sample=index) for _, index, update in finished]
    for one, event in zip(opened, jobs_lib.finished(self.pipeline, opened, results), strict=True):
      one.job.deliver(event)

  def _show(self, parts: Sequence[_Part]) -> None:
    """Delivers new rows of images and new texts."""
    layout, images = self.pipeline.layout, []
    for opened, index, update in parts:
      made = opened.job.task.partial(layout, update.result.tokens, opened.codes)
      if isinstance(made, str):
        opened.job.deliver(Progress(index, text=made))
      elif made.rows > opened.rows.get(index, 0):
        images.append((opened, index, made))
    decoded = self._decoded([made.codes for *_, made in images])
    for (opened, index, made), image in zip(images, decoded, strict=True):
      opened.rows[index] = made.rows
      opened.job.deliver(Progress(index, made.rows, made.shown(image)))

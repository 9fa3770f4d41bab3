"""Processes shards locally or in Ray workers. A restart repeats only unfinished shards."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import json
import types
from typing import Protocol

from etils import epath

from cm3leon_jax import extras
from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.files import buckets
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.json_files import plain, read_json, write_json
from cm3leon_jax.files.progress import progress_bar

RUNNERS = ("local", "ray")


@dataclasses.dataclass(frozen=True)
class Runner:
  """Where shards are processed.

  Attributes:
    kind: "local" (in this process) or "ray".
    address: address of a Ray cluster. "auto" uses the running cluster of this machine; "" starts
      one.
    workers: number of Ray workers. Each worker processes one shard at a time.
    worker_cpus: CPUs that Ray reserves for each worker.
  """

  kind: str = "local"
  address: str = ""
  workers: int = 1
  worker_cpus: float = 1.0


class ShardJob(Protocol):
  """Work to do on every shard. It is pickled, so it contains configs and paths but no models."""

  def open(self) -> Callable[[str], dict]:
    """Loads what all shards need. Called once in each worker.

    Returns a function that takes the name of a shard, processes the shard, and returns its summary.
    The function must write files atomically (`atomic.replacing`), and the same bytes on machines of
    the same kind, except for an index of ScaNN (docs/pods.md).
    """
    ...


Results = Iterator[tuple[str, dict]]


def run_shards(
  job: ShardJob,
  shards: dict[str, dict],
  folder: epath.PathLike,
  runner: Runner,
  bar: str,
  is_whole: Callable[[str], bool] = lambda name: True,
) -> Results:
  """Processes the shards that are not finished.

  Args:
    shards: maps the name of each shard to the config that its result depends on. If this config
      changes, the shard is processed again.
    folder: where a record, NAME.json, of every finished shard is written.
    is_whole: returns whether all files of the named shard still exist. If not, the shard is
      processed again.

  Yields:
    (name, summary) of every shard: first the shards that were finished before, then the others
    as they finish.

  Raises:
    UserError: a shard failed; finished shards stay finished.
    TryAgain: a GCS bucket failed.
  """
  folder = epath.Path(folder)
  finished, pending = [], []
  for name, config in shards.items():
    path = folder / f"{name}.json"
    record = read_json(path, {"config": dict, "summary": dict}) if exists(path) else {}
    done = record.get("config") == plain(config) and is_whole(name)
    finished += [(name, record["summary"])] if done else []
    pending += [] if done else [{"shard": name, "config": json.dumps(plain(config))}]
  yield from finished
  if runner.kind == "ray" and pending:
    results = _ray(job, folder, pending, runner)
  else:
    results = map(_result, map(_Worker(job, folder), pending))
  with progress_bar(total=len(shards), initial=len(finished), desc=bar, unit="shard") as progress:
    for name, summary in results:
      progress.update()
      yield name, summary


def forget(folder: epath.PathLike, names: Iterable[str]) -> None:
  """Deletes the records of finished shards, so that these shards are processed again."""
  for name in names:
    (epath.Path(folder) / f"{name}.json").unlink(missing_ok=True)


class _Worker:
  """Processes shards and records their summaries. Each Ray worker has one instance."""

  def __init__(self, job: ShardJob, folder: epath.Path) -> None:
    buckets.prepare_access()
    self._job, self._folder = job, folder
    self._process: Callable[[str], dict] | None = None

  def __call__(self, row: dict) -> dict:
    """Processes the shard in {"shard": name, "config": JSON}.

    Returns {"shard": name, "summary": JSON, "error": "", "again": False}. After a UserError,
    "error" is its message, and "again" is True if the same command may succeed later.
    """
    name = row["shard"]
    try:
      if self._process is None:
        self._process = self._job.open()
      summary = plain(self._process(name))
      config = json.loads(row["config"])
      write_json(self._folder / f"{name}.json", {"config": config, "summary": summary})
    except Exception as error:  # Ray would wrap the exception in its own type.
      reason = buckets.failure(error)
      if not reason and not isinstance(error, UserError):
        raise
      again = isinstance(error, TryAgain) or bool(reason)
      return {"shard": name, "summary": "", "error": reason or str(error), "again": again}
    return {"shard": name, "summary": json.dumps(summary), "error": "", "again": False}


def _result(row: dict) -> tuple[str, dict]:
  if row["again"]:
    raise TryAgain(f"shard {row['shard']}: {row['error']}")
  if row["error"]:
    raise UserError(row["error"])
  return row["shard"], json.loads(row["summary"])


def _ray(job: ShardJob, folder: epath.Path, rows: list[dict], runner: Runner) -> Results:
  try:
    import ray
  except ImportError as error:
    raise UserError(f"--runner=ray needs Ray ({error}): {extras.install('ray')}.") from error
  started = not ray.is_initialized()
  if started:
    _connect(ray, runner)
  try:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # `run_shards` shows its own bar.
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=min(runner.workers, len(rows)))
    items = ray.data.from_items(rows, override_num_blocks=len(rows))
    results = items.map(
      _Worker, fn_constructor_args=(job, folder), compute=workers, num_cpus=runner.worker_cpus
    )
    for row in results.iter_rows():
      yield _result(row)
  finally:
    if started:
      ray.shutdown()


def _connect(ray: types.ModuleType, runner: Runner) -> None:
  if runner.address:
    ray.init(runner.address, log_to_driver=False, logging_level="warning")
  else:
    cpus = max(1, round(runner.workers * runner.worker_cpus))
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="warning")

"""Stages of the path from raw pairs to a report: each owns one folder of the workdir and leaves `done.json` in it."""

from collections.abc import Callable
import contextlib
import time

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.io import plain, read_json, replacing, write_json  # noqa: F401 (for commands/generate.py)

DONE = "done.json"


def differences(old: dict, new: dict, where: str = "") -> list[str]:
  """`name: old -> new` for every leaf that differs between two nested dicts."""
  found = []
  for key in sorted({*old, *new}):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      found += differences(a, b, f"{where}{key}.")
    elif a != b:
      found.append(f"{where}{key}: {a} -> {b}")
  return found


def check_same_config(path: epath.PathLike, stored: dict, config: dict) -> None:
  """Raises UserError, naming the fields, if `path`'s run was made with another config."""
  changed = differences(stored, plain(config))
  if changed:
    raise UserError(
      f"{path} holds the run of another config ({'; '.join(changed[:4])}): "
      "use another --workdir, or delete that folder to make it anew."
    )


def require(folder: epath.PathLike, command: str) -> dict:
  """Returns what the stage in `folder` left in done.json. Raises UserError if it has not finished."""
  done = epath.Path(folder) / DONE
  if not done.exists():
    raise UserError(
      f"{folder} is not finished: run `python -m launch.{command}` with the same --config and --workdir first."
    )
  return read_json(done)


@contextlib.contextmanager
def stage(
  folder: epath.PathLike,
  config: dict,
  redo: bool = False,
  writes: bool = True,
  together: Callable = contextlib.nullcontext,
):
  """Runs the body once: yields None if the stage finished before, else a dict to fill with its summary.

    with stages.stage(workdir / "vqgan", {"vqgan": asdict(config)}) as summary:
      if summary is not None:
        summary.update(psnr_db=..., seconds is added here)

  Args:
    folder: the stage's own folder; made if absent.
    config: what the outcome depends on: config sections, and under "inputs" the `id` of each stage it reads.
      Other inputs than last time make the stage run again; another config is refused.
    redo: run again although it is done.
    writes: whether this process deletes and writes done.json; of a job's several processes, which all run the body or
      none, one does.
    together: makes the context in which such processes read, so that all have read before one deletes.

  Raises:
    UserError: the folder holds the outcome of another config.
  """
  folder = epath.Path(folder)
  done = folder / DONE
  with together():
    finished = done.exists() and _is_current(folder, config) and not redo
  if finished:
    if writes:
      print(f"{folder}: finished already, skipped.", flush=True)
    yield None
    return
  if writes:
    done.unlink(
      missing_ok=True
    )  # From here on the folder holds neither the old outcome nor the new one.
    folder.mkdir(parents=True, exist_ok=True)
  start = time.time()
  summary = {}
  yield summary
  if writes:
    write_json(
      done,
      {
        "config": config,
        "summary": summary,
        "seconds": round(time.time() - start, 1),
        "id": f"{time.time_ns():x}",
      },
    )


def _is_current(folder: epath.Path, config: dict) -> bool:
  """Whether the finished stage in `folder` read the inputs of `config`. Raises UserError if the rest of its config differs."""
  stored = read_json(folder / DONE)["config"]
  inputs = plain(config).get("inputs")
  check_same_config(folder, {**stored, "inputs": inputs}, {**config, "inputs": inputs})
  return stored.get("inputs") == inputs

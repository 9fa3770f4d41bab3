"""Part `damage` of `benchmarks.faults`: damages checkpoints, and checks how the run continues.

`damage(folder, kind, rng)` damages one or more of the three checkpoints of a copied run. `compare`
compares what the run does with the requirements. The run must go back to the newest undamaged
checkpoint and name the damaged one, or refuse to start. It must never start from step 0, or from
arrays that differ from the saved arrays.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import io
import json
import pathlib
import resource
import shutil

import numpy as np

from benchmarks.faults import processes
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, read_json_lines, write_json

STEPS = (10, 20, 30)  # Steps of the checkpoints.
MORE = 40  # Step whose checkpoint is saved on a full disk.
AT_ONCE = 125  # Maximum number of faults in one process.
KINDS = (
  "bit flip", "truncation", "file missing", "half an upload", "surplus file", "digests missing",
  "digests damaged", "two newest damaged", "two newest gone", "all damaged", "all digests gone",
  "all gone", "disk full while saving",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fault:
  """A fault that the benchmark caused.

  Attributes:
    kind: one of `KINDS`.
    steps: steps of the checkpoints before the fault, newest first.
    hit: number of damaged checkpoints; these are the newest ones.
    names: texts, e.g. paths; a message that contains at least one of them names the fault.
  """

  kind: str
  steps: tuple[int, ...]
  hit: int
  names: tuple[str, ...]

  @property
  def good(self) -> int | None:
    """Newest step whose checkpoint is undamaged, or None."""
    return next(iter(self.steps[self.hit :]), None)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns all non-empty files below a folder, sorted."""
  return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def flip_bit(path: pathlib.Path, rng: np.random.Generator) -> None:
  """Flips one bit of a file."""
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
  path.write_bytes(content)


def truncate(path: pathlib.Path, rng: np.random.Generator) -> None:
  """Shortens a file to a random length."""
  path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def stop_upload(folder: pathlib.Path, rng: np.random.Generator) -> None:
  """Removes the last files below a folder, and truncates the last remaining file."""
  files = files_of(folder)
  kept = int(rng.integers(1, len(files)))
  truncate(files[kept - 1], rng)
  for path in files[kept:]:
    path.unlink()


def _any_file(folder: pathlib.Path, rng: np.random.Generator) -> pathlib.Path:
  files = files_of(folder)
  return files[rng.integers(len(files))]


def _damage_file(folder: pathlib.Path, rng: np.random.Generator) -> None:
  [flip_bit, truncate][rng.integers(2)](_any_file(folder, rng), rng)


def damage(train: pathlib.Path, kind: str, rng: np.random.Generator) -> Fault:
  """Damages the checkpoints of a training. `kind` is any kind but "disk full while saving"."""
  steps = sorted((int(p.name) for p in (train / "checkpoints").iterdir()), reverse=True)
  folders = [train / "checkpoints" / f"{step}" for step in steps]
  newest, digests = folders[0], train / "checkpoints.digests"
  own = digests / f"{steps[0]}.json"
  hit = 1
  match kind:
    case "bit flip":
      flip_bit(_any_file(newest, rng), rng)
    case "truncation":
      truncate(_any_file(newest, rng), rng)
    case "file missing":
      _any_file(newest, rng).unlink()
    case "half an upload":
      stop_upload(newest, rng)
    case "surplus file":
      (_any_file(newest, rng).parent / "surplus").write_bytes(rng.bytes(100))
    case "digests missing":
      own.unlink()
    case "digests damaged":
      [flip_bit, truncate][rng.integers(2)](own, rng)
    case "two newest damaged" | "all damaged":
      hit = 2 if kind == "two newest damaged" else len(steps)
      for folder in folders[:hit]:
        _damage_file(folder, rng)
    case "two newest gone":
      hit = 2
      for folder in folders[:hit]:
        shutil.rmtree(folder)
    case "all digests gone":
      hit = len(steps)
      shutil.rmtree(digests)
    case "all gone":
      hit = len(steps)
      shutil.rmtree(train / "checkpoints")
      if rng.random() < 0.5:
        shutil.rmtree(digests)
  places = [f"checkpoints/{steps[0]}", own.name, f"checkpoint {steps[0]}"]
  if hit == len(steps):
    places.append(str(train))
  return Fault(kind, tuple(steps), hit, tuple(places))


@contextlib.contextmanager
def full_disk(most_bytes: int):
  """Makes writes beyond `most_bytes` of a file fail in the `with` block, even in C++ libraries."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def compare(fault: Fault, step: int | None, same: bool, message: str) -> dict:
  """Compares the behavior of a run after a fault with the required behavior.

  Args:
    fault: fault that was caused.
    step: step from which the run continues; None if it refused to start.
    same: whether the restored arrays and next row are equal to those saved at this step.
    message: text that the run printed.

  Returns:
    "outcome": "went back", "refused", "harmless" (the run restored the newest checkpoint unchanged)
    or "wrong"; "named": whether the message names the fault; "steps_lost": number of steps.
  """
  newest = fault.steps[0]
  if step is None:
    outcome = "refused" if fault.good is None else "wrong"
  elif not same:
    outcome = "wrong"
  elif step == newest:
    outcome = "harmless"
  else:
    outcome = "went back" if step == fault.good else "wrong"
  named = any(name in message for name in fault.names)
  lost = 0 if step is None else newest - step
  return {"kind": fault.kind, "outcome": outcome, "named": named, "steps_lost": lost}


class Trainer:
  """A tiny training in this process that continues from checkpoints."""

  def __init__(self, folder: pathlib.Path):
    """Saves the checkpoints of `STEPS` to `folder`."""
    import jax

    from cm3leon_jax.config.training import OptimizerConfig, TrainConfig
    from cm3leon_jax.training.steps import compile_steps
    from cm3leon_jax.weights.checkpoint import Checkpoints
    from tests.data.stores import VOCAB
    from tests.models import tiny

    sections = (tiny.CONFIG, OptimizerConfig(), TrainConfig(), VOCAB)
    self._steps = compile_steps(*sections, seed=0)
    self._open = lambda run: Checkpoints(run, keep=len(STEPS))
    states = {step: compile_steps(*sections, seed=step).init() for step in STEPS}
    self._expected = jax.device_get({**states, MORE: self._steps.init()})
    checkpoints = self._open(folder)
    for step, state in states.items():
      checkpoints.save(state, step, next_row=8 * step)
    checkpoints.close()
    (folder / "metrics").mkdir()
    lines = [json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, max(STEPS) + 5)]
    (folder / "metrics" / "metrics.jsonl").write_text("".join(lines))

  def resume(self, folder: pathlib.Path, checked: bool = True) -> tuple[int | None, bool, str]:
    """Continues as `decoder.train` does; returns `step`, `same` and `message` for `compare`."""
    import jax

    from cm3leon_jax.config.training import TrainConfig
    from cm3leon_jax.training.decoder import newest_checkpoint, restore_or_init

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      try:
        checkpoints = self._open(folder)
        if checked:
          config = TrainConfig(checkpoint_every=10)
          step = newest_checkpoint(checkpoints)
          row = 0 if step is None else checkpoints.next_row(step)
          state = restore_or_init(folder, checkpoints, step, self._steps, config)
        else:  # Negative control: restore the newest checkpoint unchecked.
          step = max(STEPS)
          types = jax.eval_shape(self._steps.init)
          state, row = checkpoints.restore(types, step)
        if step is None:
          return 0, False, printed.getvalue()
      except UserError as error:
        return None, False, printed.getvalue() + str(error)
      except Exception as error:  # A traceback counts as wrong.
        return 0, False, f"{printed.getvalue()}{error!r}"
    found, expected = jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(self._expected[step])
    same = all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))
    return step, same and row == 8 * step, printed.getvalue()

  def fill_disk(self, folder: pathlib.Path, rng: np.random.Generator) -> bool:
    """Saves checkpoint `MORE` on a full disk. Returns whether the save raised an error."""
    sizes = [path.stat().st_size for path in files_of(folder / "checkpoints")]
    checkpoints, state = self._open(folder), self._steps.init()
    with full_disk(int(rng.integers(max(sizes)))):
      try:
        checkpoints.save(state, MORE, next_row=8 * MORE)
        checkpoints.wait()
      except Exception:  # Orbax, TensorStore or the disk may raise it.
        return True
    return False


def trials(root: pathlib.Path, seed: int, count: int) -> None:
  """Causes faults in this process and appends results to trials.jsonl; a stopped call continues."""
  import jax

  from tests.models.tiny import mesh_of

  log, made, copy = root / "trials.jsonl", root / "made", root / "copy"
  shutil.rmtree(made, ignore_errors=True)
  with jax.set_mesh(mesh_of(1, 1, 1)), log.open("a") as file:
    trainer = Trainer(made)
    write_json(root / "control.json", _control(trainer, made, copy, np.random.default_rng(seed)))
    for i in range(len(read_json_lines(log)), count):
      rng, kind = np.random.default_rng([seed, i]), KINDS[i % len(KINDS)]
      copy = root / f"copy_{i}"  # Threads of a failed save may recreate the old folder.
      shutil.rmtree(copy, ignore_errors=True)
      shutil.copytree(made, copy)
      result = _one(trainer, copy, kind, rng)
      shutil.rmtree(copy, ignore_errors=True)
      file.write(json.dumps(result) + "\n")
      file.flush()


def _one(trainer: Trainer, folder: pathlib.Path, kind: str, rng: np.random.Generator) -> dict:
  if kind != "disk full while saving":
    return compare(damage(folder, kind, rng), *trainer.resume(folder))
  noticed = trainer.fill_disk(folder, rng)  # False: the disk had space for all files.
  fault = Fault(kind, (MORE, *STEPS[::-1]), int(noticed), ())
  return {**compare(fault, *trainer.resume(folder)), "named": noticed}


def _control(trainer: Trainer, made: pathlib.Path, copy: pathlib.Path, rng) -> dict:
  """Flips bits in arrays and restores them without digests; `compare` must find wrong arrays."""
  wrong = 0
  for _ in range(10):
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(made, copy)
    largest = max(files_of(copy / "checkpoints" / f"{max(STEPS)}"), key=lambda p: p.stat().st_size)
    flip_bit(largest, rng)
    fault = Fault("bit flip", STEPS[::-1], 1, ())
    with contextlib.suppress(ValueError):  # TensorStore itself detects some flips.
      wrong += compare(fault, *trainer.resume(copy, checked=False))["outcome"] == "wrong"
  return {"trials": 10, "wrong": wrong}


def measure(root: pathlib.Path, seed: int, count: int) -> Iterator[dict]:
  """Yields the result of the negative control, then the results of `count` faults."""
  root, log = root / "damage", root / "damage" / "trials.jsonl"
  for first in range(0, count, AT_ONCE):
    end = min(first + AT_ONCE, count)
    if len(read_json_lines(log)) < end:
      processes.finish(processes.Process.function(root, trials, root, seed, end))
    if not first:
      yield read_json(root / "control.json")
    yield from read_json_lines(log)[first:end]


def summarize(results: list[dict]) -> dict:
  """Counts the outcomes for each kind of fault."""
  control, *results = results
  kinds = {}
  for kind in dict.fromkeys(result["kind"] for result in results):
    of_kind = [result for result in results if result["kind"] == kind]
    outcomes = [result["outcome"] for result in of_kind]
    effective = [result for result in of_kind if result["outcome"] != "harmless"]
    kinds[kind] = {
      "faults": len(of_kind),
      **{name: outcomes.count(name) for name in ("went back", "refused", "harmless", "wrong")},
      "named": sum(result["named"] for result in effective),
      "of": len(effective),
      "steps_lost": max(result["steps_lost"] for result in of_kind),
    }
  return {"faults": len(results), "kinds": kinds, "control": control}

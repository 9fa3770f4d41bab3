r"""Tries this machine's accelerator: tests, speed, a short demo. Writes a page and a file to send.

  bash launch/first_run.sh                 # installs first; on a GPU or TPU machine
  python -m benchmarks.first_run --out=first_run --minutes=30

Each part is a separate process with a time limit. Parts that fail or do not end in time are on the
page as they are, and the others still run. The same command continues a run that was stopped: parts
that passed or failed do not run again. On a machine without an accelerator, the CPU is the device,
and the sizes are small: this is a rehearsal.

Writes page.md, results.json, the full output of each part, and first_run.zip with all of them. With
--out=gs://BUCKET/FOLDER, a local folder has them, too, and each part that ends is copied.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any
import zipfile

from absl import app, flags
from etils import epath

from benchmarks import first_run_page
from cm3leon_jax.errors import CTRL_C, UserError
from cm3leon_jax.files import buckets
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.json_files import read_json, write_json

ROOT = pathlib.Path(__file__).parents[1]
MIN_SECONDS = 20.0  # A part does not start if less time is left.
MACHINE_SECONDS = 180.0  # JAX finds the devices of a TPU in less than a minute.
DEMO_OVERHEAD = 300.0  # Seconds of a demo, besides --minutes, on a new kind of device.

MODEL_350M = ("--layers=24", "--width=1024", "--heads=16", "--mlp_width=4096", "--rows=4")
SMALL = ("--layers=2", "--width=128", "--heads=2", "--mlp_width=256", "--rows=2", "--length=128")


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the run.

  Attributes:
    command: arguments of Python, or a shell script and its arguments.
    seconds: time limit.
  """

  name: str
  question: str
  command: tuple[str, ...]
  seconds: float


def parts_of(platform: str, out: pathlib.Path, weights: str = "") -> list[Part]:
  """Returns the parts for a device of this platform: "gpu", "tpu" or "cpu".

  `weights` is the folder of a published model to import, if any.
  """
  cpu = platform == "cpu"
  step = ("-m", "benchmarks.speed.train_step")
  of_350m = (*MODEL_350M, "--length=4096", "--dtype=bfloat16", "--remat_policy=full")
  marker = "gpu or tpu" if cpu else platform
  tests = ("-m", "pytest", "-q", "-rf", "--color=no", "-p", "no:cacheprovider")
  tests += ("--confcutdir=tests/device",)
  demo = ("launch/demo.sh", "--workdir", str(out / "demo"), "--minutes", "2" if cpu else "5")
  imported = Part(
    "weights",
    "Does a model with imported weights draw?",
    ("-m", "benchmarks.first_run_weights", weights, str(out)),
    900,
  )
  return [imported] * bool(weights) + [
    Part(
      "tests",
      "Do kernels, steps, decoding and restores agree with the CPU?",
      (*tests, "-m", marker, "tests/device"),
      480,
    ),
    Part(
      "train_step",
      "How fast is a train step of 69M parameters in fp32?",
      (*step, *(SMALL if cpu else ())),
      150,
    ),
    Part(
      "train_step_350m",
      "How fast is a train step of the 350M model, in rows of 4,096 tokens?",
      (*step, *(SMALL if cpu else of_350m), "--seconds=5" if cpu else "--seconds=60"),
      300,
    ),
    Part(
      "decode",
      "How fast is guided decoding, compared with the time to read the weights?",
      ("-m", "benchmarks.speed.decode", "--peers=false", "--runs=2" if cpu else "--runs=5"),
      180,
    ),
    Part(
      "demo",
      "Does the whole path run, from pairs to a report?",
      demo,
      (120 if cpu else 300) + DEMO_OVERHEAD,
    ),
  ]


def _program(part: Part) -> str:
  return "bash" if part.command[0].endswith(".sh") else "python"


def run(part: Part, out: pathlib.Path, limit: float) -> dict[str, Any]:
  """Runs a part with its output in a file; returns outcome, seconds and output lines."""
  log = out / f"{part.name}.log"
  program = sys.executable if _program(part) == "python" else "bash"
  start = time.monotonic()
  with open(log, "wb") as output:
    process = subprocess.Popen(
      [program, *part.command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
      start_new_session=True,
    )  # fmt: skip
    try:
      code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
      code = None
    finally:
      if process.poll() is None:  # A demo has children, which end with their group.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
  seconds = time.monotonic() - start
  outcome = "passed" if code == 0 else f"failed, exit code {code}"
  if code is None:
    outcome = f"stopped after its limit of {limit:.0f} s"
  lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
  return {"outcome": outcome, "seconds": round(seconds, 1), "lines": [x.rstrip() for x in lines]}


def machine() -> dict[str, Any]:
  """Describes devices and versions. A separate process asks, because a TPU serves one process."""
  try:
    result = subprocess.run(
      [sys.executable, "-m", "benchmarks.first_run_machine"],
      cwd=ROOT, capture_output=True, text=True, check=False, timeout=MACHINE_SECONDS,
    )  # fmt: skip
  except subprocess.TimeoutExpired as error:
    raise UserError(
      f"JAX found no device within {error.timeout:g} s: end other processes that use the devices; "
      "on a TPU slice of several hosts, JAX waits for the others, but the first run uses one host."
    ) from error
  if result.returncode:
    raise UserError(f"JAX finds no device: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
  return json.loads(result.stdout.splitlines()[-1])


def begin(out: pathlib.Path, there: epath.Path, found: dict[str, Any]) -> dict[str, Any]:
  """Returns the results in the folder `there`, copied to `out`, or new results of a machine.

  Raises:
    UserError: the folder has results of another machine or commit, or other files.
  """
  files = list(there.iterdir()) if exists(there) else []
  if not files:
    return {"machine": found, "parts": {}}
  if not any(path.name == "results.json" for path in files):
    raise UserError(f"--out={there} is not empty: remove it, or name another folder.")
  for path in filter(_is_result, files):
    if os.fspath(path) != os.fspath(out / path.name):
      (out / path.name).write_bytes(path.read_bytes())
  fields = {"machine": dict, "parts": dict}
  results = read_json(out / "results.json", fields, "name another folder")
  before = results["machine"]
  names = sorted({*before, *found} - {"date", "system"})
  if other := [name for name in names if before.get(name) != found.get(name)]:
    raise UserError(
      f"--out={there} has results of another machine or version (different: {', '.join(other)}): "
      "name another folder."
    )
  return results


def _is_result(path: Any) -> bool:
  return path.suffix in (".md", ".json", ".log", ".png")


def save(out: pathlib.Path, there: epath.Path, results: dict[str, Any]) -> None:
  """Writes the page, the results and the file to send to `out`, and copies them to `there`."""
  write_json(out / "results.json", results)
  (out / "page.md").write_text(first_run_page.page(results), encoding="utf-8")
  with zipfile.ZipFile(out / "first_run.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    for path in sorted(out.iterdir()):
      if _is_result(path):
        archive.write(path, f"first_run/{path.name}")
  if os.fspath(there) == os.fspath(out):
    return
  try:
    for path in out.iterdir():
      if _is_result(path) or path.suffix == ".zip":
        (there / path.name).write_bytes(path.read_bytes())
  except Exception as error:
    if not (why := buckets.failure(error)):
      raise
    print(f"warning: {there}: {why}; {out} has the results.", flush=True)


def main(_) -> None:
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # So that the running part ends, too.
  try:
    _run(flags.FLAGS.out)
  except UserError as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    print("stopped: the same command continues.", flush=True)
    sys.exit(CTRL_C)
  except Exception as error:
    if not (why := buckets.failure(error)):
      raise
    sys.exit(f"error: --out={flags.FLAGS.out}: {why}.")


def _run(to: str) -> None:
  buckets.check_path(to)
  buckets.prepare_access()
  in_bucket = "://" in to
  out = pathlib.Path(tempfile.mkdtemp(prefix="first_run-") if in_bucket else to).absolute()
  there = epath.Path(to if in_bucket else out)
  end = time.monotonic() + 60 * flags.FLAGS.minutes
  results = begin(out, there, machine())
  out.mkdir(parents=True, exist_ok=True)
  save(out, there, results)
  parts = parts_of(results["machine"]["platform"], out, flags.FLAGS.weights)
  go(parts, results, out, there, end)
  print(f"Read {there / 'page.md'}, and attach {there / 'first_run.zip'} to an issue.")


def go(
  parts: list[Part], results: dict[str, Any], out: pathlib.Path, there: epath.Path, end: float
) -> None:
  """Runs the parts until `end`, a time of `time.monotonic`; saves the results after each part."""
  print(f"{results['machine']['devices']}, {len(parts)} parts", flush=True)
  for part in parts:
    before = results["parts"].get(part.name, {"outcome": ""})["outcome"]
    if before.startswith(("passed", "failed")):
      print(f"{part.name}: {before}, before", flush=True)
      continue
    left = end - time.monotonic()
    found: dict[str, Any] = {"outcome": "not started: no time was left", "seconds": 0, "lines": []}
    if left > MIN_SECONDS:
      print(f"{part.name} ...", end=" ", flush=True)
      found = run(part, out, min(part.seconds, left))
      print(f"{found['outcome']}, {found['seconds']:.0f} s", flush=True)
    results["parts"][part.name] = {
      "question": part.question,
      "command": shlex.join([_program(part), *part.command]),
      **found,
    }
    save(out, there, results)


if __name__ == "__main__":  # Flags defined here do not exist in tests that import it.
  flags.DEFINE_string("out", "first_run", "Folder for the results, local or gs://.")
  flags.DEFINE_string("weights", "", "Folder of Anole or Chameleon, to import and draw with.")
  flags.DEFINE_float("minutes", 30.0, "Minutes for all parts together.", lower_bound=0.5)
  app.run(main)

"""Counts the files of the package that a call enters, and its calls up the import graph.

  python -m tools.walks --way=load
  python -m tools.walks --way=generate --files
  python -m tools.walks --way=train

`load` loads a bundled model, and the others run a command: `generate` for one image, `train` on a
tiny workdir until its first row is read, `plan` and `prepare_data`.

A file is entered when one of its functions runs, in any thread; code that runs only during the
import of a module does not count. The floor of a module is the length of the longest path of
imports below it, those inside functions included: a module that imports no other is on floor 0.
A climb is a pair of files in which a function of the first calls a function of the second, and the
second is on a higher floor.
"""

import argparse
import contextlib
import functools
import graphlib
import inspect
import io
import pathlib
import runpy
import sys
import tempfile
import threading

import grimp

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = f"{ROOT / 'cm3leon_jax'}/"
FIRST_ROW = ("data/rows/loader.py", "__getitem__")  # Returns a training row.


@functools.cache
def floors() -> dict[str, int]:
  """Returns file -> its floor; files are paths in the package."""
  graph = grimp.build_graph("cm3leon_jax", cache_dir=None)
  below = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
  for names in below.values():
    names.discard("cm3leon_jax")  # Imported only to read its version.
  result: dict[str, int] = {}
  for name in graphlib.TopologicalSorter(below).static_order():
    result[name] = 1 + max((result[other] for other in below[name]), default=-1)
  return {_file_of(name): floor for name, floor in result.items()}


def _file_of(module: str) -> str:
  path = pathlib.Path(PACKAGE, *module.split(".")[1:])
  path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
  return str(path).removeprefix(PACKAGE)


class Walk:
  """Records the calls between files of the package while the context is active.

  Attributes:
    files: entered files, in the order of their first calls.
    pairs: (file of the caller, file of the called function).
  """

  def __init__(self, until: tuple[str, str] | None = None):
    """`until` is (file, function): its first return ends the record."""
    self.files: dict[str, None] = {}
    self.pairs: dict[tuple[str, str], None] = {}
    self._until, self._ended = until, False

  def __enter__(self):
    threading.setprofile(self._note)
    sys.setprofile(self._note)
    return self

  def __exit__(self, *_):
    sys.setprofile(None)
    threading.setprofile(None)

  def _note(self, frame, event: str, _) -> None:
    if self._ended or event not in ("call", "return") or not _is_function(frame):
      return
    file = _file(frame)
    if event == "return":
      self._ended = (file, frame.f_code.co_name) == self._until
    elif not _imports(frame):
      self.files[file] = None
      caller = frame.f_back
      while caller is not None and not _is_function(caller):
        caller = caller.f_back
      if caller is not None:
        self.pairs[_file(caller), file] = None

  def climbs(self) -> list[tuple[str, str]]:
    """Returns the pairs whose second file is on a higher floor than the first."""
    height = floors()
    return [(a, b) for a, b in self.pairs if height[b] > height[a]]


def _file(frame) -> str:
  return frame.f_code.co_filename.removeprefix(PACKAGE)


def _is_function(frame) -> bool:
  code = frame.f_code
  return code.co_filename.startswith(PACKAGE) and bool(code.co_flags & inspect.CO_OPTIMIZED)


def _imports(frame) -> bool:
  """Returns whether a frame runs during the import of a module, as decorators do."""
  while frame is not None:
    if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != "__main__":
      return frame.f_code.co_filename.startswith(PACKAGE)
    frame = frame.f_back
  return False


def load() -> Walk:
  """Loads a bundled model."""
  from cm3leon_jax import CM3Leon

  with Walk() as walk:
    CM3Leon.load("scenes", show_progress=False)
  return walk


def generate() -> Walk:
  """Runs `cm3leon generate` with a bundled model, for one image."""
  with tempfile.TemporaryDirectory() as folder, Walk() as walk:
    _run("generate", "--workdir=scenes", "--prompt=a red square", f"--out={folder}/out")
  return walk


def train() -> Walk:
  """Runs `cm3leon train` for one step on the tiny workdir of the tests."""
  from cm3leon_jax.config.settings import settings_from_config
  from tests.launch import stages_before, tiny_config

  with tempfile.TemporaryDirectory() as folder:
    settings = settings_from_config(tiny_config.get_config())
    stages_before.make_workdir(pathlib.Path(folder), settings)
    config = f"--config={ROOT}/tests/launch/tiny_config.py"
    with Walk(FIRST_ROW) as walk:
      _run("train", config, f"--workdir={folder}", "--config.train.steps=1")
  return walk


def plan() -> Walk:
  """Runs `cm3leon plan` for a shipped config on a TPU slice."""
  with Walk() as walk:
    _run("plan", "--config=cm3leon_350m", "--topology=v5e-256")
  return walk


def prepare_data() -> Walk:
  """Runs `cm3leon prepare_data` for few pairs of the demo."""
  few = [f"--config.raw.options.{name}=8" for name in ("train", "bank", "heldout")]
  with tempfile.TemporaryDirectory() as folder, Walk() as walk:
    _run(
      "prepare_data", f"--config={ROOT}/examples/scenes/config.py", *few, f"--workdir={folder}/w"
    )
  return walk


WAYS = {
  "load": load, "generate": generate, "train": train, "plan": plan, "prepare_data": prepare_data
}  # fmt: skip


def _run(name: str, *arguments: str) -> None:
  """Runs a command in this process."""
  sys.argv = [f"cm3leon {name}", *arguments]
  with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_module(f"cm3leon_jax.commands.{name}", run_name="__main__", alter_sys=True)


def main() -> None:
  # Uses argparse because the recorded command defines absl flags.
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--way", choices=WAYS, default="load", help="what is called")
  parser.add_argument("--files", action="store_true", help="list the files and the climbs")
  options = parser.parse_args()
  walk = WAYS[options.way]()
  climbs = walk.climbs()
  print(f"{options.way}: {len(walk.files)} files, {len(climbs)} climbs")
  if options.files:
    print("\n".join(f"{file} (floor {floors()[file]})" for file in walk.files))
    print("\n".join(f"climb: {a} -> {b}" for a, b in climbs))


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
  main()

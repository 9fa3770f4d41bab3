"""Counts the files that a call enters, and the calls from a lower to a higher layer ("room").

  python -m benchmarks.walks --way=load
  python -m benchmarks.walks --way=generate --files
  python -m benchmarks.walks --way=rows --workdir=workdir/scenes

A file is entered when one of its functions runs, in any thread. Code that runs only during the
import of a module does not count. A climb is a pair of files from two rooms, in which the file of
the lower room calls a function of the upper room. The table in docs/design.md lists the rooms from
bottom to top. The lowest room is the base: the modules that docs/design.md lists, and every
config.py. `api.py` and `commands/` are above all rooms.
"""

import argparse
import contextlib
import inspect
import io
import pathlib
import re
import runpy
import sys
import tempfile
import threading

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = f"{ROOT / 'cm3leon_jax'}/"
BASE = "base"
TOP = ("loading", "api", "keywords", "commands")
WAYS = ("load", "generate", "rows")
PROMPT = ["--workdir=scenes", "--prompt=a red square at the top left"]


def rooms() -> list[str]:
  """Returns the rooms from bottom to top."""
  above = re.findall(r"^\| `(\w+)/`", _table(), re.MULTILINE)
  return [BASE, *(room for room in above if room not in base()), *TOP]


def base() -> set[str]:
  """Returns the packages and modules of the base, which is the lowest room."""
  sentence = re.search(r"The base is (.*?)\.\n", _table(), re.DOTALL)
  assert sentence, "docs/design.md does not say what the base is"
  return set(re.findall(r"`(\w+)`", sentence[1]))


def _table() -> str:
  page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
  return page.partition("## Rooms")[2].partition("\n## ")[0]


def room_of(file: str) -> str:
  """Returns the room of a file; `file` is its path in the package."""
  room = file.partition("/")[0].removesuffix(".py")
  return BASE if room in base() or file.endswith("/config.py") else room


class Walk:
  """Records the calls between files of the package while the context is active."""

  def __init__(self):
    self.files: dict[str, None] = {}
    self.pairs: dict[tuple[str, str], None] = {}

  def __enter__(self):
    threading.setprofile(self._note)
    sys.setprofile(self._note)
    return self

  def __exit__(self, *_):
    sys.setprofile(None)
    threading.setprofile(None)

  def _note(self, frame, event: str, _) -> None:
    if event != "call" or not _is_function(frame) or _imports(frame):
      return
    file = frame.f_code.co_filename.removeprefix(PACKAGE)
    self.files[file] = None
    caller = frame.f_back
    while caller is not None and not _is_function(caller):
      caller = caller.f_back
    if caller is not None:
      self.pairs[caller.f_code.co_filename.removeprefix(PACKAGE), file] = None

  def climbs(self) -> list[tuple[str, str]]:
    """Returns the climbs, as pairs (file of the caller, file of the function that it calls)."""
    order = {room: place for place, room in enumerate(rooms())}

    def height(file: str) -> int:
      return order.get(room_of(file), -1)

    return [(a, b) for a, b in self.pairs if height(b) > height(a)]


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


def load() -> None:
  """Loads a bundled model."""
  from cm3leon_jax import CM3Leon

  CM3Leon.load("scenes", show_progress=False)


def generate() -> None:
  """Runs `cm3leon generate` with a bundled model, for one image."""
  with tempfile.TemporaryDirectory() as folder:
    _run("generate", [*PROMPT, f"--out={folder}/out"])


def rows(workdir: str) -> None:
  """Opens the training rows of a run and reads the first row."""
  from cm3leon_jax.trained.run import Run

  Run.open(workdir).rows("train")[0]


def _run(name: str, arguments: list[str]) -> None:
  """Runs a command in this process."""
  sys.argv = [f"cm3leon {name}", *arguments]
  with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_module(f"cm3leon_jax.commands.{name}", run_name="__main__", alter_sys=True)


def measure(way: str, workdir: str) -> Walk:
  """Runs the call `way`, one of WAYS, and returns the recorded files and calls."""
  with Walk() as walk:
    {"load": load, "generate": generate, "rows": lambda: rows(workdir)}[way]()
  return walk


def main() -> None:
  # Uses argparse because the recorded command defines absl flags.
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--way", choices=WAYS, default="load", help="what is called")
  parser.add_argument("--workdir", help="run whose rows are read")
  parser.add_argument("--files", action="store_true", help="list the files and the climbs")
  options = parser.parse_args()
  if options.way == "rows" and not options.workdir:
    parser.error("--way=rows needs --workdir, a run whose documents are encoded.")
  walk = measure(options.way, options.workdir)
  climbs = walk.climbs()
  print(f"{options.way}: {len(walk.files)} files, {len(climbs)} climbs")
  if options.files:
    print("\n".join(walk.files))
    print("\n".join(f"climb: {a} -> {b}" for a, b in climbs))


if __name__ == "__main__":
  main()

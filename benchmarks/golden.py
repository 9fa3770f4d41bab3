r"""Checks that a refactoring changes no result: compares a commit with the working tree.

  python -m benchmarks.golden --against=COMMIT          # about 10 minutes per version, on two cores
  python -m benchmarks.golden --against=COMMIT --parts=bundled,rows

Needs the extras [demo,dev].

Checks out COMMIT and runs both versions on this machine, one after the other. Each version runs
every stage on tiny data, trains 20 steps, learns from rewards, reads training rows, samples every
task in batches and from a server, writes every export, samples the bundled models, and continues
runs of COMMIT (`benchmarks/golden_run.py`). Losses and token ids are compared exactly, and files by
digest. Texts for people (pages, cards, messages) are not compared. Prints a row per part with the
names of the first differing values. The exit code is 1 if a value differs.

--parts also runs the parts whose results the named parts read. The results of COMMIT stay in
--folder, and later comparisons reuse them as long as the files `benchmarks/golden*.py` are
unchanged.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time

from absl import app, flags

from benchmarks import golden_run

ROOT = pathlib.Path(__file__).parents[1]
SHOWN = 8  # Maximum number of differing values that a table row names.


def git(*arguments: str) -> str:
  """Runs git in the working tree and returns its output."""
  result = subprocess.run(
    ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
  )
  if result.returncode:
    sys.exit(f"git {' '.join(arguments)}: {result.stderr.strip()}")
  return result.stdout.strip()


def check_out(commit: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes the files of a commit to a folder, unless the folder exists."""
  if not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    archive = folder.with_name(f"{folder.name}.tar")
    git("archive", f"--output={archive}", commit)
    part = folder.with_name(f"{folder.name}.part")
    shutil.unpack_archive(archive, part, filter="data")
    part.rename(folder)
    archive.unlink()
  return folder


def own_digest() -> str:
  """Returns a digest of the `golden*.py` files, which define what is run and compared."""
  files = sorted(pathlib.Path(__file__).parent.glob("golden*.py"))
  return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def measure(place: golden_run.Place, parts: list[str], kept: pathlib.Path) -> dict[str, dict]:
  """Runs parts and returns their values; reads values that are already in `kept`."""
  found = json.loads(kept.read_text()) if kept.exists() else {}
  if not found:
    golden_run.prepare(place)
  for name in parts:
    if name not in found:
      start = time.monotonic()
      found[name] = golden_run.PARTS[name](place)
      kept.write_text(json.dumps(found))
      print(f"{kept.stem}: {name}, {time.monotonic() - start:.0f} s", flush=True)
  return {name: found[name] for name in parts}


def changes(old: dict, new: dict) -> list[str]:
  """Returns the names of values that differ, or that only one of the two versions has.

  changes({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) = ["b", "c"]
  """
  return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def table(old: dict[str, dict], new: dict[str, dict]) -> tuple[str, int]:
  """Returns a Markdown table of the parts, and the number of differing values."""
  lines, total = ["| part | values | different |", "|---|---|---|"], 0
  for part in old:
    names = changes(old[part], new[part])
    total += len(names)
    shown = f": {'; '.join(names[:SHOWN])}" if names else ""
    lines.append(f"| {part} | {len(old[part]):,} | {len(names):,}{shown} |")
  return "\n".join(lines), total


def main(_) -> None:
  against, parts = flags.FLAGS["against"].value, flags.FLAGS["parts"].value
  folder = pathlib.Path(flags.FLAGS["folder"].value).resolve()
  if unknown := [name for name in parts if name not in golden_run.PARTS]:
    names = ", ".join(golden_run.PARTS)
    raise app.UsageError(f"--parts has '{unknown[0]}'; its names are {names}.")
  commit = git("rev-parse", "--verify", f"{against}^{{commit}}")[:12]
  folder.mkdir(parents=True, exist_ok=True)
  cache = folder / "programs"
  parts, key = golden_run.with_needed(parts), f"{commit}-{own_digest()}"
  before, now = folder / f"{key}.json", folder / "now.json"
  tree, runs = check_out(commit, folder / "trees" / commit), folder / key
  old = measure(golden_run.Place(tree, runs, runs, cache), parts, before)
  now.unlink(missing_ok=True)
  new = measure(golden_run.Place(ROOT, folder / "now", runs, cache), parts, now)
  text, different = table(old, new)
  print(f"{commit} and the working tree at {git('describe', '--always', '--dirty')}:\n{text}")
  sys.exit(1 if different else 0)


if __name__ == "__main__":
  flags.DEFINE_string("against", None, "Commit to compare with.", required=True)
  flags.DEFINE_list("parts", list(golden_run.PARTS), "Parts to run; parts that they read also run.")
  flags.DEFINE_string("folder", "workdir/golden", "Folder for both versions; kept between calls.")
  app.run(main)

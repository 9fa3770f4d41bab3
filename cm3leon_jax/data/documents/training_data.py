"""Records the origins of the data of a model, including data of the runs that initialized it."""

from collections.abc import Callable
from typing import Any

from etils import epath

from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import ORIGIN_FIELDS, origin_counts
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.stages import stages

FILE = "training_data.json"  # Name of the file in an export or bundle, and in runs that import it.
IMPORTED = "imported_from"  # Field in the summary that `cm3leon import_weights` writes.


def collect(
  workdir: epath.PathLike, locate: Callable[[str], epath.PathLike] = epath.Path
) -> dict[str, list[dict]]:
  """Collects the origins of all data that trained the parameters of a run.

  `locate` maps a value of `--init_from` to a folder.

  Returns:
    runs: {"name", "known"} of each run: the run, the run that initialized it, and so on. "known"
      says whether the origins of the data of this run are recorded.
    origins: {"run", "kind", "source", "license", "attribution", "records"} of each origin.
      "records" is the number of records in all splits; added crops have a kind of their own.

  Raises:
    UserError: a file is damaged.
  """
  runs: list[dict[str, Any]] = []
  origins: list[dict[str, Any]] = []
  folder = epath.Path(workdir)
  seen: set[str] = set()
  while str(folder) not in seen:
    seen.add(str(folder))
    path = folder / "train" / "config.json"
    if (folder / FILE).exists() and not path.exists():  # The file also lists all earlier runs.
      before = read(folder)
      return {"runs": [*runs, *before["runs"]], "origins": [*origins, *before["origins"]]}
    has_raw = (folder / "raw" / reader.INDEX).exists()
    listed = reader.read_index(folder / "raw")["origins"] if has_raw else []
    # An absolute path of this machine says nothing to others: only its last part is recorded.
    found = origin_counts({**x, "source": _without_folders(x["source"])} for x in listed)
    found += _instruction_origins(folder)
    runs.append({"name": _name(folder), "known": bool(found)})
    origins += [{"run": folder.name, **origin} for origin in found]
    run = read_json(path, {"run": dict})["run"] if path.exists() else {}
    start = run.get("init_from")
    folder = epath.Path(locate(start["source"])) if start else folder
  return {"runs": runs, "origins": origins}


def _instruction_origins(folder: epath.Path) -> list[dict]:
  """Returns one origin for all instruction records. Their license is not recorded."""
  done = folder / "instructions" / stages.DONE
  stored = read_json(done, {"config": dict, "summary": dict}) if done.exists() else {}
  root = stored.get("config", {}).get("instructions", {}).get("root")
  if not root:
    return []
  records = sum(x["documents"] for x in stored["summary"].values() if "documents" in x)
  fields = ("instructions", epath.Path(root).name, "", "")
  return [{**dict(zip(ORIGIN_FIELDS, fields)), "records": records}]


def _without_folders(source: str) -> str:
  return epath.Path(source).name if source.startswith("/") else source


def _name(folder: epath.Path) -> str:
  """Returns the name of the folder of a run, or of the folder whose weights it imported."""
  done = folder / stages.DONE
  imported = read_json(done, {"summary": dict})["summary"].get(IMPORTED) if done.exists() else None
  return epath.Path(imported or folder).name


def read(folder: epath.PathLike) -> dict[str, list[dict]]:
  """Reads `FILE`, the result of `collect`. Raises UserError if the file is missing or damaged."""
  path = epath.Path(folder) / FILE
  stored = read_json(path, {"runs": list, "origins": list})
  needed = {"runs": {"name", "known"}, "origins": {"run", "records", *ORIGIN_FIELDS}}
  for name, fields in needed.items():
    for entry in stored[name]:
      if not isinstance(entry, dict) or not fields <= set(entry):
        raise UserError(f"{path} is damaged: an entry of '{name}' must have {sorted(fields)}.")
  return stored

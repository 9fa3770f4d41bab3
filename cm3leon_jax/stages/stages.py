"""Runs the stages of a run. Each stage owns a folder of the workdir and writes done.json there.

done.json describes the files that other stages open. The id of a stage is the digest of these
files, so a stage keeps its id if it runs again and writes the same files. `table` lists the stages
and their dependencies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import hashlib
import math
from numbers import Real
import os
import posixpath
import time
from typing import TYPE_CHECKING, Any

from etils import epath

from cm3leon_jax.errors import UserError
from cm3leon_jax.files import rewritten
from cm3leon_jax.files.atomic import exists, sync
from cm3leon_jax.files.digests import describe, digest
from cm3leon_jax.files.json_files import plain, read_json, write_json
from cm3leon_jax.stages.table import STAGES, identity, reads_of, unused

if TYPE_CHECKING:
  from cm3leon_jax.config.settings import Settings

DONE = rewritten.DONE
SEALS = "checkpoints.digests"  # Folder in train/; its file STEP.json seals a checkpoint.
# Folders of a workdir that no stage owns.
MORE = ("base", "evaluations", "given", "init", "logs", "prompts", "scores")


def differences(old: dict, new: dict, where: str = "") -> list[str]:
  """Returns `name: old -> new` for every leaf that differs between two nested dicts.

  A field that is not in `old` is not a difference if it is off in `new`: 0, False or empty. Fields
  that are `unused` in both are never a difference.
  """
  section, changed = where.rstrip("."), []
  for key in sorted({*old, *new} - (unused(section, old) & unused(section, new))):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      changed += differences(a, b, f"{where}{key}.")
    elif a != b and (b or key in old):
      changed.append(f"{where}{key}: {a} -> {b}")
  return changed


def check_same_config(
  path: epath.PathLike,
  stored: dict,
  config: dict,
  remedy: str = "use another --workdir, or delete that folder to start again",
) -> None:
  """Raises UserError if the run in `path` has another config. Lists the fields that differ."""
  changed = differences(stored, plain(config))
  if changed:
    raise UserError(f"{path} was made with another config ({'; '.join(changed[:4])}): {remedy}.")


def require(workdir: epath.PathLike, name: str, **fields: type) -> dict:
  """Returns the content of a stage's done.json, after checking its id and the types of `fields`.

  Raises:
    UserError: the stage is not finished, or done.json is damaged or its id does not match its
      files.
  """
  folder = epath.Path(workdir) / name
  if not exists(folder / DONE):
    raise UserError(
      f"{folder} is not finished: run `cm3leon {STAGES[name].command}` "
      "with the same --config and --workdir first."
    )
  about = read_json(folder / DONE, {"id": str, **fields})
  _check_id(folder, about)
  return about


def train_id(workdir: epath.PathLike) -> str:
  """Returns the id of the training, or of its newest sealed checkpoint if it is not finished.

  If only parameters were imported, returns their id. Raises UserError if the training has no
  checkpoint yet. For other errors, see `require`.
  """
  folder = epath.Path(workdir) / "train"
  if not exists(folder / "config.json") and exists(epath.Path(workdir) / "init" / DONE):
    return require(workdir, "init")["id"]
  if exists(folder / DONE) or not (step := newest_step(folder)):
    return require(workdir, "train")["id"]
  return f"step {step}: {digest(folder / SEALS / f'{step}.json')}"


def newest_step(folder: epath.PathLike) -> int:
  """Returns the step of a run's newest sealed checkpoint, or 0. It reads only file names."""
  seals = (epath.Path(folder) / SEALS).glob("*.json")
  return max((int(path.stem) for path in seals if path.stem.isdecimal()), default=0)


def folders_in(root: str, files: Collection[str], workdir: str) -> list[str]:
  """Returns the folders below `root` that runs wrote: those with a done.json, and `workdir`.

  If `root` is the workdir, these are folders in it. `files` are all files below `root`.
  """
  folders = {posixpath.dirname(name) for name in files if posixpath.basename(name) == DONE} - {root}
  inner = os.path.relpath(os.path.realpath(workdir), os.path.realpath(root)) if workdir else ".."
  if inner == ".":
    folders |= {f"{root}/{name}" for name in (*STAGES, *MORE)}
  elif inner.partition("/")[0] != "..":
    folders.add(f"{root}/{inner}")
  outer = {f for f in folders if not any(f.startswith(f"{other}/") for other in folders)}
  return [folder for folder in sorted(outer) if any(f.startswith(f"{folder}/") for f in files)]


def describe_files(folder: epath.PathLike, patterns: Collection[str]) -> dict[str, dict]:
  """Returns name -> `digests.describe` for the files in `folder` that match glob patterns."""
  folder = epath.Path(folder)
  paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
  return {path.relative_to(folder).as_posix(): describe(path) for path in paths}


def id_of(files: Mapping[str, dict]) -> str:
  """Returns the id of a stage that wrote the described `files`."""
  return hashlib.sha256("".join(f["sha256"] for f in files.values()).encode()).hexdigest()[:16]


def _check_id(folder: epath.Path, about: dict) -> None:
  """Raises UserError if the id in a stage's done.json does not match the files it describes.

  The id is not checked if done.json describes no files, because no other stage opens files of this
  stage.
  """
  files, stage = about.get("files"), STAGES.get(folder.name)
  if files and not _are_descriptions(files):
    raise UserError(_damaged(folder))
  if not files or stage is None:
    return
  digest, ids = hashlib.sha256(), []
  for described in files.values():
    digest.update(described["sha256"].encode())
    # This is `id_of` of the files so far. Varying files are last and do not change the id, but
    # done.json does not record how many there are.
    ids.append(digest.hexdigest()[:16])
  if about.get("id") not in (ids if stage.varying else ids[-1:]):
    raise UserError(_damaged(folder, " (its id does not match the files that it describes)"))


def _damaged(folder: epath.Path, why: str = "") -> str:
  return f"{folder / DONE} is damaged{why}: restore it, or delete it and run its stage again."


def check_files(path: epath.PathLike) -> None:
  """Compares a file, or all files in a folder, with their digests in the stage's done.json.

  Ignores files that done.json does not describe. done.json is absent while the stage runs.

  Raises:
    UserError: a file is missing or damaged.
  """
  path = epath.Path(path)
  if (folder := rewritten.stage_of(path)) is None:
    return
  about = read_json(folder / DONE, {})
  _check_id(folder, about)
  described = about.get("files") or {}
  name = path.relative_to(folder).as_posix()
  for file, expected in described.items():
    inside = name == "." or file == name or file.startswith(f"{name}/")
    if inside and (wrong := rewritten.damage(folder / file, expected)):
      raise UserError(f"{folder / file} {wrong}: {again(folder, folder / file)}.")


def _are_descriptions(files: object) -> bool:
  return isinstance(files, dict) and all(
    isinstance(one, dict)
    and type(one.get("bytes")) is int
    and isinstance(one.get("sha256"), str)
    and not name.startswith("/")
    and ".." not in name.split("/")
    for name, one in files.items()
  )


def again(folder: epath.Path, damaged: epath.PathLike) -> str:
  """Returns how to replace a damaged file of the stage in `folder`, for a message."""
  command = f"`cm3leon {command_of(folder)}`" if folder.name in STAGES else "its stage"
  return f"restore it, or delete {damaged} and {folder / DONE} and run {command} again"


def command_of(folder: epath.PathLike) -> str:
  """Returns the command that made the stage in `folder`, or the usual command if it is unknown.

  Tokenizers may be imported instead of trained. Tokenizers and CLIP may also be copied.
  """
  done, own = epath.Path(folder) / DONE, STAGES[epath.Path(folder).name].command
  config = read_json(done, {}).get("config") if exists(done) else None
  return config.get("command", own) if isinstance(config, dict) else own


def is_given(workdir: epath.PathLike, name: str) -> bool:
  """Returns whether the stage `name` was imported or copied. If so, prints which command did it.

  Training must not replace an imported or copied tokenizer: a decoder may depend on its ids.
  """
  folder = epath.Path(workdir) / name
  if (command := command_of(folder)) == STAGES[name].command:
    return False
  print(f"{folder}: made by cm3leon {command}, stays as it is; nothing is trained.", flush=True)
  return True


def ids(settings: Settings, workdir: epath.PathLike, names: Collection[str]) -> dict[str, str]:
  """Returns the ids of finished stages. The training only needs a checkpoint, see `train_id`.

  Raises:
    UserError: a stage is not finished. Only for the stage "train": the workdir does not exist, or
      was made with another model or vocabulary than the config's.
  """
  if "train" in names and not epath.Path(workdir).exists():
    raise UserError(f"there is no folder {workdir}: name the folder of a run with --workdir.")
  result = {n: train_id(workdir) if n == "train" else require(workdir, n)["id"] for n in names}
  if "train" in result:
    folder, expected = epath.Path(workdir) / "train", identity(settings, "train")
    if exists(folder / "config.json"):
      stored = read_json(folder / "config.json", {"run": dict})["run"]
    else:
      folder = epath.Path(workdir) / "init"
      stored = read_json(folder / DONE, {"config": dict})["config"]
    parts = ("vocab", "model")
    check_same_config(
      folder,
      {p: stored.get(p) for p in parts},
      {p: expected[p] for p in parts},
      remedy="give the --config of that run, or another --workdir",
    )
  return result


def inputs(settings: Settings, workdir: epath.PathLike, name: str) -> dict[str, str]:
  """Returns the ids of all stages that a stage reads. For errors, see `ids`."""
  return ids(settings, workdir, reads_of(settings, name))


def run_config(
  settings: Settings,
  workdir: epath.PathLike,
  name: str,
  more_inputs: Mapping[str, str] | None = None,
) -> dict:
  """Returns everything that the result of a stage depends on.

  The dict has the parts of the config that the stage uses and, under "inputs", the ids of its
  inputs.
  """
  read = {**inputs(settings, workdir, name), **(more_inputs or {})}
  return {**identity(settings, name), "inputs": read}


def stage(
  workdir: epath.PathLike,
  name: str,
  settings: Settings,
  more_inputs: Mapping[str, str] | None = None,
) -> contextlib.AbstractContextManager[dict[str, Any] | None]:
  """Runs the body unless the stage `name` of `table.STAGES` is finished; see `once`.

  `more_inputs` has digests of data that the stage reads in addition to other stages.

    with stages.stage(workdir, "vqgan", settings) as summary:
      if summary is not None:
        summary.update(psnr_db=23.3)  # done.json also records the seconds.

  Raises:
    UserError: a stage that this stage reads is not finished, or the folder has the result of
      another config.
  """
  config = run_config(settings, workdir, name, more_inputs)
  files, varying = STAGES[name].files, STAGES[name].varying
  return once(epath.Path(workdir) / name, config, files=files, varying=varying)


@contextlib.contextmanager
def once(
  folder: epath.PathLike,
  config: dict,
  redo: bool = False,
  writes: bool = True,
  together: Callable = contextlib.nullcontext,
  files: Collection[str] = (),
  varying: Collection[str] = (),
) -> Iterator[dict[str, Any] | None]:
  """Yields None if the stage in `folder` is finished, otherwise a dict for its summary.

  Args:
    folder: the stage's folder, created if absent.
    config: everything that the result depends on: config sections and, under "inputs", the ids of
      the stages that it reads. If only the inputs have changed, the stage runs again. If another
      part has changed, UserError is raised.
    redo: whether to run a finished stage again, even if it had another config.
    writes: whether this process deletes and writes done.json. Exactly one process of a job does.
      Either all processes run the body, or none.
    together: creates the context in which all processes of a job read done.json, so that all of
      them have read the file before one process deletes it.
    files: see `table.Stage`. Without files, the stage gets a new id each time it runs.
    varying: see `table.Stage`.

  Raises:
    UserError: the folder has the result of another config, or one of its files is damaged, or the
      summary contains a number that is not finite.
  """
  folder = epath.Path(folder)
  done = folder / DONE
  with together():
    finished = exists(done) and not redo and _is_current(folder, config)
  if finished:
    check_files(folder)
    if writes:
      print(f"{folder}: finished already, skipped.", flush=True)
    yield None
    return
  if writes:
    done.unlink(missing_ok=True)  # A stage is unfinished until its body ends.
    folder.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  summary: dict = {}
  yield summary
  if names := _not_finite(summary):
    raise UserError(
      f"{folder} is not finished: {', '.join(names[:4])} are not finite, so the stage diverged; "
      "see its output."
    )
  if writes:
    seconds, described = round(time.monotonic() - start, 1), describe_files(folder, files)
    about = {"config": config, "summary": summary, "seconds": seconds}
    new_id = id_of(described) if described else f"{time.time_ns():x}"
    more = describe_files(folder, varying)
    # Flush the files first, so that a power loss cannot leave done.json without its files.
    for name in [*described, *more]:
      sync(folder / name)
    write_json(done, {**about, "id": new_id, "files": {**described, **more}})


def _not_finite(summary: dict, where: str = "") -> list[str]:
  """Returns the names of the numbers in a nested dict that are NaN or infinite."""
  names = []
  for name, value in summary.items():
    if isinstance(value, dict):
      names += _not_finite(value, f"{where}{name}.")
    elif isinstance(value, Real) and not math.isfinite(value):
      names.append(f"{where}{name}")
  return names


def _is_current(folder: epath.Path, config: dict) -> bool:
  """Returns whether a finished stage ran with these inputs. Raises UserError for another config."""
  stored = read_json(folder / DONE, {"config": dict})["config"]
  inputs = plain(config).get("inputs")
  check_same_config(folder, {**stored, "inputs": inputs}, {**config, "inputs": inputs})
  return stored.get("inputs") == inputs

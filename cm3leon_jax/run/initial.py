"""Finds and loads the trained parameters that a run starts from.

The parameters come from another run, a bundle or an exported model.
"""

import dataclasses
import os
from typing import Any

from etils import epath

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.distributed import print_once
from cm3leon_jax.errors import UserError
from cm3leon_jax.files import foreign
from cm3leon_jax.files.atomic import absolute
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import plain, read_json
from cm3leon_jax.run import adapters, bundles, exported
from cm3leon_jax.run.adapters import Adapters, ParamsRef
from cm3leon_jax.run.source import (
  DESCRIPTIONS,
  IMAGES,
  INIT,
  INSTALLED,
  Source,
  folder_of,
  format_of,
)
from cm3leon_jax.stages import stages, table
from cm3leon_jax.weights import layouts, reading, stored_tensors, tensor_files

IMAGE_TOKENIZER = f"{IMAGES}/params.safetensors"  # Path in an exported model.
# Key in the summary of the stage INIT, and of a stage `vqgan` that trained only the decoder of an
# image tokenizer. Its value is the SHA-256 of that tokenizer, which has the same codes.
IMAGES_DIGEST = "image_tokenizer_sha256"
# Folder in INIT with the small files of a Chameleon that was imported, its tensors for images, and
# its ids, {"theirs": its id of each of our ids}.
PUBLISHED, VQMODEL, IDS = "published", "vqmodel.safetensors", "ids.json"


def of_run(
  settings: Settings, workdir: epath.PathLike, source: str, stored: dict[str, Any] | None
) -> ParamsRef | None:
  """Returns the trained parameters that a run starts, or started, from; None: random parameters.

  All processes must call this function.

  Args:
    source: value of --init_from. If it is empty, the run starts from the parameters that were
      imported into the workdir, if any.
    stored: the entry "run" of the run's config.json; None if the run has not begun.

  Raises:
    UserError: the run started from something other than `source`, or would train adapters of random
      parameters, or the base of its adapters has changed, or `find` raises the error.
  """
  tuned = settings.tuned
  if source and Source.of(source).kind == "import":
    source = _imported(folder_of(source))
  if stored is None:
    source = source or _imported(epath.Path(workdir))
    if tuned and not source:
      raise UserError(
        f"config.adapter.rank is {settings.adapter.rank} and config.train.only is "
        f"{settings.train.only}, but the run would start from random parameters: name the trained "
        "model that it tunes by --init_from=RUN."
      )
    if not source:
      return None
    source = _lasting(source) if tuned else source
    result = find(settings, source)
    at = "" if result.step is None else f", step {result.step}"
    print_once(f"train: the run starts from the parameters of {source}{at}.")
    for name in other_tokenizers(source, workdir):
      print_once(
        f"train: warning: {source} was trained with another {name} than the one in {workdir}; "
        "its parameters expect other token ids."
      )
    return result
  recorded = stored.get("init_from")
  began = recorded["source"] if recorded else "random parameters"
  if source and source != began and not (tuned and _lasting(source) == began):
    raise UserError(
      f"--init_from is {source}, but the run in {workdir} began from {began}: leave --init_from "
      "out to continue that run, or use another --workdir."
    )
  start = ParamsRef(**recorded) if recorded else None
  if tuned and start is not None:
    check_frozen(Adapters(epath.Path(workdir), tuned, start), settings)
  return start


def _lasting(source: str) -> str:
  """Returns the name of an installed bundle unchanged, and the absolute path of other sources.

  A run needs the base of its adapters also when a command starts in another folder.
  """
  is_name = folder_of(source) != epath.Path(source)
  return source if is_name else os.fspath(absolute(source))


def _imported(workdir: epath.Path) -> str:
  """Returns the folder with the imported parameters of a workdir, or "".

  Raises:
    UserError: an import has started but not finished. Without this error, the run would start from
      random parameters.
  """
  folder = workdir / INIT
  if not folder.exists():
    return ""
  if not (folder / stages.DONE).exists():
    raise UserError(
      f"{folder} is not finished: run `cm3leon import_weights` again, or delete that "
      "folder to begin from random parameters."
    )
  return os.fspath(folder)


@foreign.reads("a run, or a model that `cm3leon export` wrote", 1)
def find(settings: Settings, source: str, step: int | None = None) -> ParamsRef:
  """Finds trained parameters and compares their config with `settings`.

  For `source`, see `Source`. `step` selects a checkpoint of a run; None: the newest.

  Raises:
    UserError: `source` has no parameters, or their config differs in the section model or vocab.
  """
  given = Source.of(source)
  folder = given.folder
  if given.kind == "bundle":
    bundles.read(folder)  # Checks the bundle's files.
  elif given.kind != "run":
    exported.check(folder)
  if (kind := format_of(folder)) not in ("", "orbax"):
    raise UserError(
      f"--init_from is {source}, an export {DESCRIPTIONS[kind]}, which differs from the trained "
      "parameters: name the workdir that it was exported from, or an export in the format "
      "hf or orbax."
    )
  expected = plain(table.identity(settings, "train"))
  if given.kind == "run":
    described = read_json(folder / "train" / "config.json", {"run": dict})["run"]
    expected = {part: expected[part] for part in ("model", "vocab")}
  elif exported.is_orbax(folder):
    described = read_json(folder / "config.json", {"model": dict})
    expected = {part: expected[part] for part in ("model", "vocab")}
  elif stored_tensors.are_in(folder):
    described = layouts.config_of(read_json(folder / "config.json", {}))
    expected = {part: {k: expected[part][k] for k in described[part]} for part in described}
  else:
    raise UserError(
      f"--init_from is {source}; it must be the workdir of a run, with train/config.json, a "
      f"folder of `cm3leon export`, with config.json and {tensor_files.WEIGHTS}, or the "
      f"name of an installed model: {', '.join(INSTALLED)}."
    )
  if settings.model.traits.rotary:  # Any number of positions fits the parameters.
    for fields in (described, expected):
      fields.get("model", {}).pop("max_positions", None)
  changed = stages.differences({part: described.get(part) for part in expected}, expected)
  if changed:
    raise UserError(
      f"--init_from is {source}, whose config differs from this one ({'; '.join(changed[:4])}): "
      "model and vocab must be the same."
    )
  if given.kind == "run":
    return ParamsRef(source, *reading.identify(folder / "train", step))
  if exported.is_orbax(folder):
    return ParamsRef(source, None, exported.digest_of_params(folder))
  return ParamsRef(source, None, stored_tensors.digest_of(folder))


def other_tokenizers(source: str, workdir: epath.PathLike) -> list[str]:
  """Returns the names of the tokenizers whose tokens differ between `source` and a workdir."""
  folder, workdir = bundles.stages_folder(folder_of(source)), epath.Path(workdir)
  text, image = "text_tokenizer/tokenizer.json", "vqgan/params.safetensors"
  pairs = [
    ("text tokenizer", folder / text, workdir / text),
    ("text tokenizer", folder / "tokenizer.json", workdir / text),  # For an exported model.
    ("image tokenizer", folder / image, workdir / image),
    ("image tokenizer", folder / IMAGE_TOKENIZER, workdir / image),
  ]
  pairs = [(name, digest(theirs), digest(ours)) for name, theirs, ours in pairs]
  if folder.name == INIT and (done := folder / stages.DONE).exists():
    pairs.append(("image tokenizer", _recorded(done), digest(workdir / image)))
  done = workdir / "vqgan" / stages.DONE
  same = _recorded(done) if done.exists() else None
  return [name for name, theirs, ours in pairs if theirs and ours and theirs not in (ours, same)]


def _recorded(done: epath.Path) -> str | None:
  """Returns the digest that a stage's done.json has as `IMAGES_DIGEST`, if any."""
  return read_json(done, {}).get("summary", {}).get(IMAGES_DIGEST)


def seconds_before(workdir: epath.PathLike) -> float:
  """Returns the total training time, in seconds, of all runs that a run descends from.

  A run whose folder no longer exists counts as 0 seconds.
  """
  if (start := recorded(workdir)) is None:
    return 0.0
  source = Source.of(start.source)
  folder = source.folder
  if source.kind == "bundle":
    return (bundles.about(folder)["cost"] or {}).get("train_seconds", 0.0)
  if not (done := folder / "train" / stages.DONE).exists():
    return 0.0
  return read_json(done, {"seconds": float})["seconds"] + seconds_before(folder)


def check_frozen(found: Adapters, settings: Settings) -> None:
  """Checks that the base of adapters is the one that they were trained on.

  `settings` are those of the run that trained the adapters. All processes must call this function.

  Raises:
    UserError: the base is absent, has another model or vocab, or has changed.
  """
  source, what = found.base.source, f"the parameters trained in {found.folder} need their base"
  if not folder_of(source).exists():
    raise UserError(
      f"{what}, {source}, which does not exist: put it back, or, if it has moved, enter its "
      f"path as run.init_from.source in {found.folder / 'train' / 'config.json'}."
    )
  if find(settings, source, found.base.step) != found.base:
    raise UserError(
      f"{what}, but the parameters in {source} have changed since: restore the parameters of "
      f"SHA-256 {str(found.base.digest)[:12]}."
    )


def over(source: str, adapter: str | os.PathLike[str]) -> Adapters:
  """Opens adapters to add them to the parameters of `source`, see `Source`.

  `adapter` is the workdir of the run that trained them.

  Raises:
    UserError: `adapter` contains no adapters, or they were trained on other parameters.
  """
  if (result := adapters.of_run(adapter)) is None:
    raise UserError(
      f"{adapter} contains no adapters: name the workdir of a run with config.adapter.rank > 0 or "
      "with config.train.only."
    )
  given = find(result.settings, source, result.base.step)
  if (given.step, given.digest) != (result.base.step, result.base.digest):
    raise UserError(
      f"the adapters in {result.folder} were trained on other parameters than those of {source}: "
      f"their base is {result.base.source}."
    )
  return dataclasses.replace(result, base=given)


def recorded(workdir: epath.PathLike) -> ParamsRef | None:
  """Returns the trained parameters that a workdir's run started from; None: random parameters."""
  run = read_json(epath.Path(workdir) / "train" / "config.json", {"run": dict})["run"]
  return ParamsRef(**run["init_from"]) if run.get("init_from") else None


def published_of(workdir: epath.PathLike) -> epath.Path | None:
  """Returns the folder `PUBLISHED` of the Chameleon that a run descends from; None: of none.

  Raises:
    UserError: the run descends from a folder that does not exist.
  """
  folder = epath.Path(workdir)
  while Source.of(folder).kind == "run":
    if (start := recorded(folder)) is None:
      return None
    folder, source = folder_of(start.source), start.source
    if not folder.exists():
      raise UserError(f"{workdir} began from {source}, which does not exist: put it back.")
  place = (folder / INIT if Source.of(folder).kind == "import" else folder) / PUBLISHED
  return place if (place / IDS).exists() else None

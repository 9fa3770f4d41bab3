"""A bundle: one folder with all that generates images, without the run that trained it.

It has the decoder in the Hugging Face layout (`huggingface.export`), vqgan/, clip/,
text_tokenizer/, all weights in float16 (finer than bfloat16 for numbers of this size, and read by
numpy), training_data.json (origins of its data), unseen_tokens.json (text ids that training never
met, if that is known), and bundle.json: settings, step, what the training cost, SHA-256 of every
file. If the run retrieves from the split `bank` alone, it has that bank, too: documents/ and
neighbors/.
A bundle on a base has only a decoder; tokenizers, CLIP and bank are those of another bundle.
"""

import dataclasses
import importlib.resources
import os

from etils import epath
import jax
import numpy as np

from cm3leon_jax import parameters
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.clip.model import PARAMS as CLIP_PARAMS
from cm3leon_jax.config import UserError, short
from cm3leon_jax.data.documents import training_data, unseen_tokens
from cm3leon_jax.data.documents.store import DocumentStore, write_documents
from cm3leon_jax.export import huggingface
from cm3leon_jax.files.atomic import absolute
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import plain, read_json, write_json
from cm3leon_jax.retrieval.bank import copy_bank
from cm3leon_jax.runs import stages
from cm3leon_jax.settings import Settings, settings_from_stored
from cm3leon_jax.tokenizers import text
from cm3leon_jax.tokenizers.vqgan import PARAMS as VQGAN_PARAMS
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

FILE = "bundle.json"
FIELDS = {"settings": dict, "step": int, "digests": dict}
INSTALLED = ("scenes", "scenes-instruct")  # Bundles that come with the package.
MODEL = ("params.safetensors", "config.json")
FILES = {"text_tokenizer": text.FILES, "vqgan": MODEL, "clip": MODEL}  # Of stages.
PARTS = (*FILES, "documents", "neighbors")  # Folders in a bundle.
AGAIN = "install cm3leon_jax again, or write the bundle again with `cm3leon export --bundle`"


def folder_of(source: str | os.PathLike[str]) -> epath.Path:
  """Returns the folder that `source` names: a path, or the name of an installed bundle."""
  path, name = epath.Path(source), os.fspath(source)
  if name in INSTALLED and not (is_bundle(path) or (path / "train").exists()):
    return epath.Path(str(importlib.resources.files("cm3leon_jax"))) / "assets" / "models" / name
  return path


def is_bundle(folder: epath.PathLike) -> bool:
  """Returns whether `write` has finished in `folder`."""
  return (epath.Path(folder) / FILE).exists()


def stages_folder(folder: epath.PathLike) -> epath.Path:
  """Returns where tokenizers, CLIP and bank of a run or bundle are: its folder, or its base's."""
  folder = epath.Path(folder)
  base = _stored_base(folder, read_json(folder / FILE, {})) if is_bundle(folder) else None
  return folder_of(base["name"]) if base else folder


def _stored_base(folder: epath.Path, stored: dict) -> dict[str, str] | None:
  """Returns name and digest of the base that a bundle.json names; raises UserError if damaged."""
  base = stored.get("base")
  if base is None:
    return None
  names = [base.get(key) for key in ("name", "digest")] if isinstance(base, dict) else [None]
  if not all(isinstance(name, str) for name in names):
    raise UserError(
      f"{folder / FILE}: base is {short(base)}; it must be an object with name and digest: {AGAIN}."
    )
  return base


def write(
  folder: epath.PathLike,
  workdir: epath.PathLike,
  settings: Settings,
  params: dict,
  step: int,
  cost: dict | None = None,
  base: str = "",
) -> dict:
  """Writes a bundle of a run with a CLIP of its own; bundle.json comes last.

  Args:
    folder: of the bundle.
    workdir: of the run; its tokenizers and CLIP are read.
    settings: of the run.
    params: of the decoder.
    step: of `params`.
    cost: of the run, see `reports.summary.cost`; None: unknown.
    base: another bundle, see `folder_of`, that has the tokenizers and CLIP of the run: they are not
      written again, and the bank is that of `base`. "": the bundle has all.

  Returns:
    {"files", "bytes"} of all files but bundle.json.

  Raises:
    UserError: the run reads a Hugging Face CLIP, a stage has not run, `folder` is that of a run,
      the Hugging Face model lacks a part of the decoder, or `base` is no bundle or has other
      tokenizers or another CLIP.
  """
  if settings.retrieval.clip:
    raise UserError(
      f"config.retrieval.clip is {settings.retrieval.clip}, and a bundle holds the CLIP that "
      "`cm3leon train_clip` trained: this run has no bundle."
    )
  folder, workdir = epath.Path(folder), epath.Path(workdir)
  _check_target(folder)
  huggingface.check(settings.model)
  texts = workdir / "text_tokenizer"
  described_base, of_base = _base(base, workdir) if base else (None, settings)
  _begin(folder)
  huggingface.export(folder, params, settings.model, settings.vocab, texts, "float16")
  training_data.write(folder, workdir, folder_of)
  names = [huggingface.WEIGHTS, "config.json", "generation_config.json", *text.FILES]
  names.append(training_data.FILE)
  names += _write_unseen(folder, workdir, settings)
  if base:
    settings = dataclasses.replace(settings, retrieval=of_base.retrieval)
  else:
    settings, of_bank = _write_bank(folder, workdir, settings)
    names += of_bank + _write_stages(folder, workdir)
  described = {
    "settings": plain(dataclasses.asdict(settings)),
    "step": step,
    "cost": cost,
    "base": described_base,
    "digests": {name: digest(folder / name) for name in sorted(names)},
  }
  write_json(folder / FILE, described)
  return {"files": len(names), "bytes": sum((folder / name).stat().length for name in names)}


def copy(folder: epath.PathLike, to: epath.PathLike) -> None:
  """Copies a bundle to a folder; one that is there is replaced. bundle.json comes last.

  Raises:
    UserError: `to` is the folder of a run, or of this bundle.
  """
  folder, to = epath.Path(folder), epath.Path(to)
  _check_target(to)
  if absolute(to) == absolute(folder):
    raise UserError(f"{to} is the bundle itself: name another folder.")
  _begin(to)
  more = [name for name in (training_data.FILE, "README.md") if (folder / name).exists()]
  names = [huggingface.WEIGHTS, *read_json(folder / FILE, FIELDS)["digests"], *more]
  for name in [*dict.fromkeys(names), FILE]:
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).copy(to / name, overwrite=True)


def _check_target(folder: epath.Path) -> None:
  """Raises UserError if a bundle in it would replace files of others."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file: name a folder for the bundle.")
  if any((folder / stage / stages.DONE).exists() for stage in stages.STAGES):
    raise UserError(
      f"{folder} is the folder of a run, whose tokenizers a bundle would replace: name another "
      "folder."
    )
  written = is_bundle(folder) or (folder / huggingface.WEIGHTS).exists()
  if folder.exists() and not written and (found := sorted(path.name for path in folder.iterdir())):
    raise UserError(
      f"{folder} holds '{found[0]}' and is no bundle: name a new or empty folder for the bundle."
    )


def _begin(folder: epath.Path) -> None:
  """Makes the folder, and removes a bundle in it, bundle.json first: half a bundle is none."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"{folder} cannot be made ({error.strerror}): name another folder for the bundle."
    ) from error
  for name in (FILE, unseen_tokens.FILE):
    (folder / name).unlink(missing_ok=True)
  for part in PARTS:
    if (folder / part).exists():
      (folder / part).rmtree()


def _base(base: str, workdir: epath.Path) -> tuple[dict[str, str], Settings]:
  """Returns name, digest and settings of the bundle `base`, whose tokenizers and CLIP a run has."""
  folder = folder_of(base)
  if not is_bundle(folder) or stages_folder(folder) != folder:
    raise UserError(
      f"--base is {base}; it must be a bundle with tokenizers and CLIP of its own: a folder that "
      f"`cm3leon export --bundle` wrote without --base, or {INSTALLED[0]}."
    )
  settings, _ = read(folder)
  for stage, files in FILES.items():
    for file in files:
      if digest(workdir / stage / file) != digest(folder / stage / file):
        raise UserError(
          f"--base is {base}, whose {stage}/{file} is not that of {workdir}: name the bundle that "
          "`cm3leon copy_tokenizers` copied from, or leave --base out."
        )
  return {"name": base, "digest": str(digest(folder / FILE))}, settings


def _write_unseen(folder: epath.Path, workdir: epath.Path, settings: Settings) -> list[str]:
  """Writes the tokens that training never showed, if they are known, and returns their file."""
  unseen = unseen_tokens.find(workdir, settings.vocab, folder_of)
  if unseen is None:
    return []
  unseen_tokens.write(folder, unseen)
  return [unseen_tokens.FILE]


def _write_stages(folder: epath.Path, workdir: epath.Path) -> list[str]:
  """Writes tokenizers and CLIP of a run; returns the names of all files."""
  (folder / "text_tokenizer").mkdir(parents=True, exist_ok=True)
  text.copy_files(workdir / "text_tokenizer", folder / "text_tokenizer")
  for stage, cls, params_file in (
    ("vqgan", ImageTokenizer, VQGAN_PARAMS),
    ("clip", CLIP, CLIP_PARAMS),
  ):
    (folder / stage).mkdir(exist_ok=True)
    model = cls.load(workdir / stage)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), model.params)
    parameters.save(folder / stage / params_file, rounded)
    (folder / stage / "config.json").write_text((workdir / stage / "config.json").read_text())
  return [f"{stage}/{name}" for stage, names in FILES.items() for name in names]


def _write_bank(
  folder: epath.Path, workdir: epath.Path, settings: Settings
) -> tuple[Settings, list[str]]:
  """Copies the documents of the split `bank` and their embeddings, if nothing else is searched.

  Returns:
    The settings with exact search, since no index is copied, and the names of all files.
  """
  if settings.retrieval.train_documents:
    return settings, []
  pairs = DocumentStore(workdir / "documents" / "bank_pairs", settings.vocab)
  write_documents(folder / "documents" / "train_pairs", (), settings.vocab)
  documents = (pairs[i] for i in range(len(pairs)))
  write_documents(folder / "documents" / "bank_pairs", documents, settings.vocab)
  copy_bank(workdir / "neighbors", folder / "neighbors")
  names = [
    str((epath.Path(root) / name).relative_to(folder))
    for part in ("documents", "neighbors")
    for root, _, files in (folder / part).walk()
    for name in files
  ]
  retrieval = dataclasses.replace(settings.retrieval, backend="exact")
  return dataclasses.replace(settings, retrieval=retrieval), names


def read(folder: epath.PathLike) -> tuple[Settings, int]:
  """Reads settings and step of a bundle; raises UserError if a file is not the one written.

  The files of its base are checked, too.
  """
  folder = epath.Path(folder)
  stored = read_json(folder / FILE, FIELDS)
  for name, expected in stored["digests"].items():
    found = digest(_own_file(folder, name))
    if found != expected:
      state = "is absent" if found is None else "has another content than the bundle was made with"
      raise UserError(f"{folder / name} {state} (SHA-256 {expected[:12]} expected): {AGAIN}.")
  if base := _stored_base(folder, stored):
    of_base = folder_of(base["name"])
    if digest(of_base / FILE) != base["digest"]:
      raise UserError(
        f"{folder} is a bundle on the base {base['name']}, and {of_base / FILE} "
        f"is absent or of another bundle: {AGAIN}."
      )
    read(of_base)
  return settings_from_stored(stored["settings"]), stored["step"]


def _own_file(folder: epath.Path, name: str) -> epath.Path:
  """Returns the path of a file of a bundle, which may come from a stranger.

  Links are followed: stores of packages and hubs keep their files elsewhere.

  Raises:
    UserError: the name leads out of the folder, or to what is no file, such as /dev/zero.
  """
  path = folder / name
  if "://" in name or name.startswith("/") or ".." in name.split("/"):
    raise UserError(f"{folder / FILE} names the file '{name}', which is not in {folder}: {AGAIN}.")
  if "://" not in os.fspath(path) and os.path.exists(path) and not os.path.isfile(path):
    raise UserError(f"{folder / FILE} names '{name}', which is no file: {AGAIN}.")
  return path


def about(folder: epath.PathLike) -> dict:
  """Describes a bundle: {"bytes" of its own files, "cost": as `write` got it, or None}."""
  folder = epath.Path(folder)
  stored = read_json(folder / FILE, {"digests": dict})
  size = sum(_own_file(folder, name).stat().length for name in stored["digests"])
  return {"bytes": size, "cost": stored.get("cost")}

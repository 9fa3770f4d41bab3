"""Writes and copies bundles. `run.bundles` describes their format."""

import dataclasses

from etils import epath
import jax
import numpy as np

from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.clip.model import PARAMS as CLIP_PARAMS
from cm3leon_jax.config import own_functions
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.documents import training_data
from cm3leon_jax.data.documents.store import Bank, write_documents
from cm3leon_jax.errors import UserError
from cm3leon_jax.export import huggingface, replay
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import plain, write_json
from cm3leon_jax.retrieval.bank import copy_bank
from cm3leon_jax.run import base_documents, bundles
from cm3leon_jax.run.run import Run
from cm3leon_jax.run.source import INSTALLED, Source, folder_of
from cm3leon_jax.stages import from_data, stages
from cm3leon_jax.tokenizers import text
from cm3leon_jax.tokenizers.vqgan import PARAMS as VQGAN_PARAMS
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.weights import layouts, stored_tensors, tensor_files

MOST_DOCUMENTS = 20_000  # A bundle has no search index, and is to fit into a package.
FILE_BYTES, MOST_FILES = 4 * 2**20, 8  # Of the weights. The package has no file above 5 MB.


def write(
  folder: epath.PathLike,
  run: Run,
  params: dict,
  step: int,
  cost: dict | None = None,
  base: str = "",
  replayed: int = from_data.BASE_DOCUMENTS,
) -> dict:
  """Writes a bundle of a run that trained its own CLIP; writes bundle.json last.

  Args:
    cost: cost of the run, see `reports.summary.cost`; None if it is unknown.
    base: another bundle, see `Source`, with the same tokenizers and CLIP as the run. The new
      bundle then refers to `base` for tokenizers, CLIP, bank and replay documents. If "", it
      contains them itself.
    replayed: maximum number of training pairs that the bundle contains for replay.

  Returns:
    {"files", "bytes"}: number and size of all files except bundle.json.

  Raises:
    UserError: the run uses a CLIP from Hugging Face, a stage has not run, `folder` belongs to a
      run, the Hugging Face format does not support the decoder, or `base` is not a bundle with the
      same tokenizers and CLIP.
  """
  settings, workdir = run.settings, run.folder
  if settings.retrieval.clip:
    raise UserError(
      f"config.retrieval.clip is {settings.retrieval.clip}, but a bundle needs a CLIP that "
      "`cm3leon train_clip` trained: no bundle can be written."
    )
  folder = epath.Path(folder)
  _check_target(folder)
  layouts.layout_of(settings.model).check(settings.model)
  described_parent, of_parent = _base(base, workdir) if base else (None, settings)
  _begin(folder)
  _write_weights(folder, run, params)
  write_json(folder / training_data.FILE, training_data.collect(workdir, folder_of))
  if base:
    settings = dataclasses.replace(settings, retrieval=of_parent.retrieval)
  else:
    settings = _write_bank(folder, run)
    if replayed and base_documents.is_complete(workdir):
      replay.write(folder / bundles.REPLAY, run, replayed)
    _write_stages(folder, workdir)
  names = _names_in(folder)
  described = {
    "settings": _without_functions(plain(dataclasses.asdict(settings))),
    "step": step,
    "cost": cost,
    "base": described_parent,
    "digests": {name: digest(folder / name) for name in sorted(names)},
  }
  write_json(folder / bundles.FILE, described)
  return {"files": len(names), "bytes": sum((folder / name).stat().length for name in names)}


def _without_functions(settings: dict) -> dict:
  """Removes functions of the user's files, and their options: other machines lack these files."""
  for section, field in own_functions.FIELDS:
    if own_functions.is_function(settings[section][field]):
      settings[section][field] = ""
      settings[section].pop("options", None)
  return settings


def _write_weights(folder: epath.Path, run: Run, params: dict) -> None:
  """Writes the parameters, the text tokenizer and their configs in the Hugging Face format."""
  model, vocab, tokenizer = run.settings.model, run.settings.vocab, run.folder / "text_tokenizer"
  size = 2 * sum(x.size for x in jax.tree.leaves(params))
  of_file = min(max(FILE_BYTES, size // MOST_FILES), tensor_files.SHARD_BYTES)
  huggingface.export(folder, params, model, vocab, tokenizer, "float16", of_file)


def _names_in(folder: epath.Path) -> set[str]:
  """Returns the names of all files that a bundle has digests of: all but its model card."""
  files = [epath.Path(root) / name for root, _, result in folder.walk() for name in result]
  names = {file.relative_to(folder).as_posix() for file in files if file.name[0] != "."}
  return names - {"README.md", bundles.FILE}


def _check_target(folder: epath.Path) -> None:
  """Raises UserError if this folder contains files that do not belong to a bundle."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file: choose a folder for the bundle.")
  if any((folder / stage / stages.DONE).exists() for stage in stages.STAGES):
    raise UserError(
      f"{folder} is the folder of a run, whose tokenizers would be overwritten: choose another "
      "folder."
    )
  written = (folder / bundles.FILE).exists() or stored_tensors.are_in(folder)
  if folder.exists() and not written and (result := sorted(path.name for path in folder.iterdir())):
    raise UserError(
      f"{folder} contains '{result[0]}' and is not a bundle: choose a new or empty folder."
    )


def _begin(folder: epath.Path) -> None:
  """Creates the folder, and removes any bundle in it.

  Removes bundle.json first, because a folder without bundle.json does not count as a bundle.
  """
  folder.mkdir(parents=True, exist_ok=True)
  (folder / bundles.FILE).unlink(missing_ok=True)
  for part in bundles.PARTS:
    if (folder / part).exists():
      (folder / part).rmtree()


def _base(base: str, workdir: epath.Path) -> tuple[dict[str, str], Settings]:
  """Returns the name and digest of the bundle `base`, and its settings."""
  source = Source.of(base)
  folder = source.folder
  if "://" in base or source.kind != "bundle" or bundles.stages_folder(folder) != folder:
    raise UserError(
      f"--base is {base}; it must be a bundle with its own tokenizers and CLIP: a local folder "
      f"that `cm3leon export --bundle` wrote without --base, or {INSTALLED[0]}."
    )
  settings, _ = bundles.read(folder)
  for stage, files in bundles.FILES.items():
    for file in files:
      if digest(workdir / stage / file) != digest(folder / stage / file):
        raise UserError(
          f"--base is {base}, whose {stage}/{file} differs from the file in {workdir}: give the "
          "bundle that `cm3leon copy_tokenizers` copied from, or omit --base."
        )
  return {"name": base, "digest": str(digest(folder / bundles.FILE))}, settings


def _write_stages(folder: epath.Path, workdir: epath.Path) -> None:
  """Writes the tokenizers and CLIP of a run."""
  (folder / "text_tokenizer").mkdir(parents=True, exist_ok=True)
  text.copy_files(workdir / "text_tokenizer", folder / "text_tokenizer")
  for stage, cls, params_file in (
    ("vqgan", ImageTokenizer, VQGAN_PARAMS),
    ("clip", CLIP, CLIP_PARAMS),
  ):
    (folder / stage).mkdir(exist_ok=True)
    model = cls.load(workdir / stage)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), model.params)
    stored_tensors.save(folder / stage / params_file, rounded)
    (folder / stage / "config.json").write_text((workdir / stage / "config.json").read_text())


def _write_bank(folder: epath.Path, run: Run) -> Settings:
  """Writes the documents that the run retrieves as the split `bank`, if they are few.

  Returns:
    The settings. If the bank is written, they select exact search, because no search index is
    copied.
  """
  settings, train = run.settings, run.settings.retrieval.train_documents
  if not settings.data.num_neighbors:
    return settings
  bank = Bank(run.folder / "documents", settings.vocab)
  first = 0 if train else len(bank.parts[0])
  if len(bank) - first > MOST_DOCUMENTS:
    return settings
  write_documents(folder / "documents" / "train_pairs", (), settings.vocab)
  kept = copy_bank(run.folder / "neighbors", folder / "neighbors", train)
  documents = (bank[first + i] for i in kept)
  write_documents(folder / "documents" / "bank_pairs", documents, settings.vocab)
  retrieval = dataclasses.replace(settings.retrieval, backend="exact", train_documents=False)
  return dataclasses.replace(settings, retrieval=retrieval)

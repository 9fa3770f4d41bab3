"""Reads a bundle: one folder with everything that sampling needs, independent of the training run.

A bundle contains:
  the decoder, in the Hugging Face layout (`huggingface.export`);
  vqgan/, clip/ and text_tokenizer/;
  documents/ and neighbors/, if the run retrieves from at most 20,000 documents;
  replay/: a sample of the run's documents with their neighbors, for a tuning (`base_documents`);
  training_data.json: origins of the training data;
  bundle.json: settings, step, training cost, and the SHA-256 of every file.
All weights are float16: numpy can read it, and it rounds weights less than bfloat16 does.
A bundle can name another bundle as its base. Then it contains only a decoder, and uses the
tokenizers, CLIP model, bank and replay documents of the base.
"""

from collections.abc import Collection, Iterable, Mapping
import math

from etils import epath
import numpy as np

from cm3leon_jax.config.settings import Settings, settings_from_stored
from cm3leon_jax.data.documents.store import Bank, DocumentStore
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files import foreign
from cm3leon_jax.files.digests import damage, digest
from cm3leon_jax.files.json_files import check_foreign, read_foreign_json
from cm3leon_jax.retrieval import lexical
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.retrieval.bank import Embeddings
from cm3leon_jax.run.source import BUNDLE as FILE
from cm3leon_jax.run.source import Source, folder_of, settings_of_run
from cm3leon_jax.tokenizers import text

FIELDS = {"settings": dict, "step": int, "digests": dict}
MODEL = ("params.safetensors", "config.json")
# Stage -> the files that a bundle copies from it.
FILES = {"text_tokenizer": text.FILES, "vqgan": MODEL, "clip": MODEL}
REPLAY = "replay"
STORES = ("documents", "neighbors", REPLAY)  # Folders that a bundle may have.
PARTS = (*FILES, *STORES)  # Folders in a bundle.
AGAIN = "install cm3leon_jax again, or write the bundle again with `cm3leon export --bundle`"


@foreign.reads("a bundle")
def stages_folder(folder: epath.PathLike) -> epath.Path:
  """Returns the folder that contains the tokenizers, CLIP model and bank of a run or bundle.

  For a bundle with a base, this is the folder of the base, otherwise `folder`.
  """
  folder = epath.Path(folder)
  base = _stored_parent(folder, _stored(folder)) if (folder / FILE).exists() else None
  return folder_of(base["name"]) if base else folder


def _stored(folder: epath.Path) -> dict:
  """Reads bundle.json, which has a digest of every file that is ever read.

  Raises:
    UserError: a file is absent, has no digest, or must not be opened, see `foreign.check_folder`.
  """
  result = foreign.check_folder(folder, (*PARTS, "train"))
  stored = read_foreign_json(folder / FILE, FIELDS, AGAIN)
  # Only JSON and weights are read from the folder itself, and no hidden file, such as .DS_Store.
  needed = {name for name in result if "/" in name or name.endswith((".json", ".safetensors"))}
  needed = {name for name in needed if "/." not in f"/{name}"} - {FILE}
  if wrong := sorted(
    (needed - stored["digests"].keys()) | (stored["digests"].keys() - set(result))
  ):
    raise UserError(
      f"{folder / FILE}: '{wrong[0]}' is absent, not in the folder or has no digest: {AGAIN}."
    )
  return stored


def _stored_parent(folder: epath.Path, stored: dict) -> dict[str, str] | None:
  """Returns {"name", "digest"} of a bundle's base, or None. Raises UserError for a URL."""
  base = stored.get("base")
  if base is not None and "://" in base["name"] + base["digest"]:
    raise UserError(
      f"{folder / FILE}: base is {short(base['name'])}; it must be an installed bundle or a local "
      f"folder: {AGAIN}."
    )
  return base


@foreign.reads("a bundle")
def read(folder: epath.PathLike) -> tuple[Settings, int]:
  """Reads the settings and step of a bundle, which may come from an untrusted source.

  Checks all files of the bundle and of its base, and opens the bank.

  Raises:
    UserError: a file is absent, has changed, has no digest or cannot be read.
  """
  folder = epath.Path(folder)
  stored = _stored(folder)
  check_digests(folder, stored["digests"], stored["digests"], AGAIN)
  if base := _stored_parent(folder, stored):
    of_parent = folder_of(base["name"])
    check_foreign(of_parent / FILE)
    if digest(of_parent / FILE) != base["digest"]:
      raise UserError(
        f"{folder} is a bundle with the base {base['name']}, but {of_parent / FILE} "
        f"is absent or belongs to another bundle: {AGAIN}."
      )
    read(of_parent)
  settings = settings_from_stored(stored["settings"])
  if settings.retrieval.clip:
    raise UserError(
      f"{folder / FILE}: retrieval.clip is {short(settings.retrieval.clip)}, but a bundle contains "
      f"its own CLIP: {AGAIN}."
    )
  size = about(folder)["bytes"]
  if (folder / "documents").exists():
    _check_bank(folder, settings, size)
  if (folder / REPLAY).exists():
    _check_replay(folder / REPLAY, settings, size)
  return settings, stored["step"]


def read_parent(name: str) -> tuple[Settings, epath.Path]:
  """Reads the settings of a run or bundle from which a run is tuned.

  Returns them with the folder of its tokenizers and CLIP model.

  Raises:
    UserError: see `Source.check_parent` and `read`.
  """
  source = Source.of(name)
  source.check_parent()
  if source.kind != "bundle":
    return settings_of_run(source.folder), source.folder
  return read(source.folder)[0], stages_folder(source.folder)


def check_digests(
  folder: epath.Path, digests: Mapping[str, str], files: Collection[str], remedy: str
) -> None:
  """Checks files of a bundle or export against their SHA-256.

  Args:
    files: names of the files in the folder, see `foreign.check_folder`.

  Raises:
    UserError: a file is absent or has changed.
  """
  for name, expected in digests.items():
    is_listed = name in files
    result = damage(folder / name, {"sha256": expected}) if is_listed else "is missing"
    if result:
      raise UserError(f"{folder / name} {result}: {remedy}.")


def _are_sound(stores: Iterable[DocumentStore], arrays: Iterable[ArrayStore], size: int) -> bool:
  """Returns whether stores and arrays fit their files, which have `size` bytes together."""
  return all(math.prod(x.shape) * x.dtype.itemsize <= size for x in arrays) and all(
    store.offsets[0] == 0 and (np.diff(store.offsets) > 0).all() and (store.lengths > 0).all()
    for store in stores
  )


def _check_replay(folder: epath.Path, settings: Settings, size: int) -> None:
  """Opens the replay documents. Raises UserError if they do not fit their neighbors."""
  bank = Bank(folder / "documents", settings.vocab)
  for name, array in (("train_pairs", "ids"), ("heldout_pairs", "text_ids")):
    store = DocumentStore(folder / "documents" / name, settings.vocab)
    ids = ArrayStore(folder / "neighbors" / name / array)
    if not _are_sound([store, *bank.parts], [ids], size) or ids.shape[:1] != (len(store),):
      raise UserError(f"{folder} has arrays of a wrong shape: {AGAIN}.")


def _check_bank(folder: epath.Path, settings: Settings, size: int) -> None:
  """Opens the bank. Raises UserError if its arrays would take more memory than their files."""
  neighbors, config = folder / "neighbors", settings.retrieval
  bank = Bank(folder / "documents", settings.vocab)
  lexical.load(neighbors, config.lexical_weight, config.lexical_width)
  result = Embeddings(neighbors / "train")
  large = not _are_sound(bank.parts, (result.documents, result.groups, result.keys), size)
  of_rows = (len(bank),) == result.groups.shape == result.keys.shape == result.documents.shape[:1]
  large |= not (of_rows and 0 <= result.first_bank <= len(bank))
  words = config.lexical_width if config.lexical_weight else 0
  # A bundle has no search index, and ScaNN would trust its content.
  if large or words > result.documents.shape[1] or (neighbors / "index").exists():
    raise UserError(f"{neighbors} has arrays of a wrong shape, or an index: {AGAIN}.")


def about(folder: epath.PathLike) -> dict:
  """Returns {"bytes": size without the base, "cost": the training cost if it is recorded}."""
  folder = epath.Path(folder)
  stored = _stored(folder)
  size = sum((folder / name).stat().length for name in stored["digests"])
  return {"bytes": size, "cost": stored.get("cost")}

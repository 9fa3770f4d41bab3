"""Reads the files of document shards and checks their versions, vocabularies and digests."""

from collections.abc import Callable, Iterable, Mapping

from etils import epath
import numpy as np

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import describe
from cm3leon_jax.files.rewritten import damage
from cm3leon_jax.stages import stages, table
from cm3leon_jax.vocab import VocabLayout

SCHEMA_VERSION = 4
RECORDS, LENGTHS = ".array_record", ".npz"  # Suffixes of the two files of a shard.


class BadRecord(UserError):
  """Error of an unreadable document. `data.on_bad_record` decides whether training skips it."""


def read_lengths(folder: epath.Path, name: str, vocab: VocabLayout) -> dict[str, np.ndarray]:
  """Reads the arrays that `write_shard` wrote for a shard.

  Raises:
    UserError: the file is missing, is damaged, or has another schema version or vocabulary.
  """
  path = folder / f"{name}{LENGTHS}"
  if not path.exists():
    raise UserError(f"{path} is missing: {encode_again(path)}.")
  try:
    with path.open("rb") as f, np.load(f) as file:
      arrays = dict(file)
  except Exception as error:  # Damaged archives raise many kinds of errors.
    raise UserError(
      f"{path} cannot be read ({error}): {stages.again(folder.parent, path)}."
    ) from error
  check_version(path, int(arrays["schema_version"]))
  check_vocab(path, dict(zip(vocab.sizes, arrays["vocab"].tolist())), vocab)
  return arrays


def check_version(path: epath.Path, version: int | None) -> None:
  """Raises UserError if the schema version is not `SCHEMA_VERSION`."""
  if version != SCHEMA_VERSION:
    raise UserError(
      f"{path} has schema version {version}; this code reads version {SCHEMA_VERSION}: "
      f"{encode_again(path)}."
    )


def check_vocab(path: epath.Path, stored: Mapping[str, int], expected: VocabLayout) -> None:
  """Raises UserError if the sizes `stored` in a file are not those of the `expected` vocabulary."""
  if stored != expected.sizes:
    raise UserError(
      f"{path} was written with vocabulary {stored}, "
      f"but the config has {expected.sizes}: {encode_again(path)}."
    )


def describe_shard(folder: epath.Path, name: str, stored: np.ndarray) -> dict[str, dict]:
  """Returns the size and the SHA-256 digest of both files of a shard.

  `stored` has the size and the digest of the record file when it was written. Raises UserError if
  the size changed after that.
  """
  records, lengths = f"{name}{RECORDS}", f"{name}{LENGTHS}"
  result = {"bytes": int(stored[0]), "sha256": str(stored[1])}
  check_shard_file(folder, records, result, content=False)
  return {records: result, lengths: describe(folder / lengths)}


def check_shard_file(folder: epath.Path, file: str, expected: dict, content: bool = True) -> None:
  """Raises BadRecord if a shard file is missing or damaged. `content` also checks its digest."""
  if wrong := damage(folder / file, expected, content):
    raise BadRecord(f"{folder / file} {wrong}: {stages.again(folder.parent, folder / file)}.")


def encode_again(path: epath.PathLike) -> str:
  """Returns the end of an error message, which says how to rewrite the store of `path`."""
  folders = [folder for folder in epath.Path(path).parents if folder.name in table.STAGES]
  folder = folders[0] if folders else epath.Path("documents")
  command = table.STAGES[folder.name].command
  return f"delete the folder {folder} and run `cm3leon {command}` again"


def shards_with_files(folders: Iterable[epath.PathLike]) -> Callable[[str], bool]:
  """Returns a function that says whether each of `folders` has both files of a given shard."""
  folders = [epath.Path(folder) for folder in folders]
  result = [{p.name for p in folder.iterdir()} if folder.exists() else set() for folder in folders]
  return lambda name: all({f"{name}{RECORDS}", f"{name}{LENGTHS}"} <= files for files in result)

"""Rewrites files of a finished stage. The stage keeps its id, and checks accept both contents."""

from collections.abc import Iterator
import contextlib
import os

from etils import epath

from cm3leon_jax.files import digests
from cm3leon_jax.files.atomic import exists, partial_path
from cm3leon_jax.files.json_files import read_json, write_json

DONE = "done.json"
FIELD = "rewritten"  # Field of done.json: name of a file -> descriptions of its later contents.


def stage_of(path: epath.Path) -> epath.Path | None:
  """Returns the folder of the finished stage that a file or folder belongs to, or None."""
  for folder in (path, *list(path.parents)[:3]):
    if not os.fspath(folder).endswith("://") and exists(folder / DONE):  # `gs://` is not a folder.
      return folder
  return None


def damage(path: epath.PathLike, expected: dict, content: bool = True) -> str | None:
  """Returns `digests.damage` of a file of a stage, or None if `rewriting` replaced the file."""
  path = epath.Path(path)
  wrong = digests.damage(path, expected, content)
  if wrong and (folder := stage_of(path)):
    later = read_json(folder / DONE, {}).get(FIELD, {})
    result = later.get(path.relative_to(folder).as_posix(), ())
    wrong = None if any(not digests.damage(path, one, content) for one in result) else wrong
  return wrong


@contextlib.contextmanager
def rewriting(path: epath.PathLike) -> Iterator[epath.Path]:
  """Is `partial_path`, but describes the new file in done.json before it replaces `path`."""
  path = epath.Path(path)
  with partial_path(path) as partial:
    yield partial
    folder = stage_of(path)
    about = read_json(folder / DONE, {}) if folder else {}
    if folder and about.get("files"):
      later = about.setdefault(FIELD, {}).setdefault(path.relative_to(folder).as_posix(), [])
      later += [one for one in [digests.describe(partial)] if one not in later]
      write_json(folder / DONE, about)

"""Resolves the image paths in records. Rejects paths that lead out of a folder."""

import dataclasses
import functools
import os
import posixpath

from cm3leon_jax.errors import UserError

URL = "://"
BY_FLAG = "put it there, or allow images from everywhere with --allow_outside."
LOCAL = ("", "file://", "local://")  # Prefixes that fsspec allows for local paths.


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """The folder that must contain the images of records. Links are resolved before the check.

  Records may come from untrusted sources. A path out of the folder could name any file on the
  machine, and a URL could make the machine send requests.

  Attributes:
    remedy: end of the error message, which says what to do with an image outside the folder.
  """

  path: str
  remedy: str = "put it there, or give its folder as the image folder."
  allow_outside: bool = False

  def find(self, name: str, where: str, noun: str = "image") -> str:
    """Returns the full path of an image, whether or not it exists.

      ImageFolder("data").find("val/7.jpg", "a.jsonl, line 1") = "data/val/7.jpg"

    The error message does not reveal whether the file exists. `name` is a path relative to the
    folder, an absolute path, or a URL. The error message contains `where`, the place of the record,
    and `noun`, the kind of the file.

    Raises:
      UserError: the path is outside the folder.
    """
    path = name
    if URL not in name and not posixpath.isabs(name):
      start, folder = _split(self.path)
      path = start + posixpath.normpath(posixpath.join(folder, name))
    if not self.allow_outside and not self._holds(path):
      folder = "the current folder" if self.path in ("", ".") else self.path
      raise UserError(f"{where}: {noun} '{name}' is not in {folder}; {self.remedy}")
    return path

  def _holds(self, path: str) -> bool:
    try:
      return _resolve(path).startswith(self._inside)
    except ValueError:  # The path contains a null character or half of a surrogate pair.
      return False

  @functools.cached_property
  def _inside(self) -> str:
    """Returns the prefix that all paths in the folder have."""
    return _resolve(self.path).rstrip("/") + "/"


def _resolve(path: str) -> str:
  """Returns the absolute path without `..`. Local paths also have their links resolved."""
  start, inner = _split(path)
  if start not in LOCAL:
    return start + posixpath.normpath(inner)
  # This is how `open_filesystem` resolves paths, too.
  return start + os.path.realpath(os.path.abspath(inner))


def _split(path: str) -> tuple[str, str]:
  """Splits off the protocol: _split("gs://a/b") = ("gs://", "a/b"), _split("a") = ("", "a")."""
  protocol, url, inner = path.partition(URL)
  return (protocol + url, inner) if url else ("", path)

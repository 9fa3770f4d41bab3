"""Finds the images that records name, which must be in the folder of their file."""

import dataclasses
import functools
import os
import posixpath

from etils import epath

from cm3leon_jax.config import UserError

URL = "://"
BY_FLAG = "put it there; --allow_outside takes images from everywhere."
LOCAL = ("", "file://", "local://")  # Beginnings of local paths, as fsspec has them.


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """A folder that the images of records must be in, links followed.

  Records may come from strangers: a path out of the folder could name any file of the machine, and
  a URL could make it send requests.

  Attributes:
    path: of the folder, local or in a bucket.
    remedy: of the error, a sentence or the end of one: what to do with an image that is elsewhere.
    allow_outside: whether images may be anywhere.
  """

  path: str
  remedy: str = "put it there, or name the folder that holds it as the folder of images."
  allow_outside: bool = False

  def find(self, name: str, where: str, noun: str = "image") -> str:
    """Returns the full path of an image, whether or not it exists.

      ImageFolder("data").find("val/7.jpg", "a.jsonl, line 1") = "data/val/7.jpg"

    The error is the same whether or not there is such a file: it must not say what the machine has.

    Args:
      name: path relative to the folder, absolute path, or URL.
      where: the record stands, for the error.
      noun: what kind of file is named.

    Raises:
      UserError: the file is not in the folder.
    """
    path = self._join(name)
    if not self.allow_outside and not self._holds(path):
      folder = "the current folder" if self.path in ("", ".") else self.path
      raise UserError(f"{where}: {noun} '{name}' is not in {folder}; {self.remedy}")
    return path

  def _join(self, name: str) -> str:
    if URL in name or posixpath.isabs(name):
      return name
    start, folder = _split(self.path)
    return start + posixpath.normpath(posixpath.join(folder, name))

  def _holds(self, path: str) -> bool:
    try:
      return _resolve(path).startswith(self._inside)
    except ValueError:  # A null, or half of a surrogate pair, which no path can have.
      return False

  @functools.cached_property
  def _inside(self) -> str:
    """Returns the beginning of all paths in the folder."""
    return _resolve(self.path).rstrip("/") + "/"


def image_folder(path: epath.PathLike | ImageFolder) -> ImageFolder:
  """Returns the folder of images at a path, or an `ImageFolder` as it is."""
  return path if isinstance(path, ImageFolder) else ImageFolder(os.fspath(path))


def _resolve(path: str) -> str:
  """Returns the one name of a path: absolute, without `..`; a local one also without links."""
  start, inner = _split(path)
  if start not in LOCAL:
    return start + posixpath.normpath(inner)
  # The path that `open_filesystem` opens.
  return start + os.path.realpath(os.path.abspath(os.path.expanduser(inner)))


def _split(path: str) -> tuple[str, str]:
  """Splits off the protocol: _split("gs://a/b") = ("gs://", "a/b"); _split("a") = ("", "a")."""
  protocol, url, inner = path.partition(URL)
  return (protocol + url, inner) if url else ("", path)

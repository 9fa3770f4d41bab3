"""Lists the files of a source, which is a folder, a file or a glob pattern, local or `gs://`."""

from collections.abc import Collection
import os
import posixpath
from typing import Any, NamedTuple

from etils import epath
import fsspec

from cm3leon_jax.errors import UserError, printable
from cm3leon_jax.files.atomic import open_filesystem
from cm3leon_jax.stages import stages

# Attributes that change with the content of a file: a checksum (GCS bucket) or a time (local).
STAMPS = ("md5Hash", "ETag", "etag", "mtime")
WILDCARDS = "*?["
PROTOCOLS = {"file", "local", "gs", "gcs", "memory"}


class SourceFile(NamedTuple):
  """Attributes of a file. `stamp` is its checksum or modification time."""

  size: int
  stamp: str
  is_link: bool


def open_source(source: epath.PathLike) -> tuple[fsspec.AbstractFileSystem, str]:
  """Returns the filesystem of a source, and the path in it.

  Raises:
    UserError: the source is neither a local path nor in a GCS bucket.
  """
  protocol, url, _ = os.fspath(source).partition("://")
  if url and protocol not in PROTOCOLS:
    raise UserError(
      f"config.raw.source is '{source}', but must be local or gs://, not S3 or a web address: "
      "download the files first."
    )
  try:
    return open_filesystem(source)
  except UserError as error:
    raise UserError(f"config.raw.source: {error}") from error


def list_files(
  fs: fsspec.AbstractFileSystem, path: str, source: str, run: str
) -> dict[str, SourceFile]:
  """Lists the files at `path` in the order of their names. Skips hidden files, and runs.

  A path that exists is no pattern: a folder may be named `photos [2025]`.
  """
  entries: dict[str, dict[str, Any]] = {}
  hidden: int | None = len(path)
  if fs.exists(path):
    entries = fs.find(path, detail=True)
  elif any(c in path for c in WILDCARDS):
    entries, hidden = fs.glob(path, detail=True), None
  files = {
    name: SourceFile(
      int(about.get("size") or 0),
      next((str(about[s]) for s in STAMPS if s in about), ""),
      bool(about.get("islink")),
    )
    for name, about in sorted(entries.items())
    if about["type"] == "file" or about.get("islink")
    if hidden is None or "/." not in name[hidden:]
  }
  if of_runs := stages.folders_in(root_of(path, files), files, run and open_source(run)[1]):
    print(f"prepare_data: left out, because a run wrote it: {printable(', '.join(of_runs))}.")
    files = {name: about for name, about in files.items() if not is_in(name, of_runs)}
  if not files:
    raise UserError(
      f"config.raw.source is '{source}', which does not exist or has no files; it must be "
      "a folder, a file or a glob pattern of images with caption files "
      "(x.jpg, x.txt), WebDataset tars, Parquet, JSONL or text, or a folder with pairs.jsonl."
    )
  return files


def is_in(file: str, folders: Collection[str]) -> bool:
  """Returns whether a file is in one of the folders or their subfolders."""
  while folders and (folder := posixpath.dirname(file)) not in ("", file):
    if folder in folders:
      return True
    file = folder
  return False


def root_of(path: str, files: Collection[str]) -> str:
  """Returns the folder of a source. For a pattern, this is the folder before the first wildcard."""
  if path in files:
    return posixpath.dirname(path)
  within = next(iter(files), "").startswith(f"{path.rstrip('/')}/")
  if not within and any(c in path for c in WILDCARDS):
    return posixpath.dirname(path[: min(path.index(c) for c in WILDCARDS if c in path)])
  return path

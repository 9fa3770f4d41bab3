"""Defines --out and --allow_outside for commands that read a user's files and write results."""

from __future__ import annotations

from absl import flags
from etils import epath, epy

with epy.lazy_imports():
  from cm3leon_jax.run import run

OUT = flags.DEFINE_string(
  "out",
  None,
  "Folder in which the results folder is created. Default: the workdir of a run, or the current "
  "folder for a bundle.",
  allow_override=True,  # Tests import several commands that define this flag.
)
ALLOW_OUTSIDE = flags.DEFINE_bool(
  "allow_outside",
  False,
  "Whether lines may name URLs, or images outside the folder of their file. Set it only for files "
  "that you trust, since a line can name any file on this machine.",
  allow_override=True,
)


def results_folder(trained: run.Run, out: str | None) -> epath.Path:
  """Returns `out`. Its default is the workdir of a run or, for a bundle, the current folder."""
  default = epath.Path() if trained.kind == "bundle" else trained.folder
  return default if out is None else epath.Path(out)

"""Defines --out for the commands that write results to the workdir of a run.

A bundle has no workdir.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from cm3leon_jax.config import UserError

if TYPE_CHECKING:
  from cm3leon_jax.trained.run import Run

OUT = flags.DEFINE_string(
  "out",
  None,
  "Folder in which the results folder is created. Default: the workdir of a run, or the current "
  "folder for a bundle.",
  allow_override=True,  # Other commands define this flag, and tests import them in one process.
)


def results_folder(trained: Run, out: str | None) -> epath.Path:
  """Returns `out`, or by default the workdir of a run or, for a bundle, the current folder.

  Raises:
    UserError: `out` is a file.
  """
  default = epath.Path() if trained.kind == "bundle" else trained.folder
  if out is not None and epath.Path(out).exists() and not epath.Path(out).is_dir():
    raise UserError(f"--out is {out}, which is a file: name a folder.")
  return default if out is None else epath.Path(out)

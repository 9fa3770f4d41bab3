"""Flag of the commands that write results into the folder of a run, of which a bundle has none."""

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
  "Folder in which the folder of the results is made; default: the workdir of a run, and for a "
  "bundle the current folder.",
  allow_override=True,  # Of other commands, which tests import in one process.
)


def results_folder(trained: Run, out: str | None) -> epath.Path:
  """Returns the folder of results: `out`, or a default, which is never the folder of a bundle.

  Raises:
    UserError: `out` is a file.
  """
  default = epath.Path() if trained.kind == "bundle" else trained.folder
  if out is not None and epath.Path(out).exists() and not epath.Path(out).is_dir():
    raise UserError(f"--out is {out}, which is a file: name a folder.")
  return default if out is None else epath.Path(out)

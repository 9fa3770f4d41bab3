"""Flag of the commands that write results into the folder of a run, of which a bundle has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags
from etils import epath

if TYPE_CHECKING:
  from cm3leon_jax.export.trained import Trained

OUT = flags.DEFINE_string(
  "out",
  None,
  "Folder in which the folder of the results is made; default: the workdir of a run, and for a "
  "bundle the current folder.",
  allow_override=True,  # Of other commands, which tests import in one process.
)


def results_folder(trained: Trained, out: str | None) -> epath.Path:
  """Returns the folder of results: `out`, or a default, which is never the folder of a bundle."""
  default = epath.Path() if trained.is_bundle else trained.folder
  return default if out is None else epath.Path(out)

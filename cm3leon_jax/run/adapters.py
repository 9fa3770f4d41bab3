"""Reads the adapters, or the groups of parameters, that a run trained on frozen parameters."""

import dataclasses

from etils import epath

from cm3leon_jax.config.groups import Tuned
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.files import foreign
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.run.source import settings_of_run
from cm3leon_jax.weights import reading


@dataclasses.dataclass(frozen=True)
class ParamsRef:
  """Reference to trained parameters on disk, as train/config.json records it under "init_from".

  Attributes:
    source: a path or name as the user gave it, see `Source`. For the base of adapters,
      the path is absolute.
    step: step of the checkpoint; None for an exported model.
    digest: SHA-256 of the exported file. For several files or a checkpoint, the SHA-256 of the
      digests of the files.
  """

  source: str
  step: int | None
  digest: str | None


@dataclasses.dataclass(frozen=True)
class Adapters:
  """Trained adapters or groups on disk, and a reference to the parameters that they tune.

  Attributes:
    folder: workdir of the run.
    base: the parameters that the adapters are added to.
  """

  folder: epath.Path
  config: Tuned
  base: ParamsRef

  @property
  def settings(self) -> Settings:
    """Settings of the run that trained the adapters."""
    return settings_of_run(self.folder)

  def load(self, step: int | None = None, average: bool = True) -> tuple[dict, int]:
    """Loads the adapters onto the current mesh, and returns them with their step.

    The arguments and the errors are those of `reading.load_params`.
    """
    model = self.settings.model
    return reading.load_params(self.folder / "train", model, step, average, self.config)


@foreign.reads("a run with adapters")
def of_run(workdir: epath.PathLike) -> Adapters | None:
  """Returns the adapters that a run trains; None if it trains all parameters."""
  folder = epath.Path(workdir)
  path = folder / "train" / "config.json"
  run = read_json(path, {"run": dict})["run"] if path.exists() else {}
  if "adapter" not in run and "only" not in run.get("train", {}):
    return None
  if (config := settings_of_run(folder).tuned) is None:
    raise ValueError("settings without what `run` says that the run trains")
  return Adapters(folder, config, ParamsRef(**run["init_from"]))

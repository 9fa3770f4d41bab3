"""Reads the adapters that a run trained, from its workdir or from an export in the format peft."""

import dataclasses
import os

from etils import epath

from cm3leon_jax.checkpoints import reading
from cm3leon_jax.config import UserError, build
from cm3leon_jax.files import foreign
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.models.config import AdapterConfig
from cm3leon_jax.settings import Settings, settings_from_stored, settings_of_run
from cm3leon_jax.trained import bundles, exported, kinds
from cm3leon_jax.weights import adapter_tensors, stored


@dataclasses.dataclass(frozen=True)
class Weights:
  """Reference to trained parameters on disk, as train/config.json records it under "init_from".

  Attributes:
    source: a path or name as the user gave it, see `bundles.folder_of`. For the base of adapters,
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
  """Trained adapters on disk, and a reference to the parameters that they were trained on.

  Attributes:
    folder: workdir of the run, or folder of an export in the format peft.
    base: the parameters that the adapters are added to.
  """

  folder: epath.Path
  config: AdapterConfig
  base: Weights

  @property
  def settings(self) -> Settings:
    """Settings of the run that trained the adapters."""
    if (self.folder / kinds.ABOUT).exists():
      return settings_from_stored(read_json(self.folder / kinds.ABOUT)["settings"])
    return settings_of_run(self.folder)

  @foreign.reads("an adapter")
  def load(self, step: int | None = None, average: bool = True) -> tuple[dict, int]:
    """Loads the adapters onto the current mesh, and returns them with their step.

    The arguments and the errors are those of `reading.load_params`. An export has only one step.
    """
    model = self.settings.model
    if (self.folder / kinds.ABOUT).exists():
      described = read_json(self.folder / kinds.ABOUT, {"step": int})
      return adapter_tensors.load(self.folder, model, self.config), described["step"]
    return reading.load_params(self.folder / "train", model, step, average, self.config)


def of_run(workdir: epath.PathLike) -> Adapters | None:
  """Returns the adapters that a run trains; None if it trains all parameters."""
  folder = epath.Path(workdir)
  path = folder / "train" / "config.json"
  run = read_json(path, {"run": dict})["run"] if path.exists() else {}
  if "adapter" not in run:
    return None
  config = build(AdapterConfig, run["adapter"], "adapter")
  return Adapters(folder, config, Weights(**run["init_from"]))


def choose(found: Adapters, average: bool | None) -> stored.StoredParams:
  """Opens the adapters in the newest checkpoint of a run. For `average`, see `stored.choose`."""
  return reading.open_params(found.folder / "train", average=average)


@foreign.reads("an adapter")
def open_at(source: str | os.PathLike[str]) -> Adapters:
  """Opens the adapters of a run or of an export in the format peft.

  Raises:
    UserError: `source` contains no adapters.
  """
  folder = bundles.folder_of(source)
  if kinds.kind_of(folder) == "peft":
    exported.check(folder)
    described = read_json(folder / kinds.ABOUT, {"settings": dict, "base": dict})
    settings = settings_from_stored(described["settings"])
    return Adapters(folder, settings.adapter, Weights(**described["base"]))
  if (found := of_run(folder)) is None:
    raise UserError(
      f"{source} contains no adapters: give the workdir of a run with config.adapter.rank > 0, or "
      "a folder of `cm3leon export --format=peft`."
    )
  return found

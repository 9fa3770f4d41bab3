"""Opens a trained model to read it: the workdir of a run, or a bundle."""

import dataclasses
import difflib
import functools
import os

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents import unseen_tokens
from cm3leon_jax.export import bundle, weights
from cm3leon_jax.files.digests import digest
from cm3leon_jax.runs import stages, table
from cm3leon_jax.settings import Settings, settings_of_run
from cm3leon_jax.training.checkpoints import reading
from cm3leon_jax.weights.stored import StoredParams, of_tree


@dataclasses.dataclass(frozen=True)
class Trained:
  """A run or a bundle.

  Attributes:
    folder: of the run or bundle.
    settings: of the run, or of a config with the same model.
    bundled: step of a bundle's parameters; None: it is a run.
  """

  folder: epath.Path
  settings: Settings
  bundled: int | None

  @property
  def is_bundle(self) -> bool:
    """Whether it is a bundle, which has no held-out documents and is never written to."""
    return self.bundled is not None

  @functools.cached_property
  def stages(self) -> epath.Path:
    """Folder with the tokenizers, CLIP and bank."""
    return bundle.stages_folder(self.folder)

  @property
  def bank(self) -> epath.Path | None:
    """Workdir that documents are retrieved from; None: a bundle without a bank."""
    return self.stages if not self.is_bundle or (self.stages / "documents").exists() else None

  def ids(self, names: list[str]) -> dict[str, str]:
    """Returns the ids of stages, see `stages.ids`; of a bundle those of the same files."""
    if not self.is_bundle:
      return stages.ids(self.settings, self.folder, names)
    return {name: self._id(name) for name in names}

  def _id(self, name: str) -> str:
    if name == "train":
      return str(digest(self.folder / bundle.FILE))
    patterns = table.STAGES[name].files
    return stages.id_of(stages.describe_files(self.stages / name, patterns))

  def unseen_tokens(self) -> frozenset[int] | None:
    """Returns the ids of text that training never met; None: it is not known."""
    return unseen_tokens.find(self.folder, self.settings.vocab, bundle.folder_of)

  def load_params(self, *step: int) -> tuple[dict, int]:
    """Loads parameters onto the current mesh; returns them and their step.

    Args:
      *step: of a run's checkpoint; default: the newest. A bundle has one step.
    """
    model = self.settings.model
    if self.bundled is not None:
      return weights.load_exported(self.folder, model), self.bundled
    return reading.load_params(self.folder / "train", model, *step)

  def open_params(self, average: bool | None) -> StoredParams:
    """Opens parameters for an export; those of a bundle are in memory, and need a mesh.

    Args:
      average: see `stored.choose`.

    Raises:
      UserError: `average` says which, and there is no choice.
    """
    if self.bundled is None:
      return reading.open_params(self.folder / "train", average=average)
    if average is not None:
      raise UserError(
        f"--merge_ema is given, and {self.folder} is a bundle, which has its parameters once: "
        "leave --merge_ema out."
      )
    params, step = self.load_params()
    return of_tree(params, step, bool(self.settings.optimizer.ema_decay))


def open_trained(source: str | os.PathLike[str], settings: Settings | None = None) -> Trained:
  """Opens a run or a bundle.

  Args:
    source: workdir of a run, or see `bundle.folder_of`.
    settings: of a config with the same model; None: those that the run or bundle stored.

  Raises:
    UserError: nothing was trained there, a file of a bundle is another one, or `settings` are those
      of another model than the bundle's.
  """
  folder = bundle.folder_of(source)
  if bundle.is_bundle(folder):
    stored, step = bundle.read(folder)
    return Trained(folder, _of_config(folder, stored, settings) if settings else stored, step)
  name = os.fspath(source)
  close = difflib.get_close_matches(name, bundle.INSTALLED, 1)
  if close and "/" not in name and not folder.exists():
    raise UserError(f"{name} is no folder and no bundle: did you mean {close[0]}?")
  if not folder.exists():
    raise UserError(
      f"there is no folder {name}: give the workdir of a run, the folder of a bundle, or the name "
      f"of an installed one: {', '.join(bundle.INSTALLED)}."
    )
  if not folder.is_dir():
    raise UserError(f"{name} is a file: give the folder of a run or of a bundle.")
  if (folder / "export.json").exists():
    raise UserError(
      f"{name} is an export, which `cm3leon serve` and CM3Leon.load take: give the workdir of its "
      "run, or a bundle."
    )
  return Trained(folder, settings or settings_of_run(folder), None)


def _of_config(folder: epath.Path, stored: Settings, settings: Settings) -> Settings:
  """Returns the settings of a config, with what the files of a bundle decide as it is stored."""
  old, new = (table.identity(one, "train") for one in (stored, settings))
  parts = ("vocab", "model")
  stages.check_same_config(
    folder,
    {part: old[part] for part in parts},
    {part: new[part] for part in parts},
    remedy="leave --config out, the bundle has its settings",
  )
  return dataclasses.replace(
    settings, retrieval=stored.retrieval, vqgan=stored.vqgan, clip=stored.clip
  )

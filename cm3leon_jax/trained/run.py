"""Opens a trained model for reading: the workdir of a run, a bundle or an export."""

from collections.abc import Collection
import dataclasses
import functools
import os
from typing import Literal

from etils import epath

from cm3leon_jax.checkpoints import reading
from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config import UserError
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.files import foreign
from cm3leon_jax.files.digests import digest
from cm3leon_jax.retrieval.bank import load_clip
from cm3leon_jax.runs import stages, table
from cm3leon_jax.settings import Settings, settings_of_run
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.trained import adapters, bundles, exported, initial, kinds
from cm3leon_jax.trained.rows import open_rows
from cm3leon_jax.weights.stored import StoredParams, of_tree


@dataclasses.dataclass(frozen=True)
class Run:
  """A run with its tokenizers, CLIP model, bank and parameters, each opened when it is first used.

    run = Run.open("workdir/scenes")
    with jax.set_mesh(create_mesh(run.settings.mesh)):
      params, step = run.params()

  `Run(folder, settings)` opens a workdir with the settings of a config, even before its stages are
  finished.

  Attributes:
    settings: the stored settings, or the settings of a config with the same model.
    kind: type of `folder`. A bundle has no held-out documents and is never written to. An export
      has no CLIP model and no bank.
    step: step of the parameters in a bundle or export. None for a workdir, which may have several
      checkpoints.
  """

  folder: epath.Path
  settings: Settings
  kind: Literal["workdir", "bundle", "export"] = "workdir"
  step: int | None = None

  @classmethod
  def open(
    cls, source: str | os.PathLike[str], settings: Settings | None = None, exports: bool = False
  ) -> "Run":
    """Opens a run, a bundle or an export.

    Args:
      source: workdir, folder of a bundle or export, or name of an installed bundle.
      settings: settings of a config with the same model; None: the stored settings.
      exports: whether `source` may be an export.

    Raises:
      UserError: `source` has no trained model, a file of the bundle has changed, `settings`
        describe a different model than the bundle, or `source` is an export and `exports` is False.
    """
    folder = bundles.folder_of(source)
    if exports and exported.is_export(source):
      stored, step = exported.read(folder)
      return cls(folder, settings or stored, "export", step)
    if bundles.is_bundle(folder):
      stored, step = bundles.read(folder)
      return cls(
        folder, _of_config(folder, stored, settings) if settings else stored, "bundle", step
      )
    _check_workdir(os.fspath(source), folder)
    return cls(folder, settings or settings_of_run(folder))

  @functools.cached_property
  def stages(self) -> epath.Path:
    """Folder with the tokenizers, the CLIP model and the bank."""
    return bundles.stages_folder(self.folder)

  @functools.cached_property
  @foreign.reads("a trained model")
  def text(self) -> TextTokenizer:
    """The text tokenizer."""
    is_export = self.kind == "export"
    folder = self.folder if is_export else self.stages / "text_tokenizer"
    return TextTokenizer(folder, self.settings.vocab)

  @functools.cached_property
  @foreign.reads("a trained model")
  def images(self) -> ImageTokenizer:
    """The image tokenizer."""
    is_export = self.kind == "export"
    return ImageTokenizer.load(self.folder / kinds.IMAGES if is_export else self.stages / "vqgan")

  @functools.cached_property
  @foreign.reads("a trained model")
  def clip(self) -> CLIP | HFCLIP:
    """CLIP model for scores and retrieval: published, if the config names one, else the run's."""
    return load_clip(self.settings.retrieval.clip, self.stages, self.settings.vocab)

  @property
  def bank(self) -> epath.Path | None:
    """Folder with the bank. None for an export, and for a bundle or run without documents."""
    has_bank = self.kind != "export" and (self.stages / "documents").exists()
    return self.stages if has_bank else None

  def rows(self, split: str, write_starts: bool = False) -> RowLoader:
    """Opens the rows of a split, "train" or "heldout", see `rows.open_rows`."""
    return open_rows(self.settings, self.folder, split, write_starts)

  def params(self, step: int | None = None, average: bool = True) -> tuple[dict, int]:
    """Loads parameters onto the current mesh, and returns them with their step.

    The adapters of a run are added to their base.

    Args:
      step: step of a checkpoint in a workdir; None: the newest. Ignored for bundles and exports.
      average: whether to load the moving average, if the workdir has one.

    Raises:
      UserError: see `initial.load_run`, `initial.load_base` and `exported.load_params`.
    """
    if self.step is not None:
      return exported.load_params(self.folder, self.settings.model), self.step
    return initial.load_run(self.folder, self.settings.model, step, average)


def ids(run: Run, names: Collection[str]) -> dict[str, str]:
  """Returns the ids of stages, see `stages.ids`. For a bundle, computes the ids from its files."""
  if run.kind == "workdir":
    return stages.ids(run.settings, run.folder, names)
  return {name: _id(run, name) for name in names}


def _id(run: Run, name: str) -> str:
  if name == "train":
    return str(digest(run.folder / bundles.FILE))
  patterns = table.STAGES[name].files
  return stages.id_of(stages.describe_files(run.stages / name, patterns))


def open_params(run: Run, average: bool | None) -> StoredParams:
  """Opens the parameters of a run for `cm3leon export`.

  The parameters of a bundle, and the sums of adapters and their base, are loaded into memory, which
  needs a current mesh. For `average`, see `stored.choose`.

  Raises:
    UserError: `average` is not None, but the run keeps no average or is a bundle.
  """
  if run.kind == "workdir":
    found = reading.open_params(run.folder / "train", average=average)
    if adapters.of_run(run.folder) is None:
      return found
    return of_tree(*run.params(found.step, average is not False), found.averaged)
  if average is not None:
    raise UserError(
      f"--merge_ema is given, but {run.folder} is a bundle, which has only one set of parameters: "
      "leave --merge_ema out."
    )
  params, step = run.params()
  return of_tree(params, step, bool(run.settings.optimizer.ema_decay))


def _check_workdir(name: str, folder: epath.Path) -> None:
  """Raises UserError if `folder`, which the user gave as `name`, cannot contain a run."""
  if not folder.is_dir():
    raise UserError(
      f"there is no folder {name}: give the workdir of a run, the folder of a bundle, or the name "
      f"of an installed one: {', '.join(bundles.INSTALLED)}."
    )
  if (folder / kinds.ABOUT).exists():
    raise UserError(
      f"{name} is an export, which only `cm3leon serve` and CM3Leon.load accept: give the workdir "
      "of its run, or a bundle."
    )


def _of_config(folder: epath.Path, stored: Settings, settings: Settings) -> Settings:
  """Returns `settings`, but with the sections retrieval, vqgan and clip of a bundle's settings."""
  old, new = (table.identity(one, "train") for one in (stored, settings))
  parts = ("vocab", "model")
  stages.check_same_config(
    folder,
    {part: old[part] for part in parts},
    {part: new[part] for part in parts},
    remedy="leave --config out, since the bundle contains its settings",
  )
  return dataclasses.replace(
    settings, retrieval=stored.retrieval, vqgan=stored.vqgan, clip=stored.clip
  )

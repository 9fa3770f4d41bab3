"""Opens what training leaves, to read it: the workdir of a run, a bundle or an export."""

from collections.abc import Collection
import dataclasses
import difflib
import functools
import os
from typing import Literal

from etils import epath

from cm3leon_jax.checkpoints import reading
from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents import unseen_tokens
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.files.digests import digest
from cm3leon_jax.retrieval.bank import load_clip
from cm3leon_jax.runs import stages, table
from cm3leon_jax.settings import Settings, settings_of_run
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.trained import bundles, exported, kinds
from cm3leon_jax.trained.rows import open_rows
from cm3leon_jax.weights.stored import StoredParams, of_tree


@dataclasses.dataclass(frozen=True)
class Run:
  """A run and what its stages have made, each opened when it is first read.

    run = Run.open("workdir/scenes")
    with jax.set_mesh(create_mesh(run.settings.mesh)):
      params, step = run.params()

  `Run(folder, settings)` is the run of a config, whose stages need not have ended.

  Attributes:
    folder: workdir of the run, or folder of the bundle or export.
    settings: that it stored, or of a config with the same model.
    kind: what `folder` is. A bundle has no held-out documents and is never written to; an export
      has neither CLIP nor bank.
    step: of the parameters of a bundle or export; None: each checkpoint of a workdir has its own.
  """

  folder: epath.Path
  settings: Settings
  kind: Literal["workdir", "bundle", "export"] = "workdir"
  step: int | None = None

  @classmethod
  def open(
    cls,
    source: str | os.PathLike[str],
    settings: Settings | None = None,
    exports: bool = False,
  ) -> "Run":
    """Opens a run, a bundle or an export.

    Args:
      source: workdir, folder of an export, or see `bundles.folder_of`.
      settings: of a config with the same model; None: those that are stored.
      exports: whether an export will do.

    Raises:
      UserError: nothing was trained there, a file of a bundle is another one, `settings` are those
        of another model than the bundle's, or it is an export that will not do.
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
    """Folder with the tokenizers, CLIP and bank."""
    return bundles.stages_folder(self.folder)

  @functools.cached_property
  def text(self) -> TextTokenizer:
    """The text tokenizer."""
    is_export = self.kind == "export"
    folder = self.folder if is_export else self.stages / "text_tokenizer"
    return TextTokenizer(folder, self.settings.vocab)

  @functools.cached_property
  def images(self) -> ImageTokenizer:
    """The image tokenizer."""
    is_export = self.kind == "export"
    return ImageTokenizer.load(self.folder / kinds.IMAGES if is_export else self.stages / "vqgan")

  @functools.cached_property
  def clip(self) -> CLIP | HFCLIP:
    """The CLIP that scores samples and retrieves: the config's, or the run's own."""
    return load_clip(self.settings.retrieval.clip, self.stages, self.settings.vocab)

  @property
  def bank(self) -> epath.Path | None:
    """Workdir that documents are retrieved from; None: a bundle without a bank, or an export."""
    has_bank = self.kind == "workdir" or (self.stages / "documents").exists()
    return self.stages if has_bank else None

  def rows(self, split: str, write_starts: bool = False) -> RowLoader:
    """Opens the rows of a split, "train" or "heldout"; see `rows.open_rows`."""
    return open_rows(self.settings, self.folder, split, write_starts)

  def params(self, step: int | None = None, average: bool = True) -> tuple[dict, int]:
    """Loads parameters onto the current mesh; returns them and their step.

    Args:
      step: of a checkpoint of a workdir; default: the newest.
      average: False loads the last parameters of a workdir that has an average.

    Raises:
      UserError: see `reading.load_params` and `exported.load_params`.
    """
    if self.step is not None:
      return exported.load_params(self.folder, self.settings.model), self.step
    return reading.load_params(self.folder / "train", self.settings.model, step, average)


def ids(run: Run, names: Collection[str]) -> dict[str, str]:
  """Returns the ids of stages, see `stages.ids`; of a bundle those of the same files."""
  if run.kind == "workdir":
    return stages.ids(run.settings, run.folder, names)
  return {name: _id(run, name) for name in names}


def _id(run: Run, name: str) -> str:
  if name == "train":
    return str(digest(run.folder / bundles.FILE))
  patterns = table.STAGES[name].files
  return stages.id_of(stages.describe_files(run.stages / name, patterns))


def open_params(run: Run, average: bool | None) -> StoredParams:
  """Opens parameters for an export; those of a bundle are in memory, and need a mesh.

  Args:
    run: a workdir or a bundle.
    average: see `stored.choose`.

  Raises:
    UserError: `average` says which, and there is no choice.
  """
  if run.kind == "workdir":
    return reading.open_params(run.folder / "train", average=average)
  if average is not None:
    raise UserError(
      f"--merge_ema is given, and {run.folder} is a bundle, which has its parameters once: leave "
      "--merge_ema out."
    )
  params, step = run.params()
  return of_tree(params, step, bool(run.settings.optimizer.ema_decay))


def unseen_in(run: Run) -> frozenset[int] | None:
  """Returns the ids of text that training never met; None: it is not known."""
  return unseen_tokens.find(run.folder, run.settings.vocab, bundles.folder_of)


def _check_workdir(name: str, folder: epath.Path) -> None:
  """Raises UserError if no run can be in a folder, which `name` names."""
  close = difflib.get_close_matches(name, bundles.INSTALLED, 1)
  if close and "/" not in name and not folder.exists():
    raise UserError(f"{name} is no folder and no bundle: did you mean {close[0]}?")
  if not folder.exists():
    raise UserError(
      f"there is no folder {name}: give the workdir of a run, the folder of a bundle, or the name "
      f"of an installed one: {', '.join(bundles.INSTALLED)}."
    )
  if not folder.is_dir():
    raise UserError(f"{name} is a file: give the folder of a run or of a bundle.")
  if (folder / kinds.ABOUT).exists():
    raise UserError(
      f"{name} is an export, which `cm3leon serve` and CM3Leon.load take: give the workdir of its "
      "run, or a bundle."
    )


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

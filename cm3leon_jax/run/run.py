"""Opens a trained model for reading: the workdir of a run, a bundle or an export."""

from collections.abc import Collection
import dataclasses
import functools
import os
from typing import Literal

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files import foreign
from cm3leon_jax.files.digests import digest
from cm3leon_jax.models.groups import merge, split
from cm3leon_jax.retrieval import removed
from cm3leon_jax.retrieval.bank import load_clip
from cm3leon_jax.run import adapters, bundles, exported, initial
from cm3leon_jax.run.adapters import Adapters, ParamsRef
from cm3leon_jax.run.rows import open_rows
from cm3leon_jax.run.source import IMAGES, INIT, Source, folder_of, settings_of_run
from cm3leon_jax.stages import stages, table
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.weights import placed, reading
from cm3leon_jax.weights.stored import StoredParams, of_tree
from cm3leon_jax.weights.stored_tensors import StoredTensors

# Functions of the module, so that a process compiles them once and not for each run that it reads.
_add = jax.jit(merge, static_argnames=("tuned", "model"), donate_argnums=0)
_split = jax.jit(split, static_argnames=("groups", "model"))
_are_finite = jax.jit(functools.partial(jax.tree.map, lambda x: jnp.isfinite(x).all()))


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
    kind: type of `folder`. A workdir may have imported parameters alone, of step 0. A bundle has no
      held-out documents and is never written to. An export has no CLIP model and no bank.
    step: step of the parameters in a bundle or export. None for a workdir, which may have several
      checkpoints.
    adapter: adapters of another run, which are added to the parameters. A run that trained
      adapters itself needs none.
  """

  folder: epath.Path
  settings: Settings
  kind: Literal["workdir", "bundle", "export"] = "workdir"
  step: int | None = None
  adapter: Adapters | None = None

  @classmethod
  def open(
    cls,
    source: str | os.PathLike[str],
    settings: Settings | None = None,
    exports: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
  ) -> "Run":
    """Opens a run, a bundle or an export.

    Args:
      source: workdir, folder of a bundle or export, or name of an installed bundle.
      settings: settings of a config with the same model; None: the stored settings.
      exports: whether `source` may be an export.
      adapter: workdir of a run that trained adapters of these parameters, which are added to them.
      dtype: compute dtype instead of that in the settings.

    Raises:
      UserError: `source` has no trained model, a file of the bundle has changed, `settings`
        describe a different model than the bundle, `source` is an export and `exports` is False, or
        the adapters were trained on other parameters.
    """
    given = Source.of(source)
    folder = given.folder
    if exports and given.kind == "export":
      stored, step = exported.read(folder)
      run = cls(folder, settings or stored, "export", step)
    elif given.kind == "bundle":
      stored, step = bundles.read(folder)
      settings = _of_config(folder, stored, settings) if settings else stored
      run = cls(folder, settings, "bundle", step)
    else:
      given.check_workdir()
      run = cls(folder, settings or settings_of_run(folder))
    if dtype is not None:
      try:
        model = run.settings.model.computing_in(np.dtype(dtype).name)
      except (TypeError, ValueError) as error:
        raise UserError(f"dtype is {short(dtype)}; it must be float32 or bfloat16.") from error
      run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, model=model))
    if adapter is not None:
      run = dataclasses.replace(run, adapter=initial.over(os.fspath(source), adapter))
    return run

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
    return ImageTokenizer.load(self.folder / IMAGES if is_export else self.stages / "vqgan")

  @functools.cached_property
  @foreign.reads("a trained model")
  def clip(self) -> CLIP | HFCLIP:
    """CLIP model for scores and retrieval: published, if the config names one, else the run's."""
    return load_clip(self.settings.retrieval.clip, self.stages, self.settings.vocab)

  @property
  def has_clip(self) -> bool:
    """Whether there is a CLIP model. Exports have none, and imports none before its stage."""
    is_import = Source.of(self.folder).kind == "import" and not self.settings.retrieval.clip
    return self.kind != "export" and not (
      is_import and not (self.stages / "clip" / stages.DONE).exists()
    )

  @property
  def bank(self) -> epath.Path | None:
    """Folder with the bank. None for an export, and for a bundle or run without documents."""
    has_bank = self.kind != "export" and (self.stages / "documents").exists()
    return self.stages if has_bank else None

  def rows(self, split: str, write_starts: bool = False) -> RowLoader:
    """Opens the rows of a split, "train" or "heldout", see `rows.open_rows`."""
    return open_rows(self.settings, self.folder, split, write_starts)

  def params(
    self, step: int | None = None, average: bool = True, dtype: str = "float32"
  ) -> tuple[dict, int]:
    """Loads parameters onto the current mesh, and returns them with their step.

    Args:
      step: step of a checkpoint in a workdir, also of adapters; None: see `reading.load_params`.
        Ignored for bundles and exports.
      average: whether to load the moving average, if the workdir has one.
      dtype: dtype of the result if it is that of the files of an export, bundle or base of
        adapters; otherwise fp32. To decode, the compute dtype is enough.

    Raises:
      UserError: a parameter is not finite, the base of adapters has changed, or the files are
        damaged.
    """
    result = self.adapter or (adapters.of_run(self.folder) if self.kind == "workdir" else None)
    if result is not None:
      trained, chosen = result.load(step, average)
      base, model = load_frozen(result, dtype), self.settings.model
      params = _add(base, trained, tuned=result.config, model=model)
    elif self.step is not None:
      return exported.load_params(self.folder, self.settings.model, dtype), self.step
    elif Source.of(self.folder).kind == "import":
      return exported.load_params(self.folder / INIT, self.settings.model, dtype), 0
    else:
      folder, model = self.folder / "train", self.settings.model
      params, chosen = reading.load_params(folder, model, step, average)
    _check_finite(params, f"{self.folder}: step {chosen}")
    return params, chosen


def load_initial(start: ParamsRef, settings: Settings) -> dict:
  """Loads the parameters that a run starts from onto the current mesh.

  `start` is a result of `initial.find`. If the run it names keeps a moving average, the average is
  loaded.

  Raises:
    UserError: the parameters are absent or damaged, or have changed since the run began.
  """
  if initial.find(settings, start.source, start.step) != start:
    raise UserError(
      f"the parameters in {start.source} have changed since this run began, and the run has no "
      "checkpoint yet: delete train/ in the --workdir of this run to begin again."
    )
  return _load(start, settings)


def load_frozen(found: Adapters, dtype: str = "float32") -> dict:
  """Loads the parameters that adapters were trained on, onto the current mesh.

  For `dtype`, see `exported.load_params`.

  Raises:
    UserError: see `initial.check_frozen`, or the parameters are damaged.
  """
  initial.check_frozen(found, found.settings)
  return _load(found.base, found.settings, dtype)


def load_trained(found: Adapters) -> dict:
  """Loads the parameters with which the training of groups begins; see `load_frozen`."""
  model = found.settings.model
  return _split(load_frozen(found, model.dtype), groups=found.config, model=model)


def _load(weights: ParamsRef, settings: Settings, dtype: str = "float32") -> dict:
  folder = folder_of(weights.source)
  if weights.step is None:
    return exported.load_params(folder, settings.model, dtype)
  return Run(folder, settings).params(weights.step)[0]


def _check_finite(params: dict, where: str) -> None:
  are_finite = jax.device_get(_are_finite(params))
  for name, is_finite in traverse_util.flatten_dict(are_finite, sep=".").items():
    if not is_finite:
      raise UserError(
        f"{where}: parameter '{name}' has NaNs or infinities: return to an earlier checkpoint with "
        "`cm3leon checkpoints rollback`."
      )


def ids(run: Run, names: Collection[str]) -> dict[str, str]:
  """Returns the ids of stages, see `stages.ids`. For a bundle, computes the ids from its files.

  With the stage "neighbors", also returns a digest of the documents removed from the bank.
  """
  gone = removed.identity(run.stages / "neighbors") if "neighbors" in names else {}
  if run.kind == "workdir":
    return stages.ids(run.settings, run.folder, names) | gone
  return {name: _id(run, name) for name in names} | gone


def _id(run: Run, name: str) -> str:
  if name == "train":
    return str(digest(run.folder / bundles.FILE))
  patterns = table.STAGES[name].files
  return stages.id_of(stages.describe_files(run.stages / name, patterns))


def open_params(run: Run, average: bool | None, step: int | None = None) -> StoredParams:
  """Opens the parameters of a run for `cm3leon export`. It needs a current mesh.

  The parameters of a bundle are loaded into memory. For `average`, see `stored.choose`; for `step`,
  see `reading.load_params`.

  Raises:
    UserError: `average` is not None, but the run keeps no average or is a bundle.
  """
  if Source.of(run.folder).kind == "import":
    return placed.stored(StoredTensors(run.folder / INIT), run.settings.model)
  if run.kind == "workdir":
    result = reading.open_params(run.folder / "train", step, average)
    if (found := adapters.of_run(run.folder)) is None:
      return result
    base = _open_base(found)
    params, _ = found.load(result.step, average is not False)
    merged = adapters.merged(base, params, found)
    return dataclasses.replace(merged, step=result.step, averaged=result.averaged)
  if average is not None:
    raise UserError(
      f"--merge_ema is given, but {run.folder} is a bundle, which has only one set of parameters: "
      "leave --merge_ema out."
    )
  params, step = run.params()
  return of_tree(params, step, bool(run.settings.optimizer.ema_decay))


def _open_base(found: Adapters) -> StoredParams:
  """Opens the parameters that adapters were trained on; see `load_frozen`."""
  initial.check_frozen(found, found.settings)
  folder = folder_of(found.base.source)
  if found.base.step is not None:
    return open_params(Run(folder, found.settings), None, found.base.step)
  if exported.is_orbax(folder):
    return of_tree(load_frozen(found))
  exported.check(folder)
  return placed.stored(StoredTensors(folder), found.settings.model)


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

"""Loads a run, a bundle or an export onto the devices of this machine, for `CM3Leon`."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any
import warnings

import jax
import numpy as np

from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.config import UserError, short
from cm3leon_jax.decoding.generator import GeneratorConfig
from cm3leon_jax.export import bundle
from cm3leon_jax.files import buckets, progress
from cm3leon_jax.generation import calls
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.keywords import LoadOptions
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.models import transformer
from cm3leon_jax.reports import summary
from cm3leon_jax.settings import Settings
from cm3leon_jax.trained import bundles, exported, initial
from cm3leon_jax.trained.run import Run, unseen_in

DTYPES = ("float32", "bfloat16")  # float64, which only tests use, requires JAX_ENABLE_X64.
_LACKS = "neither CLIP nor bank: samples have no CLIP score, and nothing can be ranked or retrieved"
ARGUMENTS = (
  "adapter",
  "dtype",
  "devices",
  "mesh",
  "clip",
  "show_progress",
)  # Keywords of `CM3Leon.load`.


def load(
  source: str | os.PathLike[str],
  adapter: str | os.PathLike[str] | None,
  clip: str | os.PathLike[str] | None,
  dtype: Any,
  devices: Sequence[jax.Device] | None,
  mesh: jax.sharding.Mesh | None,
  options: Mapping[str, Any],
) -> tuple[str, Pipeline, jax.sharding.Mesh, int]:
  """Loads parameters, tokenizers, CLIP and bank of a run, bundle or export.

  Args:
    source: workdir of a run, folder of an export or bundle, or name of an installed bundle.
    adapter: workdir of a run that trained adapters of these parameters, which are added to them.
    clip: folder of the Hugging Face CLIP model. Default: the path in the run's config.
    dtype: compute dtype. Default: the dtype in the run's config.
    devices: devices over which parameters are sharded. Default: all.
    mesh: mesh over which parameters are sharded, as an alternative to `devices`.
    options: fields of `GeneratorConfig`.

  Returns:
    (folder, pipeline, mesh, training step of the parameters).

  Raises:
    UserError: `source` contains nothing trained, a file is missing or damaged, an option is
      invalid, or the adapters were trained on other parameters.
  """
  source = calls.folder("workdir", source)
  buckets.check_path(source, "workdir")
  if jax.process_count() > 1:
    raise UserError(
      f"this job has {jax.process_count()} processes: load a run in a job with one process."
    )
  mesh = _mesh(devices, mesh)
  run = Run.open(source, exports=True)
  run = dataclasses.replace(run, settings=_checked(run.settings, dtype, options))
  adapters = None
  if adapter is not None:
    adapters = initial.over(source, calls.folder("adapter", adapter))
  if run.kind == "export":
    lacks = "no bank, so nothing can be retrieved" if clip else _LACKS
    warnings.warn(f"{run.folder} is an export, which has {lacks}.", stacklevel=3)
  elif clip is not None and not run.settings.retrieval.clip:
    raise UserError(f"clip is given, but {run.folder} contains a CLIP: omit clip.")
  with jax.set_mesh(mesh):
    if adapters is None:
      params, step = run.params()
    else:
      params, step = initial.merged(adapters, initial.load_base(adapters))
    own = None if run.kind == "export" else run.clip
    encoder = own if clip is None else HFCLIP.load(os.path.expanduser(clip))
    pipeline = Pipeline.load(run, params, encoder, **options)
    pipeline.unseen = unseen_in(run)
    return os.fspath(run.folder), pipeline, jax.sharding.get_mesh(), step


def shows_progress(given: bool | None) -> bool:
  """Returns whether to show progress bars. None: only in a terminal or notebook."""
  return progress.is_interactive() if given is None else calls.truth("show_progress", given)


def _mesh(
  devices: Sequence[jax.Device] | None, mesh: jax.sharding.Mesh | None
) -> jax.sharding.Mesh:
  """Returns the mesh for the model. Raises UserError for two arguments."""
  if devices is None:
    return create_mesh(MeshConfig()) if mesh is None else mesh
  if mesh is not None:
    raise UserError("both mesh and devices are given: give only one of them.")
  return create_mesh(MeshConfig(), list(devices))


def _checked(settings: Settings, dtype: Any, options: Mapping[str, Any]) -> Settings:
  """Returns the settings with a compute dtype. Raises UserError for an invalid dtype or option."""
  known = LoadOptions.__annotations__
  for name, value in options.items():
    if name not in known:
      raise UserError(
        f"load has no option '{name}': its options are {', '.join([*ARGUMENTS, *known])}."
      )
    if known[name] is int:
      calls.whole(name, value)
  try:
    GeneratorConfig.of(settings, **options)
  except ValueError as error:
    raise UserError(f"load has an invalid option: {error}") from error
  if dtype is None:
    return settings
  name = np.dtype(dtype).name
  if name not in DTYPES:
    raise UserError(f"dtype is {short(dtype)}; it must be one of {', '.join(DTYPES)}.")
  return dataclasses.replace(settings, model=settings.model.computing_in(name))


def describe(workdir: str, pipeline: Pipeline, mesh: jax.sharding.Mesh, step: int) -> str:
  """Describes a loaded model in one line, for `repr`."""
  config, side = pipeline.settings.model, pipeline.layout.resolution
  with jax.set_mesh(mesh):
    types = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  kind = mesh.devices.flat[0].device_kind
  installed = {os.fspath(bundles.folder_of(name)): name for name in bundles.INSTALLED}
  return (
    f"{installed.get(workdir, workdir)!r}, step {step}, {transformer.count_params(types):,} "
    f"parameters, images of {side} x {side}, {config.dtype} on {mesh.size} {kind}"
  )


def write_bundle(
  trained: Run,
  folder: str | os.PathLike[str],
  base: str = "",
  step: int | None = None,
  **options: int,
) -> tuple[int, dict]:
  """Writes the bundle of a run, with the cost of its training. Needs a current mesh.

  If `base` is another bundle, the new bundle refers to it for tokenizers and CLIP (see
  `bundle.write`, which also gets `options`). `step` is the step of the checkpoint, by default the
  newest. Returns (step, result of `bundle.write`).
  """
  workdir = trained.folder
  cost = summary.cost(summary.collect(workdir))
  if cost is not None:
    cost["train_seconds"] += initial.seconds_before(workdir)
  params, found = trained.params(step)
  return found, bundle.write(folder, trained, params, found, cost, base, **options)


def check_saved(workdir: str, adapter: str | None) -> None:
  """Raises UserError if a model was loaded with adapters, which `save` would leave out."""
  if adapter is not None:
    raise UserError(
      f"the model is {workdir} with the adapters of {adapter}: write their bundle by `cm3leon "
      f"export --workdir={adapter} --bundle=FOLDER`."
    )


def save(workdir: str, mesh: jax.sharding.Mesh, step: int, folder: str | os.PathLike[str]) -> None:
  """Writes the bundle of a run, or copies the bundle that was loaded."""
  folder = calls.folder("folder", folder)
  if exported.is_export(workdir):
    raise UserError(
      f"{workdir} is an export, which has no CLIP, but a bundle needs one: load the workdir of the "
      "run to save a bundle."
    )
  trained = Run.open(workdir)
  if trained.kind == "bundle":
    bundle.copy(trained.folder, folder)
    return
  with jax.set_mesh(mesh):
    write_bundle(trained, folder, "", step)

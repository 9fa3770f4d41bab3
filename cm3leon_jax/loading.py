"""Loads a run, a bundle or an export onto the devices of this machine, to generate with it."""

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

DTYPES = ("float32", "bfloat16")  # Of the computation; float64 needs JAX's x64, for tests.
_LACKS = "neither CLIP nor bank: samples have no CLIP score, and nothing can be ranked or retrieved"
ARGUMENTS = ("dtype", "devices", "mesh", "clip", "show_progress")  # Of `CM3Leon.load`, by name.


def load(
  source: str | os.PathLike[str],
  clip: str | os.PathLike[str] | None,
  dtype: Any,
  devices: Sequence[jax.Device] | None,
  mesh: jax.sharding.Mesh | None,
  options: Mapping[str, Any],
) -> tuple[str, Pipeline, jax.sharding.Mesh, int]:
  """Loads parameters, tokenizers, CLIP and bank; see `CM3Leon.load`.

  Args:
    source: workdir of a run, folder of an export, or see `bundle.folder_of`.
    clip: folder of the Hugging Face CLIP; None: that of the run's config.
    dtype: of the computation; None: that of the run's config.
    devices: that a mesh is made of; None: all.
    mesh: of the parameters; None: split over `devices`.
    options: of `GeneratorConfig`.

  Returns:
    The folder, the pipeline, the mesh and the step of the parameters.

  Raises:
    UserError: nothing was trained there, a file is absent or damaged, or an option is wrong.
  """
  source = calls.folder("workdir", source)
  buckets.check_path(source, "workdir")
  if jax.process_count() > 1:
    raise UserError(f"{jax.process_count()} processes run here: load a run in a single one.")
  mesh = _mesh(devices, mesh)
  run = Run.open(source, exports=True)
  run = dataclasses.replace(run, settings=_checked(run.settings, dtype, options))
  if run.kind == "export":
    lacks = "no bank, so nothing can be retrieved" if clip else _LACKS
    warnings.warn(f"{run.folder} is an export, which has {lacks}.", stacklevel=3)
  elif clip is not None and not run.settings.retrieval.clip:
    raise UserError(f"clip is given, and {run.folder} has a CLIP of its own: leave it out.")
  with jax.set_mesh(mesh):
    params, step = run.params()
    own = None if run.kind == "export" else run.clip
    encoder = own if clip is None else HFCLIP.load(os.fspath(clip))
    pipeline = Pipeline.load(run, params, encoder, **options)
    pipeline.unseen = unseen_in(run)
    return os.fspath(run.folder), pipeline, jax.sharding.get_mesh(), step


def shows_progress(given: bool | None) -> bool:
  """Returns whether a model shows bars; None: in a terminal or notebook."""
  return progress.is_interactive() if given is None else calls.truth("show_progress", given)


def _mesh(
  devices: Sequence[jax.Device] | None, mesh: jax.sharding.Mesh | None
) -> jax.sharding.Mesh:
  """Returns the mesh to load onto. Raises UserError if `devices` are wrong, or both are given."""
  if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
    raise UserError(f"mesh is {short(mesh)}; it must be a mesh of `mesh.create_mesh`.")
  if devices is None:
    return create_mesh(MeshConfig()) if mesh is None else mesh
  if mesh is not None:
    raise UserError("mesh and devices are given: leave one out.")
  listed = isinstance(devices, Sequence | np.ndarray) and not isinstance(devices, str)
  if not listed or not all(isinstance(one, jax.Device) for one in devices):
    raise UserError(
      f"devices is {short(devices)}; it must be a list of devices, e.g. jax.devices()[:1]."
    )
  if not devices:
    raise UserError("devices is empty: name at least one, or leave it out to use all.")
  return create_mesh(MeshConfig(), list(devices))


def _checked(settings: Settings, dtype: Any, options: Mapping[str, Any]) -> Settings:
  """Returns the settings with another dtype, and checks the options.

  Raises:
    UserError: the dtype or an option is wrong.
  """
  known = LoadOptions.__annotations__
  for name, value in options.items():
    if name not in known:
      hint = calls.foreign(name, ()) or f"its options are {', '.join([*ARGUMENTS, *known])}."
      raise UserError(f"load has no option '{name}': {hint}")
    if known[name] is int:
      calls.whole(name, value)
  try:
    GeneratorConfig.of(settings, **options)
  except (TypeError, ValueError) as error:
    raise UserError(f"load has a wrong option: {error}") from error
  if dtype is None:
    return settings
  try:
    name = np.dtype(dtype).name
  except TypeError:
    name = str(dtype).removeprefix("torch.")
  if name not in DTYPES:
    raise UserError(f"dtype is {short(dtype)}; it must be one of {', '.join(DTYPES)}.")
  return dataclasses.replace(settings, model=settings.model.computing_in(name))


def describe(workdir: str, pipeline: Pipeline, mesh: jax.sharding.Mesh, step: int) -> str:
  """Describes a model in one line, for `repr`."""
  config, side = pipeline.settings.model, pipeline.layout.resolution
  with jax.set_mesh(mesh):
    types = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  kind = mesh.devices.flat[0].device_kind
  installed = {os.fspath(bundles.folder_of(name)): name for name in bundles.INSTALLED}
  return (
    f"{installed.get(workdir, workdir)!r}, step {step}, {transformer.count_params(types):,} "
    f"parameters, images of {side} x {side}, {config.dtype} on {mesh.size} {kind}"
  )


def params_of(workdir: str, step: int) -> dict:
  """Loads the parameters of a model again, as they were trained, onto the current mesh."""
  return Run.open(workdir, exports=True).params(step)[0]


def write_bundle(
  trained: Run, folder: str | os.PathLike[str], base: str = "", step: int | None = None
) -> tuple[int, dict]:
  """Writes the bundle of a run, with what it cost. Needs a mesh.

  Args:
    trained: the run.
    folder: of the bundle.
    base: see `bundle.write`.
    step: of the run's checkpoint; default: the newest.

  Returns:
    The step, and the result of `bundle.write`.
  """
  workdir = trained.folder
  cost = summary.cost(summary.collect(workdir))
  if cost is not None:
    cost["train_seconds"] += initial.seconds_before(workdir)
  params, found = trained.params(step)
  return found, bundle.write(folder, trained, params, found, cost, base)


def save(workdir: str, mesh: jax.sharding.Mesh, step: int, folder: str | os.PathLike[str]) -> None:
  """Writes the bundle of a run, or copies one; see `CM3Leon.save`."""
  folder = calls.folder("folder", folder)
  if exported.is_export(workdir):
    raise UserError(
      f"{workdir} is an export, which has no CLIP, and a bundle needs one: load the workdir of its "
      "run to save it."
    )
  trained = Run.open(workdir)
  if trained.kind == "bundle":
    bundle.copy(trained.folder, folder)
    return
  with jax.set_mesh(mesh):
    write_bundle(trained, folder, "", step)

"""Loads a run, a bundle or an export onto the devices of this machine, for `CM3Leon`."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import jax
import numpy as np

from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.generator import GeneratorConfig
from cm3leon_jax.export import bundle
from cm3leon_jax.files import buckets
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.reports import summary
from cm3leon_jax.trained import initial
from cm3leon_jax.trained.run import Run


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
  source = os.path.expanduser(source)
  buckets.check_path(source)
  if mesh is None:
    mesh = create_mesh(MeshConfig(), None if devices is None else list(devices))
  elif devices is not None:
    raise UserError("both mesh and devices are given: give only one of them.")
  run = Run.open(source, exports=True)
  if dtype is not None:
    model = run.settings.model.computing_in(np.dtype(dtype).name)
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, model=model))
  GeneratorConfig.of(run.settings, **options)  # Raises errors before parameters are loaded.
  adapters = None
  if adapter is not None:
    adapters = initial.over(source, os.path.expanduser(adapter))
  if clip is not None and run.kind != "export" and not run.settings.retrieval.clip:
    raise UserError(f"clip is given, but {run.folder} contains a CLIP: omit clip.")
  with jax.set_mesh(mesh):
    if adapters is None:
      params, step = run.params()
    else:
      params, step = initial.merged(adapters, initial.load_base(adapters))
    own = None if run.kind == "export" else run.clip
    encoder = own if clip is None else HFCLIP.load(os.path.expanduser(clip))
    pipeline = Pipeline.load(run, params, encoder, **options)
    return os.fspath(run.folder), pipeline, jax.sharding.get_mesh(), step


def write_bundle(
  trained: Run,
  folder: str | os.PathLike[str],
  base: str = "",
  **options: int,
) -> tuple[int, dict]:
  """Writes the bundle of a run, with the cost of its training. Needs a current mesh.

  If `base` is another bundle, the new bundle refers to it for tokenizers and CLIP (see
  `bundle.write`, which also gets `options`). Returns (step, result of `bundle.write`).
  """
  workdir = trained.folder
  cost = summary.cost(summary.collect(workdir))
  if cost is not None:
    cost["train_seconds"] += initial.seconds_before(workdir)
  params, found = trained.params()
  return found, bundle.write(folder, trained, params, found, cost, base, **options)

"""Loads a run or a bundle onto the devices of this machine, to generate with it."""

from collections.abc import Mapping
import os
from typing import Any

import jax

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.generator import GeneratorConfig
from cm3leon_jax.export.trained import open_trained
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.retrieval.bank import load_clip


def load(
  source: str | os.PathLike[str],
  mesh: jax.sharding.Mesh | None,
  clip: str | os.PathLike[str] | None,
  options: Mapping[str, Any],
) -> tuple[str, Pipeline, jax.sharding.Mesh, int]:
  """Loads parameters, tokenizers, CLIP and bank; see `CM3Leon.load`.

  Args:
    source: workdir of a run, or see `bundle.folder_of`.
    mesh: of the parameters; None: split over all devices.
    clip: folder of the Hugging Face CLIP; None: that of the run's config.
    options: of `GeneratorConfig`.

  Returns:
    The folder, the pipeline, the mesh and the step of the parameters.

  Raises:
    UserError: nothing was trained there, a file is absent or damaged, or an option is wrong.
  """
  trained = open_trained(source)
  settings, folder = trained.settings, trained.stages
  if clip is not None and not settings.retrieval.clip:
    raise UserError(f"clip is given, and {trained.folder} has a CLIP of its own: leave it out.")
  if jax.process_count() > 1:
    raise UserError(f"{jax.process_count()} processes run here: load a run in a single one.")
  try:
    GeneratorConfig.of(settings, **options)
  except (TypeError, ValueError) as error:
    raise UserError(f"load has a wrong option: {error}") from error
  with jax.set_mesh(create_mesh(MeshConfig()) if mesh is None else mesh):
    params, step = trained.load_params()
    encoder = load_clip(os.fspath(clip or settings.retrieval.clip), folder, settings.vocab)
    pipeline = Pipeline.load(settings, folder, params, encoder, **options)
    return os.fspath(trained.folder), pipeline, jax.sharding.get_mesh(), step

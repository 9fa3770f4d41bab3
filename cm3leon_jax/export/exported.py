"""Opens an export in the format hf or orbax, to generate with it: it has neither CLIP nor bank."""

import os

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.export import bundle, choices, image_tokenizer, orbax_checkpoint, weights
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.settings import Settings, settings_from_stored
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.weights import placed


def is_export(source: str | os.PathLike[str]) -> bool:
  """Returns whether `cm3leon export` wrote the folder."""
  folder = bundle.folder_of(source)
  return (folder / choices.ABOUT).exists() and not bundle.is_bundle(folder)


def read(folder: epath.Path) -> tuple[Settings, int]:
  """Reads the settings and the step of an export.

  Raises:
    UserError: its numbers are not those that were trained, an earlier version wrote it, or its
      image tokenizer is a published one.
  """
  if (kind := choices.kind_of(folder)) not in ("", "orbax"):
    raise UserError(
      f"{folder} is an export {choices.KINDS[kind]}, for other programs: load the workdir of its "
      "run, or an export in the format hf or orbax."
    )
  stored = read_json(folder / choices.ABOUT, {"step": int})
  if "settings" not in stored:
    raise UserError(
      f"{folder} was written by an older version and has no settings: run "
      "`cm3leon export` again, or load the workdir of its run."
    )
  if "vqgan" not in read_json(folder / image_tokenizer.FOLDER / "config.json"):
    raise UserError(
      f"{folder} has a published image tokenizer under the names of its release: load the workdir "
      "of its run."
    )
  return settings_from_stored(stored["settings"]), stored["step"]


def load_params(folder: epath.Path, config: ModelConfig) -> dict:
  """Loads parameters onto the current mesh."""
  if orbax_checkpoint.exists(folder):
    return orbax_checkpoint.load(folder, placed.types_of(config))
  return weights.load_exported(folder, config)


def pipeline(folder: epath.Path, settings: Settings, clip=None, **options) -> Pipeline:
  """Makes the pipeline of an export. Needs a mesh.

  Args:
    folder: of the export.
    settings: of the export.
    clip: scores samples, or None.
    **options: fields of GeneratorConfig.
  """
  text, vqgan = TextTokenizer(folder, settings.vocab), settings.vqgan
  layout = PromptLayout(
    settings.vocab,
    vqgan.image_tokens,
    vqgan.resolution,
    settings.data.sequence_length,
    text.encode,
    text.decode,
    text.longest_token,
  )
  images = ImageTokenizer.load(folder / image_tokenizer.FOLDER)
  params = load_params(folder, settings.model)
  return Pipeline(params, settings, layout, images, clip, **options)

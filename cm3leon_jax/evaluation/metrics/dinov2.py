"""Computes image features with a Hugging Face DINOv2 (Oquab et al. 2023, arXiv 2304.07193)."""

# B batch, H height, W width, D width of the features.

from typing import Any

from etils import epath
from jaxtyping import Float32, UInt8
import numpy as np

from cm3leon_jax import extras
from cm3leon_jax.clip.checkpoint import CONFIG, WEIGHTS, preprocess
from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import published_weights
from cm3leon_jax.files.json_files import read_foreign_json

PROCESSOR = "preprocessor_config.json"
BATCH = 32


class DINOv2:
  """DINOv2 of the package `transformers`, in float32 on torch.

  For `digest`, see `published_weights.digest`.
  """

  def __init__(self, model: Any, processor: Any, digest: str):
    """Wraps a `transformers.Dinov2Model`."""
    self._model, self.config = model.eval(), model.config
    self.processor, self.digest = processor, digest

  @classmethod
  def load(cls, folder: epath.PathLike) -> "DINOv2":
    """Reads config.json, model.safetensors and preprocessor_config.json.

    Raises:
      UserError: torch is not installed, or a file is absent, damaged or for another network.
    """
    try:
      import torch
    except ImportError as error:
      raise UserError(
        f"DINOv2 needs torch, which is not installed: {extras.install('eval')}."
      ) from error
    folder = epath.Path(folder)
    for name in (CONFIG, WEIGHTS, PROCESSOR):
      if not (folder / name).exists():
        raise UserError(
          f"{folder / name} does not exist; the folder must hold a Hugging Face DINOv2 with "
          f"{CONFIG}, {WEIGHTS} and {PROCESSOR}."
        )
    if (kind := read_foreign_json(folder / CONFIG, {}).get("model_type")) != "dinov2":
      raise UserError(f"{folder / CONFIG}: model_type is '{kind}'; it must be 'dinov2'.")
    digest = published_weights.digest(published_weights.read_tensors(folder / WEIGHTS))
    return cls(_read_model(folder, torch.float32), _read_processor(folder), digest)

  def embed_images(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B D"]:
    """Computes the features of images of any size: the normalized outputs at the CLS token."""
    import torch

    out = np.zeros((len(images), self.config.hidden_size), np.float32)
    for start in range(0, len(images), BATCH):
      pixels = preprocess(self.processor, images[start : start + BATCH])
      with torch.inference_mode():
        tokens = self._model(pixel_values=torch.from_numpy(pixels))
      out[start : start + len(pixels)] = tokens.last_hidden_state[:, 0].numpy()
    return out


def _read_model(folder: epath.Path, dtype: Any) -> Any:
  import transformers  # Imported here, because this takes seconds.

  model, info = transformers.Dinov2Model.from_pretrained(
    str(folder),
    local_files_only=True,
    use_safetensors=True,
    dtype=dtype,
    ignore_mismatched_sizes=True,  # The checks below report mismatches.
    output_loading_info=True,
  )
  path = folder / WEIGHTS
  # These names are from the loaded model. The names in the file differ.
  if wrong := sorted(info["mismatched_keys"]):
    name, found, expected = wrong[0]
    raise UserError(
      f"{path}: tensor '{name}' is {list(found)}; {CONFIG} requires {list(expected)}."
    )
  if missing := sorted(info["missing_keys"]):
    shape = list(model.state_dict()[missing[0]].shape)
    raise UserError(f"{path} has no tensor '{missing[0]}'; {CONFIG} requires it, as {shape}.")
  if surplus := sorted(info["unexpected_keys"]):
    raise UserError(f"{path} has a tensor '{surplus[0]}', which a model of {CONFIG} does not have.")
  return model


def _read_processor(folder: epath.Path) -> Any:
  """Reads the image processor that uses PIL, because the other version needs torchvision."""
  import transformers

  path = folder / PROCESSOR
  kind = str(read_foreign_json(path, {}).get("image_processor_type"))
  if not kind.startswith("BitImageProcessor"):
    raise UserError(
      f"{path}: image_processor_type is '{kind}'; it must be 'BitImageProcessor' for DINOv2."
    )
  return transformers.BitImageProcessorPil.from_pretrained(str(folder), local_files_only=True)

"""Loads the networks whose image features are compared by distances such as the FID.

`load_inception`, `load_clip` and `load_dinov2` return an `Extractor`.
"""

# B batch, H height, W width, D width of the features.

from collections.abc import Callable
import dataclasses
from typing import Any

from etils import epath
from flax import traverse_util
import jax
from jaxtyping import Float32, UInt8
import numpy as np

from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import published_weights
from cm3leon_jax.evaluation.metrics.dinov2 import DINOv2
from cm3leon_jax.evaluation.metrics.inception import NETWORK, WIDTH, Inception, Resize
from cm3leon_jax.files.json_files import plain

# Settings of a `transformers` image processor that affect the features.
PREPROCESSING = (
  "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale",
  "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Extractor:
  """A network that embeds images.

  Attributes:
    name: name in tables, e.g. "inception-v3 (tf1 resize)".
    identity: JSON values: `network`, `tensors` (see `published_weights.digest`), and everything
      else that affects the features. Do not compare features of extractors with different
      identities.
    width: D.
    embed: computes the features of images that `__call__` has checked.
  """

  name: str
  identity: dict
  width: int
  embed: Callable[[np.ndarray], np.ndarray]

  def __call__(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B D"]:
    """Computes features. Raises UserError if the images are not uint8 [B, H, W, 3]."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise UserError(
        f"images for {self.name} are {images.dtype}{list(images.shape)}; "
        "they must be uint8[B, H, W, 3]."
      )
    return self.embed(images)


def load_inception(path: epath.PathLike, resize: Resize = "tf1", **options: Any) -> Extractor:
  """Loads the Inception-v3 that the FID uses. See `Inception.load` for arguments and errors."""
  network = Inception.load(path, resize, **options)
  identity = {"network": NETWORK, "tensors": network.digest, "resize": resize}
  return Extractor(f"inception-v3 ({resize} resize)", identity, WIDTH, network.embed_images)


def load_clip(folder: str, workdir: epath.PathLike) -> Extractor:
  """Loads a Hugging Face CLIP model from `folder` in float32, or the run's CLIP if `folder` is "".

  Features are embeddings of norm 1. `retrieval.bank.load_clip` loads the same networks for captions
  and images, but in bfloat16.

  Raises:
    UserError: see `HFCLIP.load` and `CLIP.load`. The extractor of the run's CLIP also raises
      UserError if images have another size than the images that the CLIP was trained on.
  """
  clip = HFCLIP.load(folder, "float32") if folder else CLIP.load(epath.Path(workdir) / "clip")
  return Extractor("clip", clip_identity(clip), clip.config.embed_dim, clip.embed_images)


def clip_identity(clip: CLIP | HFCLIP) -> dict:
  """Returns JSON values that identify the image embeddings of a CLIP model, see `Extractor`."""
  if isinstance(clip, HFCLIP):
    image = dataclasses.asdict(clip.config.image)
    rest = {"image": image, "preprocessing": _preprocessing(clip.processor)}
  else:
    rest = {"image": {"encoder": clip.config.image_encoder, "resolution": clip.config.resolution}}
  tensors = traverse_util.flatten_dict(jax.device_get(clip.params), sep="/")
  return {"network": "clip", "tensors": published_weights.digest(tensors), **rest}


def load_dinov2(folder: epath.PathLike) -> Extractor:
  """Loads a DINOv2 from a Hugging Face folder. See `DINOv2.load` for arguments and errors."""
  network = DINOv2.load(folder)
  # Settings that cannot be read from the weights.
  names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
  identity = {
    "network": "dinov2",
    "tensors": network.digest,
    "config": {name: getattr(network.config, name) for name in names},
    "preprocessing": _preprocessing(network.processor),
  }
  return Extractor("dinov2", identity, network.config.hidden_size, network.embed_images)


def _preprocessing(processor: Any) -> dict[str, Any]:
  stored = processor.to_dict()
  return plain({name: stored.get(name) for name in PREPROCESSING})

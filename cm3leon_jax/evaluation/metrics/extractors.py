"""Loads the networks whose image features are compared by distances such as the FID.

`load_inception` and `load_clip` return an `Extractor`. Inception-v3 of the FID (Heusel et al. 2017,
arXiv 1706.08500) is the network of torch-fidelity. It computes on the CPU, in float32 on torch.
"""

# B batch, H height, W width, D width of the features.

from collections.abc import Callable
import dataclasses
import io
from typing import Any, Literal

from etils import epath
from flax import traverse_util
import jax
import numpy as np

from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.metrics import distances, published_weights
from cm3leon_jax.files.json_files import plain

BATCH = 32
SIDE = 299  # Of the images that Inception-v3 reads.
Resize = Literal["tf1", "torch"]
# Suffix of the names of PyTorch's batch counters, which inference ignores and some files lack.
COUNTER = "num_batches_tracked"
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
    embed: computes features [B, D] float32 of images [B, H, W, 3] uint8.
  """

  name: str
  identity: dict
  embed: Callable[[np.ndarray], np.ndarray]


def load(name: str, weights: str | None, clip: str, workdir: epath.PathLike) -> Extractor:
  """Loads the network that a protocol names.

  Args:
    name: `clip`, `inception_tf1` or `inception_torch`.
    weights: file or folder with the weights. None: the CLIP of the run, from the Hugging Face
      folder `clip` or, if that is "", from `workdir`.

  Raises:
    UserError: the name is "", or the weights are wrong or not given.
  """
  distances.fidelity()  # Says that it is missing before anything is sampled.
  network, _, resize = name.partition("_")
  if network == "clip":
    return load_clip(weights or clip, workdir)
  if not network or weights is None:
    raise UserError(
      f"distances compare features of the protocol's extractor, '{name}': set it to clip, or to "
      "inception_tf1 or inception_torch and name the weights in --extractor."
    )
  return load_inception(weights, resize)  # type: ignore[arg-type]


def load_inception(path: epath.PathLike, resize: Resize = "tf1") -> Extractor:
  """Loads the Inception-v3 of the FID from a safetensors file.

  Args:
    path: a file with the tensors of torch-fidelity's or pytorch-fid's state dict.
    resize: "tf1" resizes images as torch-fidelity and TensorFlow 1 do, "torch" as pytorch-fid does.
      The two give different values of the FID.

  Raises:
    UserError: a package is not installed, or the file is absent or damaged.
  """
  distances.fidelity()
  import torch
  from torch_fidelity import feature_extractor_inceptionv3, interpolate_compat_tensorflow

  tensors = published_weights.read_tensors(path)
  tensors = {name: x for name, x in tensors.items() if not name.endswith("." + COUNTER)}
  # The network reads its weights only from a file.
  file = io.BytesIO()
  torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, file)
  file.seek(0)
  make = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
  *layers, _ = make("inception-v3-compat", ["2048"], file).children()  # The last is a classifier.
  network = torch.nn.Sequential(*layers, torch.nn.Flatten()).eval()

  def scale(images: np.ndarray) -> Any:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    if resize == "torch":
      return 2 * torch.nn.functional.interpolate(pixels / 255, (SIDE, SIDE), mode="bilinear") - 1
    resized = interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x(
      pixels, (SIDE, SIDE), align_corners=False
    )
    return (resized - 128) / 128

  identity = {
    "network": "Inception-v3 of the FID",
    "tensors": published_weights.digest(tensors),
    "resize": resize,
  }
  return Extractor(
    f"inception-v3 ({resize} resize)", identity, _batched(lambda images: network(scale(images)))
  )


def load_clip(folder: str, workdir: epath.PathLike) -> Extractor:
  """Loads a Hugging Face CLIP model from `folder` in float32, or the run's CLIP if `folder` is "".

  Features are embeddings of norm 1. `retrieval.bank.load_clip` loads the same networks for captions
  and images, but in bfloat16.

  Raises:
    UserError: see `HFCLIP.load` and `CLIP.load`. The extractor of the run's CLIP also raises
      UserError if images have another size than the images that the CLIP was trained on.
  """
  clip = HFCLIP.load(folder, "float32") if folder else CLIP.load(epath.Path(workdir) / "clip")
  return of_clip(clip)


def of_clip(clip: CLIP | HFCLIP) -> Extractor:
  """Makes an extractor of the image embeddings of a CLIP model."""
  if isinstance(clip, HFCLIP):
    image = dataclasses.asdict(clip.config.image)
    rest = {"image": image, "preprocessing": _preprocessing(clip.processor)}
  else:
    rest = {"image": {"encoder": clip.config.image_encoder, "resolution": clip.config.resolution}}
  tensors = traverse_util.flatten_dict(jax.device_get(clip.params), sep="/")
  identity = {"network": "clip", "tensors": published_weights.digest(tensors), **rest}
  return Extractor("clip", identity, clip.embed_images)


def _batched(features: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
  """Makes a function that computes the features of any number of images."""
  import torch

  def embed(images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      starts = range(0, len(images), BATCH)
      return np.concatenate([features(images[i : i + BATCH]).numpy() for i in starts])

  return embed


def _preprocessing(processor: Any) -> dict[str, Any]:
  stored = processor.to_dict()
  return plain({name: stored.get(name) for name in PREPROCESSING})

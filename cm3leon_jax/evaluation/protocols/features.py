"""Computes the inputs of image metrics: features and embeddings.

The inputs are computed in parts of PART images. Each part is stored in a file and is not computed
again. Only the pixels of one part are in memory. The parts are divided among the processes.
"""

# n images, H height, W width, D feature width, E embedding width.

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from etils import epath
import jax
from jax.sharding import AxisType
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.clip.model import Embedder
from cm3leon_jax.data.raw import reader
from cm3leon_jax.evaluation.metrics.extractors import Extractor
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from cm3leon_jax.evaluation.protocols.samples import PART
from cm3leon_jax.files.atomic import replacing

KINDS = ("features", "embeddings")


@dataclasses.dataclass(frozen=True)
class Images:
  """Inputs of metrics that are computed from a set of images.

  Attributes:
    features: [n, D] float32 features of the extractor, for distances; or None.
    embeddings: [n, E] float32 CLIP embeddings of norm 1, for CLIP scores; or None.
    groups: [n] the group of each image.
  """

  features: np.ndarray | None
  embeddings: np.ndarray | None
  groups: list[str]

  def __getitem__(self, mask: np.ndarray) -> "Images":
    """Selects the images for which a mask [n] is True."""
    found = (getattr(self, kind) for kind in KINDS)
    features, embeddings = (None if x is None else x[mask] for x in found)
    groups = [group for group, kept in zip(self.groups, mask) if kept]
    return Images(features, embeddings, groups)


@dataclasses.dataclass(frozen=True)
class Networks:
  """Networks that compute the inputs of image metrics.

  Attributes:
    folder: folder for the results, which are stored in parts.
    needs: the members of `KINDS` that are computed.
    identity: JSON values that identify the networks; they are different if results may be
      different.
  """

  folder: epath.Path
  needs: frozenset[str]
  extractor: Extractor | None
  scorer: Embedder | None
  identity: dict

  def images(self, name: str, groups: Sequence[str], load: Callable) -> Images:
    """Computes the inputs in `needs` for a set of images, or reads them if they are stored.

    `load(start, stop)` returns uint8 pixels [stop - start, H, W, 3].
    """
    stem = protocol_lib.stem(name)
    stem += f"-{protocol_lib.digest([self.identity, sorted(self.needs)])[:8]}"
    starts = range(0, len(groups), PART)
    paths = [self.folder / stem / f"part_{start // PART:05d}.npz" for start in starts]
    # The caller's mesh has the devices of all processes, but only one process computes a part.
    devices = jax.local_devices()[:1]
    local = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=devices)
    with distributed.together(), jax.set_mesh(local):
      for number, (start, path) in enumerate(zip(starts, paths)):
        if number % jax.process_count() == jax.process_index() and not path.exists():
          pixels = load(start, min(start + PART, len(groups)))
          with replacing(path) as file:
            arrays: dict[str, Any] = self._compute(pixels)
            np.savez(file, **arrays)
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for path in paths:
      with path.open("rb") as file, np.load(file) as stored:
        for kind in stored.files:
          found[kind].append(stored[kind])
    whole = {kind: np.concatenate(rows) if rows else None for kind, rows in found.items()}
    return Images(whole["features"], whole["embeddings"], list(groups))

  def _compute(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    if "features" in self.needs:
      assert self.extractor is not None
      found["features"] = np.asarray(self.extractor.embed(pixels), np.float32)
    if "embeddings" in self.needs:
      assert self.scorer is not None
      found["embeddings"] = np.asarray(self.scorer.embed_images(pixels), np.float32)
    return found


def real_images(networks: Networks, paths: dict[str, str], size: int) -> Images:
  """Computes the inputs of metrics for image files. `paths` maps each file to its group.

  Images become squares of `size` pixels.
  """
  files = list(paths)

  def load(start: int, stop: int) -> np.ndarray:
    return np.stack([reader.load_image(path, size) for path in files[start:stop]])

  return networks.images("reference", list(paths.values()), load)


def noise(networks: Networks, count: int, size: int, seed: int) -> Images:
  """Computes the inputs of metrics for `count` images of random noise, with sides of `size`."""

  def load(start: int, stop: int) -> np.ndarray:
    rng = np.random.default_rng([seed, start])
    return rng.integers(0, 256, (stop - start, size, size, 3), np.uint8)

  return networks.images("noise", [f"noise {i}" for i in range(count)], load)

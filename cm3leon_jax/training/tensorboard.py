"""TensorBoard: scalars, grids of samples, histograms of parameters."""

import importlib
import os

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

FOLDER = "tensorboard"
FLUSH_SECONDS = 30
BUCKETS = 30  # Of a histogram, between the smallest and the largest value.
SCALARS = (
  "loss",
  "image_loss",
  "text_loss",
  "grad_norm",
  "learning_rate",
  "tokens_per_second",
  "mfu",
  "goodput",
)


def curves(values: dict) -> dict[str, float]:
  """Those of a line's values that are worth a curve, by their tags.

  {"loss": 2.5, "weight": 8.0} -> {"train/loss": 2.5}; {"heldout_image_loss": 1.5} -> {"heldout/image_loss": 1.5}
  """
  heldout = {
    f"heldout/{k.removeprefix('heldout_')}": x
    for k, x in values.items()
    if k.startswith("heldout_")
  }
  return heldout | {f"train/{k}": x for k, x in values.items() if k in SCALARS}


class TensorBoard:
  """Event files in `folder`, which may be a bucket's if google-cloud-storage is installed (gcsfs brings it)."""

  def __init__(self, folder: epath.PathLike, first_step: int):
    """Opens an event file.

    Args:
      folder: of the run's event files; every start adds one.
      first_step: first step of this start; what earlier starts wrote of it and of later ones is hidden.

    Raises:
      ImportError: tensorboardX, or what it needs for this folder, is not installed.
    """
    import tensorboardX  # An extra: the project works without it.

    if os.fspath(folder).startswith("gs://"):
      importlib.import_module(
        "google.cloud.storage"
      )  # tensorboardX finds that out too late to say it well.
    # A file's name has a resolution of a second, and an existing one would be written over.
    suffix = f".{os.getpid()}.{first_step}"
    self._writer = tensorboardX.SummaryWriter(
      os.fspath(folder), purge_step=first_step, flush_secs=FLUSH_SECONDS, filename_suffix=suffix
    )

  def scalars(self, step: int, values: dict) -> None:
    for tag, value in curves(values).items():
      self._writer.add_scalar(tag, value, step)

  def samples(self, step: int, sheet) -> None:
    """sheet: a PIL image, captions in it."""
    self._writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

  def histograms(self, step: int, histograms: dict) -> None:
    """One histogram a parameter, over all its layers; of `named_histograms`."""
    for name, found in histograms.items():
      self._writer.add_histogram_raw(
        f"params/{name}", **{k: np.asarray(x).tolist() for k, x in found.items()}, global_step=step
      )

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


@jax.jit
def tree_histograms(params: dict) -> dict:
  """A tree of parameters -> the same tree of their histograms: scalars min, max, num, sum, sum_squares, and of BUCKETS
  equal buckets bucket_limits (upper ends) and bucket_counts, fp32; exact up to 2^24 of a bucket.

  Only comparisons and sums over whole arrays: they stay local to the shards of any layout.
  """

  def one(x):
    low, high = jnp.min(x), jnp.max(x)
    limits = low + (high - low) * jnp.arange(1, BUCKETS, dtype=jnp.float32) / BUCKETS
    below = jax.lax.map(lambda limit: jnp.sum(x < limit, dtype=jnp.float32), limits)
    below = jnp.concatenate([below, jnp.array([x.size], jnp.float32)])
    return {
      "min": low, "max": high, "num": float(x.size), "sum": jnp.sum(x), "sum_squares": jnp.sum(x * x),
      "bucket_limits": jnp.append(limits, high), "bucket_counts": jnp.diff(below, prepend=0.0),
    }  # fmt: skip

  return jax.tree.map(one, params)


def named_histograms(params: dict) -> dict[str, dict]:
  """`tree_histograms` on the host, by names like `blocks/up`. All processes must call it."""
  found = jax.device_get(tree_histograms(params))
  leaves = jax.tree.leaves_with_path(found, is_leaf=lambda node: "bucket_counts" in node)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

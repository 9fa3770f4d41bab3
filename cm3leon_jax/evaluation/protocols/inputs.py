"""Computes the inputs of metrics: features and embeddings of images, verdicts, log-probabilities.

Inputs are computed in parts of PART samples. Each part is a file and is not computed again.
"""

# n samples, H height, W width, D feature width, E embedding width, C candidate answers.

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

from etils import epath
import jax
from jax.sharding import AxisType
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.data.raw import reader
from cm3leon_jax.evaluation import judged
from cm3leon_jax.evaluation.likelihood import pairs
from cm3leon_jax.evaluation.metrics.extractors import Extractor
from cm3leon_jax.evaluation.protocols.metrics import METRICS
from cm3leon_jax.evaluation.protocols.protocol import Protocol, digest, stem
from cm3leon_jax.evaluation.protocols.samples import PART, Evaluated, absent, read_part
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.generation.given_images import load_image
from cm3leon_jax.generation.pipeline import Pipeline

OF_IMAGES = ("features", "embeddings")  # Inputs of which real images and noise have values, too.

# Returns the pixels of the images from a start to a stop, uint8 [stop - start, H, W, 3].
Load = Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of a protocol, with the model, data and networks that it uses.

  Attributes:
    protocol: its metrics are checked.
    folder: folder for the results.
    samples: folder for the samples and for the inputs that are computed from them.
    params: parameters of the decoder as it was trained, which give the log-probabilities of texts.
    networks: the networks that compute those of OF_IMAGES which the metrics need.
    scorer: CLIP model of the embeddings; None without embeddings.
  """

  protocol: Protocol
  pipeline: Pipeline
  params: dict
  evaluated: Evaluated
  folder: epath.Path
  samples: epath.Path
  networks: dict[str, Extractor]
  scorer: CLIP | HFCLIP | None = None
  judge: judged.Judge | None = None

  @functools.cached_property
  def needs(self) -> list[str]:
    """Names of the inputs that the metrics need."""
    return sorted({METRICS[name].need for name in self.protocol.metrics} - {""})

  @functools.cached_property
  def groups(self) -> list[str]:
    """Group of each example."""
    return [example.group for example in self.evaluated.examples]

  def decode(self, lines: Sequence[dict]) -> np.ndarray:
    """Returns the images of samples, uint8 [n, H, W, 3]."""
    return self.pipeline.image_tokenizer.decode(np.array([line["codes"] for line in lines]))


def in_parts(folder: epath.Path, count: int, compute: Callable[[int, int], Iterable]) -> list:
  """Computes a number or array for each of `count` samples, or reads them from their files.

  All processes call `compute(start, stop)`, which returns the values of some samples.
  """
  starts = range(0, count, PART)
  paths = [folder / f"part_{start // PART:05d}.npz" for start in starts]
  for i in absent(paths, folder.parent.name):
    values: Any = [np.asarray(value) for value in compute(starts[i], min(starts[i] + PART, count))]
    if distributed.is_first():
      with replacing(paths[i]) as file:
        np.savez(file, *values)
  distributed.gather(None)  # Wait until the first process has written the files.
  result = []
  for path in paths:
    with path.open("rb") as file, np.load(file) as stored:
      result += [stored[name] for name in stored.files]
  return result


def embed(job: Job, need: str, title: str, count: int, load: Load) -> np.ndarray:
  """Computes features [n, D] or embeddings [n, E] of a set of `count` images, float32."""
  network = job.networks[need]
  # The caller's mesh has the devices of all processes, but each process computes all images.
  devices = jax.local_devices()[:1]
  local = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=devices)

  def compute(start: int, stop: int) -> np.ndarray:
    with jax.set_mesh(local):
      return np.asarray(network.embed(load(start, stop)), np.float32)

  folder = job.samples / f"{need}-{digest(network.identity)[:8]}" / stem(title)
  return np.stack(in_parts(folder, count, compute))


def of_real_images(job: Job, need: str) -> np.ndarray:
  """Embeds the different real images, in the order of `Evaluated.images`."""
  paths, side = list(job.evaluated.images), job.pipeline.layout.resolution

  def load(start: int, stop: int) -> np.ndarray:
    return np.stack([reader.load_image(path, side) for path in paths[start:stop]])

  return embed(job, need, "reference", len(paths), load)


def of_noise(job: Job, count: int) -> np.ndarray:
  """Computes the features of `count` images of random noise."""
  side = job.pipeline.layout.resolution

  def load(start: int, stop: int) -> np.ndarray:
    rng = np.random.default_rng([job.protocol.seed, start])
    return rng.integers(0, 256, (stop - start, side, side, 3), np.uint8)

  return embed(job, "features", "noise", count, load)


def of_captions(job: Job) -> np.ndarray:
  """Embeds the captions of all examples with CLIP. Returns [n, E] with norm 1."""
  clip: Any = job.scorer
  tokens = [clip.encode(example.prompt or "") for example in job.evaluated.examples]
  rows = [clip.embed_texts(tokens[i : i + PART]) for i in range(0, len(tokens), PART)]
  return np.concatenate(rows).astype(np.float32)


def of_column(job: Job, need: str, column: str) -> Any:
  """Computes an input for the best sample of each example of a column."""

  def load(start: int, _: int) -> np.ndarray:
    return job.decode(read_part(job.samples, column, start))

  if need in OF_IMAGES:
    return embed(job, need, f"column {column}", len(job.groups), load)
  return of_lines(job, need, column, OF_LINES[need])


def of_lines(job: Job, title: str, column: str, compute: Callable) -> list:
  """Computes `compute(job, lines)`, a value per line, for the samples of a column."""
  folder = job.samples / title / stem(column)
  return in_parts(
    folder, len(job.groups), lambda start, _: compute(job, read_part(job.samples, column, start))
  )


def verdicts(job: Job, lines: list[dict]) -> list[bool]:
  """Judges whether each image shows exactly what its caption says."""
  assert job.judge is not None
  facts = [job.evaluated.facts[line["row"]] for line in lines]
  return [not reason for reason in judged.judge_all(job.judge, job.decode(lines), facts)]


def likelihoods(job: Job, lines: list[dict]) -> list[float]:
  """Computes log p(caption | image) - log p(caption) in nats, for each sample."""
  texts, codes = zip(*((line["prompt"], line["codes"]) for line in lines))
  scores = pairs.score_codes(job.pipeline, job.params, texts, np.array(codes))
  return [score.text_given_image - score.text for score in scores]


def candidates(job: Job, lines: list[dict]) -> list[np.ndarray]:
  """Computes, for each example, the log-probabilities of its candidate answers [C], in nats."""
  examples = [job.evaluated.examples[line["row"]] for line in lines]
  side = job.pipeline.layout.resolution
  codes = job.pipeline.image_tokenizer.encode(
    np.stack([load_image(example.image, side) for example in examples])
  )
  texts = [job.protocol.text_of(example) for example in examples]
  answers = [example.candidates for example in examples]
  return pairs.score_answers(job.pipeline, job.params, texts, answers, codes)


OF_LINES: dict[str, Callable[[Job, list[dict]], Iterable]] = {
  "verdicts": verdicts,
  "likelihoods": likelihoods,
  "candidates": candidates,
}

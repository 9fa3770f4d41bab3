"""Lists the metrics of protocols, and computes them from samples.

The result of a metric has `value` and, if an interval can be computed, the bounds `low` and `high`
of a 95% confidence interval. Metrics of texts are multiplied by 100, as in papers.
"""

# n examples, D feature width, E embedding width, C candidate answers.

from collections.abc import Callable, Sequence
import dataclasses
import shutil
from typing import Any

import numpy as np

from cm3leon_jax import extras
from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.metrics import answers, distances


@dataclasses.dataclass(frozen=True)
class ColumnSamples:
  """Samples of a column, and what metrics compute from them.

  Attributes:
    groups: [n] the group of each sample; intervals resample groups.
    lines: line of the samples file for the best sample of each example, without its codes.
    inputs: values by name: `features` [n, D] and `embeddings` [n, E] of the images, `captions`
      [n, E], `real_features` of the real images, and one value per sample of `verdicts`,
      `likelihoods` and `candidates` [C] (`inputs.py`).
  """

  groups: Sequence[str]
  lines: Sequence[dict] = ()
  examples: Sequence[Example] = ()
  inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
  seed: int = 0
  num_resamples: int = intervals.NUM_RESAMPLES


Compute = Callable[[ColumnSamples], dict]  # Computes the result of a metric.


@dataclasses.dataclass(frozen=True)
class Metric:
  """Metric of a protocol.

  Attributes:
    title: name in tables, with the unit.
    task: "image" or "text".
    need: the entry of `ColumnSamples.inputs` that is computed for it.
    least: smallest number of samples.
  """

  compute: Compute
  title: str
  task: str
  need: str = ""
  least: int = 2


def measure(name: str, samples: ColumnSamples) -> dict:
  """Computes a metric. The result also has `samples`, the number of samples that count."""
  return {"samples": len(samples.groups), **METRICS[name].compute(samples)}


def mean(values: Sequence[float | None], samples: ColumnSamples) -> dict:
  """Averages one number per sample, skipping None. If all are None, `value` is None."""
  places = [i for i, value in enumerate(values) if value is not None]
  if not places:
    return {"value": None, "samples": 0}
  some = np.array([values[i] for i in places], np.float64)
  groups = [samples.groups[i] for i in places]
  result = intervals.mean_interval(
    some, np.ones(len(some)), groups, samples.num_resamples, samples.seed
  )
  return {"value": result.pop("mean"), **result, "samples": len(some)}


def _mean_of(name: str, factor: float = 1.0) -> Compute:
  return lambda samples: mean([factor * value for value in samples.inputs[name]], samples)


def _sets(samples: ColumnSamples) -> tuple[np.ndarray, np.ndarray]:
  return samples.inputs["features"], samples.inputs["real_features"]


def _of_texts(score: Callable[[list[str], list[Sequence[str]]], np.ndarray]) -> Compute:
  """Makes the mean of a score that each text gets by its references, times 100."""
  return lambda samples: mean((100 * score(*_texts(samples))).tolist(), samples)


def frechet(samples: ColumnSamples) -> dict:
  """Computes the Frechet distance between the samples and the real images."""
  return {"value": distances.frechet_distance(*_sets(samples))}


def kernel(samples: ColumnSamples) -> dict:
  """Computes the kernel distance KID. `std` is the standard deviation over random subsets."""
  result = distances.kid(*_sets(samples), seed=samples.seed)
  return {"value": result["mean"], **result}


def precision_recall(samples: ColumnSamples) -> dict:
  """Computes improved precision as `value`, and also `recall`."""
  result = distances.precision_recall(*_sets(samples))
  return {"value": result["precision"], "recall": result["recall"]}


def cmmd(samples: ColumnSamples) -> dict:
  """Computes CMMD. Its paper uses features of CLIP ViT-L/14 at 336 pixels."""
  return {"value": distances.cmmd(*_sets(samples))}


def clip_score(samples: ColumnSamples) -> dict:
  """Averages the cosine similarity between each image and its caption."""
  products = samples.inputs["embeddings"] * samples.inputs["captions"]
  return mean(np.sum(products, axis=1).tolist(), samples)


def copy_rate(samples: ColumnSamples) -> dict:
  """Averages the percentage of positions at which a sample copies the code of its best neighbor."""
  copied = [line["copied"] for line in samples.lines]
  return mean([None if share is None else 100 * share for share in copied], samples)


def cider(samples: ColumnSamples) -> dict:
  """Computes CIDEr-D times 100. The references of all examples determine the n-gram weights."""
  _, scores = _scorers().cider.cider.Cider().compute_score(*_tokens(samples))
  return mean((100 * scores).tolist(), samples)


def bleu4(samples: ColumnSamples) -> dict:
  """Computes BLEU-4 times 100, with all captions as one corpus. It has no interval."""
  scores, _ = _scorers().bleu.bleu.Bleu(4).compute_score(*_tokens(samples), verbose=0)
  return {"value": 100 * scores[-1], "low": None, "high": None}


def ndcg(samples: ColumnSamples) -> dict:
  """Computes NDCG times 100, with the candidates ranked by their log-probabilities."""
  pairs = zip(samples.inputs["candidates"], samples.examples)
  values = [answers.ndcg([scores], [example.relevance])[0] for scores, example in pairs]
  return mean([100 * float(value) for value in values], samples)


def _texts(samples: ColumnSamples) -> tuple[list[str], list[Sequence[str]]]:
  texts = [line["text"] for line in samples.lines]
  return texts, [example.references for example in samples.examples]


def _scorers() -> Any:
  """Returns the package with which publications score captions. Its tokenizer is a Java program."""
  try:
    import pycocoevalcap.bleu.bleu
    import pycocoevalcap.cider.cider
    import pycocoevalcap.tokenizer.ptbtokenizer
  except ImportError as error:
    raise UserError(f"captions need a package ({error}): {extras.install('eval')}.") from error
  if shutil.which("java") is None:
    raise UserError("captions need the program java, for their tokens: install it, e.g. OpenJDK.")
  return pycocoevalcap


def _tokens(samples: ColumnSamples) -> tuple[dict, dict]:
  """Returns ({example: its references}, {example: [its text]}), tokenized."""
  texts, references = _texts(samples)
  sets = [*references, *([text] for text in texts)]
  # The tokenizer reads a caption per line, and other white space than "\n" can also end a line.
  lines = {i: [{"caption": " ".join(x.split())} for x in some] for i, some in enumerate(sets)}
  result = _scorers().tokenizer.ptbtokenizer.PTBTokenizer().tokenize(lines)
  count = len(texts)
  return {i: result[i] for i in range(count)}, {i: result[count + i] for i in range(count)}


METRICS = {
  "frechet_distance": Metric(frechet, "Frechet distance", "image", "features"),
  "kernel_distance": Metric(kernel, "kernel distance", "image", "features"),
  "precision_recall": Metric(precision_recall, "precision", "image", "features", least=4),
  "cmmd": Metric(cmmd, "CMMD", "image", "features"),
  "clip_score": Metric(clip_score, "CLIP score", "image", "embeddings"),
  "likelihood": Metric(
    _mean_of("likelihoods"), "log p(caption | image) - log p(caption)", "image", "likelihoods"
  ),
  "copy_rate": Metric(copy_rate, "codes copied (%)", "image"),
  "judged": Metric(_mean_of("verdicts", 100.0), "wholly correct (%)", "image", "verdicts"),
  "cider": Metric(cider, "CIDEr", "text"),
  "bleu4": Metric(bleu4, "BLEU-4", "text"),
  "vqa_accuracy": Metric(_of_texts(answers.vqa_accuracies), "VQA accuracy (%)", "text"),
  "exact_match": Metric(_of_texts(answers.exact_matches), "exact match (%)", "text"),
  "ndcg": Metric(ndcg, "NDCG (%)", "text", "candidates"),
}


# Least number of references of an example.
REFERENCES = {"cider": 1, "bleu4": 1, "vqa_accuracy": 4, "exact_match": 1}


def check(names: Sequence[str], task: str, count: int) -> None:
  """Checks the names of metrics, their task and the number of samples, before sampling.

  Raises:
    UserError: a name is unknown, a metric is for another task, or there are too few samples.
  """
  fitting = [name for name, metric in METRICS.items() if metric.task == task]
  for name in names:
    if name not in fitting:
      raise UserError(
        f"'{name}' is not a metric for task '{task}'; choose among {', '.join(fitting)}."
      )
    if 0 < count < (least := METRICS[name].least):  # A count of 0 means all examples.
      raise UserError(
        f"metric '{name}' needs at least {least} samples, but the protocol has {count}: "
        "increase data.count, or --examples."
      )


def check_examples(names: Sequence[str], examples: Sequence[Example]) -> None:
  """Checks, before sampling, that each example has what the metrics compare samples with.

  Raises:
    UserError: a metric cannot be computed. The message names the metric and the example.
  """
  for example in examples:
    has = {"clip_score": bool(example.image and example.prompt), "ndcg": bool(example.relevance)}
    has |= {name: len(example.references) >= least for name, least in REFERENCES.items()}
    for name in names:
      if not has.get(name, True):
        raise UserError(
          f"metric '{name}' cannot be computed, because example {example.key} lacks an image with "
          f"its caption, judged candidates, or {REFERENCES.get(name, 1)} references: omit the "
          "metric, or choose other data."
        )

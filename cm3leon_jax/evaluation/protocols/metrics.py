"""Lists the metrics of protocols, and checks that they can be computed."""

from collections.abc import Callable, Sequence
import dataclasses

from cm3leon_jax.config import UserError
from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.evaluation.protocols import image_metrics, text_metrics
from cm3leon_jax.evaluation.protocols.column import ColumnSamples


@dataclasses.dataclass(frozen=True)
class Metric:
  """Metric of a protocol.

  Attributes:
    compute: function that maps `ColumnSamples` to a result, as described in `protocols.column`.
    title: name in tables, with the unit.
    task: "image" or "text".
    needs: the inputs that it uses. "features" and "embeddings" are fields of `Images`;
      "likelihoods", "agreements", "candidates" and "verdicts" are fields of `ColumnSamples`.
    least: smallest number of samples.
  """

  compute: Callable[[ColumnSamples], dict]
  title: str
  task: str
  needs: tuple[str, ...] = ()
  least: int = 2


def _distance(compute: Callable[[ColumnSamples], dict], title: str) -> Metric:
  return Metric(compute, title, "image", ("features",))


METRICS = {
  "frechet_distance": _distance(image_metrics.frechet_distance, "Frechet distance"),
  "kernel_distance": _distance(image_metrics.kernel, "kernel distance"),
  "precision_recall": Metric(image_metrics.precision, "precision", "image", ("features",), least=4),
  "cmmd": _distance(image_metrics.cmmd, "CMMD"),
  "clip_score": Metric(image_metrics.clip_score, "CLIP score", "image", ("embeddings",)),
  "likelihood": Metric(
    image_metrics.likelihood, "log p(caption | image) - log p(caption)", "image", ("likelihoods",)
  ),
  "vqa_score": Metric(image_metrics.vqa_score, "VQAScore", "image", ("agreements",)),
  "copy_rate": Metric(image_metrics.copy_rate, "codes copied (%)", "image"),
  "judged": Metric(image_metrics.judged, "wholly correct (%)", "image", ("verdicts",)),
  "cider": Metric(text_metrics.cider, "CIDEr", "text"),
  "bleu4": Metric(text_metrics.bleu4, "BLEU-4", "text"),
  "vqa_accuracy": Metric(text_metrics.vqa_accuracy, "VQA accuracy (%)", "text"),
  "exact_match": Metric(text_metrics.exact_match, "exact match (%)", "text"),
  "ndcg": Metric(text_metrics.ndcg, "NDCG (%)", "text", ("candidates",)),
}


def check(names: Sequence[str], task: str, count: int) -> None:
  """Checks the names of metrics, their task and the number of samples, before sampling.

  Raises:
    UserError: a name is unknown, a metric is for another task, or there are too few
      samples.
  """
  for name in names:
    if name not in METRICS:
      raise UserError(f"'{name}' is not a metric; the metrics are {', '.join(METRICS)}.")
    metric = METRICS[name]
    if task != metric.task:
      fitting = [n for n, m in METRICS.items() if task == m.task]
      raise UserError(
        f"metric '{name}' cannot be used for task '{task}'; choose among {', '.join(fitting)}."
      )
    if 0 < count < metric.least:  # A count of 0 means all examples.
      raise UserError(
        f"metric '{name}' needs at least {metric.least} samples, but the protocol has {count}: "
        "increase data.count, or --examples."
      )


def check_examples(
  names: Sequence[str], examples: Sequence[Example], facts: Sequence[dict], judges: bool = False
) -> None:
  """Checks, before sampling, that each example has the references that the metrics need.

  `judges` is whether the config has a judge.

  Raises:
    UserError: a reference is missing. The message names the metric and the reference.
  """
  if "judged" in names and not (judges and all(facts)):
    raise UserError(
      "metric 'judged' needs held-out documents with facts, and a judge: give a --config with "
      "config.evaluation.judge = FILE.py:FUNCTION."
    )
  for example in examples:
    lacks = {
      "clip_score": "an image and a caption" if not (example.image and example.prompt) else "",
      "ndcg": "candidates with judgments" if not example.relevance else "",
      "vqa_accuracy": "at least 4 answers of people" if len(example.references) < 4 else "",
      **dict.fromkeys(
        ("cider", "bleu4", "exact_match"), "a reference" if not example.references else ""
      ),
    }
    for name in names:
      if what := lacks.get(name):
        raise UserError(
          f"metric '{name}' needs {what}, which example {example.key} does not have: omit the "
          "metric, or choose other data."
        )

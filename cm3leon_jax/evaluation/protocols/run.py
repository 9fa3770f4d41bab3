"""Runs a protocol: generates samples, and computes metrics and controls."""

# n examples.

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.evaluation import judged
from cm3leon_jax.evaluation.likelihood import pairs
from cm3leon_jax.evaluation.metrics.extractors import Extractor
from cm3leon_jax.evaluation.protocols import features
from cm3leon_jax.evaluation.protocols import samples as samples_lib
from cm3leon_jax.evaluation.protocols.column import ColumnSamples, present
from cm3leon_jax.evaluation.protocols.features import Images, Networks
from cm3leon_jax.evaluation.protocols.metrics import METRICS
from cm3leon_jax.evaluation.protocols.protocol import Protocol, sampling_of, stem
from cm3leon_jax.evaluation.protocols.samples import PART, Evaluated
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.generation.given_images import load_image
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import MASK

# Question of VQAScore (Lin et al. 2024), in the format that CM3Leon uses for questions (table 5).
AGREES = f'Question: Does this figure show "{{}}"? Please answer yes or no. Answer: {MASK}.'
REAL, NOISE, SHUFFLED = "real images", "noise", "shuffled"  # Names of controls.


@dataclasses.dataclass(frozen=True)
class ProtocolRun:
  """One run of a protocol, with the model, data and networks that it uses.

  Attributes:
    metrics: names in `METRICS`, already checked.
    samples: folder for the samples and for the values that are computed from them.
    scorer_identity: JSON values that identify the CLIP model, or None.
    params: parameters of the decoder as it was trained, which give the log-probabilities of texts.
    judge: judge of the user's config, or None.
  """

  protocol: Protocol
  metrics: tuple[str, ...]
  pipeline: Pipeline
  workdir: epath.Path
  folder: epath.Path
  samples: epath.Path
  evaluated: Evaluated
  extractor: Extractor | None
  scorer: Any
  scorer_identity: dict | None
  params: dict
  num_resamples: int
  judge: judged.Judge | None = None

  @functools.cached_property
  def needs(self) -> frozenset[str]:
    """Inputs that the metrics need."""
    return frozenset(need for name in self.metrics for need in METRICS[name].needs)

  @functools.cached_property
  def groups(self) -> list[str]:
    """Group of each example."""
    return [example.group for example in self.evaluated.examples]

  @functools.cached_property
  def networks(self) -> Networks:
    """Networks that compute the inputs of image metrics."""
    extractor = self.extractor and self.extractor.identity
    return Networks(
      folder=self.samples / "features",
      needs=self.needs & frozenset(features.KINDS),
      extractor=self.extractor,
      scorer=self.scorer,
      identity={"extractor": extractor, "scorer": self.scorer_identity},
    )

  def column(self, name: str, **fields: Any) -> ColumnSamples:
    """Makes the input of a metric. `lines` and `examples` are empty by default."""
    fields = {"lines": [], "examples": [], "groups": self.groups, **fields}
    return ColumnSamples(name, seed=self.protocol.seed, num_resamples=self.num_resamples, **fields)


def run(job: ProtocolRun) -> dict:
  """Generates missing samples and computes all metrics.

  Returns {"columns": {name: {"retrieve", "sampling", "divergence", "metrics": {metric: {"value",
  ...}}}}, "controls": {control: {metric: {"value", ...}}}}.
  """
  tasks = samples_lib.tasks_of(job.protocol, job.evaluated, job.pipeline, job.workdir)
  samples_lib.generate(job.protocol, job.evaluated, tasks, job.pipeline, job.samples)
  reference, captions = None, None
  if job.networks.needs:
    reference = features.real_images(
      job.networks, job.evaluated.images, job.pipeline.layout.resolution
    )
  if "embeddings" in job.needs:
    captions = embed_captions(job)
  result: dict = {"columns": {}, "controls": {}}
  for column in job.protocol.columns:
    data = _column(job, column.name, reference, captions)
    measured = {name: METRICS[name].compute(data) for name in job.metrics}
    apart = [line["divergence"] for line in data.lines if line["divergence"] is not None]
    result["columns"][column.name] = {
      "retrieve": column.retrieve,
      "sampling": dataclasses.asdict(sampling_of(column, job.pipeline.settings.sampling)),
      "divergence": float(np.mean(apart)) if apart else None,
      "metrics": measured,
    }
    if not result["controls"]:
      result["controls"] = _controls(job, data)
  return result


def _column(
  job: ProtocolRun, name: str, reference: Images | None, captions: np.ndarray | None
) -> ColumnSamples:
  """Reads the samples of a column and computes the inputs of metrics."""
  distributed.gather(None)  # Wait until the first process has written the samples.
  lines = list(samples_lib.read_lines(job.samples, name, len(job.groups)))
  images = None
  if job.networks.needs:

    def load(start: int, stop: int) -> np.ndarray:
      part = samples_lib.read_part(job.samples, name, start)
      return job.pipeline.image_tokenizer.decode(np.array([line["codes"] for line in part]))

    images = job.networks.images(f"column {name}", job.groups, load)
  of_parts = {
    "verdicts": _judge,
    "likelihoods": _likelihoods,
    "agreements": _agreements,
    "candidates": _candidates,
  }
  needs = job.needs & set(of_parts)
  computed: dict[str, Any] = {n: _in_parts(job, name, n, of_parts[n]) for n in sorted(needs)}
  return job.column(
    name,
    lines=lines,
    examples=job.evaluated.examples,
    images=images,
    reference=reference,
    captions=captions,
    **computed,
  )


def _in_parts(job: ProtocolRun, name: str, need: str, compute: Callable) -> list:
  """Computes one JSON value per sample, in parts. A part whose file exists is not recomputed."""
  folder = job.samples / need / stem(name)
  starts = range(0, len(job.groups), PART)
  paths = {start: folder / f"part_{start // PART:05d}.json" for start in starts}
  todo = [start for start, path in paths.items() if not path.exists()]
  for start in progress_bar(todo, desc=need, unit="part", disable=not distributed.is_first()):
    values = compute(job, samples_lib.read_part(job.samples, name, start))
    if distributed.is_first():
      write_json(paths[start], values)
  distributed.gather(None)
  return [value for path in paths.values() for value in read_json(path)]


def _judge(job: ProtocolRun, part: list[dict]) -> list[bool]:
  assert job.judge is not None
  images = job.pipeline.image_tokenizer.decode(np.array([line["codes"] for line in part]))
  facts = [job.evaluated.facts[line["row"]] for line in part]
  return [not reason for reason in judged.judge_all(job.judge, images, facts)]


def _likelihoods(job: ProtocolRun, part: list[dict]) -> list[float]:
  """Computes log p(caption | image) - log p(caption) in nats, for each sample in `part`."""
  texts, codes = zip(*((line["prompt"], line["codes"]) for line in part))
  scores = pairs.score_codes(job.pipeline, job.params, texts, np.array(codes))
  return [score.text_given_image - score.text for score in scores]


def _agreements(
  job: ProtocolRun, part: list[dict], prompts: Sequence[str] | None = None
) -> list[float]:
  """Computes, for each image, p(yes) / (p(yes) + p(no)) when asked if it shows its caption.

  If `prompts` are given, they replace the captions; `prompts[i]` replaces that of example i.
  """
  codes = np.array([line["codes"] for line in part])
  shown = [line["prompt"] if prompts is None else prompts[line["row"]] for line in part]
  asked = [AGREES.format(text.replace(MASK, " ")) for text in shown]
  scores = pairs.score_answers(job.pipeline, job.params, asked, [("yes", "no")] * len(part), codes)
  return [float(1 / (1 + np.exp(no - yes))) for yes, no in scores]


def _candidates(job: ProtocolRun, part: list[dict]) -> list[list[float]]:
  """Computes, for each example, the log-probabilities of its candidate answers, in nats."""
  size = job.pipeline.layout.resolution
  examples = [job.evaluated.examples[line["row"]] for line in part]
  images = np.stack([load_image(example.image, size) for example in examples])
  codes = job.pipeline.image_tokenizer.encode(images)
  texts = [job.protocol.text_of(example) for example in examples]
  answers = [example.candidates for example in examples]
  scores = pairs.score_answers(job.pipeline, job.params, texts, answers, codes)
  return [row.tolist() for row in scores]


def embed_captions(job: ProtocolRun) -> np.ndarray:
  """Embeds the captions of all examples with CLIP. Returns [n, E] with norm 1."""
  prompts = [example.prompt or "" for example in job.evaluated.examples]
  tokens = [job.scorer.encode(text) for text in prompts]
  rows = [job.scorer.embed_texts(tokens[i : i + PART]) for i in range(0, len(tokens), PART)]
  return np.concatenate(rows).astype(np.float32)


def _controls(job: ProtocolRun, first: ColumnSamples) -> dict[str, dict]:
  """Measures controls: data for which a metric must be good, and data for which it must be bad.

  - Distances: between two halves of the real images, split by groups, which differ only by chance
    (good), and between noise and real images (bad).
  - CLIP scores: real images (good), and samples with the captions of other examples (bad).
  - VQAScore: samples with the captions of other examples (bad).
  - Texts: the texts of other examples (bad), and candidates in random order (bad).
  """
  rng = np.random.default_rng(job.protocol.seed)
  shuffled = others(len(job.groups), rng)
  result: dict[str, dict] = {}

  def measure(title: str, column: ColumnSamples, names: Iterable[str]) -> None:
    for name in names:
      if len(column.groups) >= METRICS[name].least:
        result.setdefault(title, {})[name] = METRICS[name].compute(column)

  distances = [n for n in job.metrics if METRICS[n].needs == ("features",)]
  if distances:
    real = present(first.reference)
    unique = sorted(set(real.groups))
    chosen = set(rng.permutation(unique)[: len(unique) // 2])
    mask = np.array([group in chosen for group in real.groups])
    side = job.pipeline.layout.resolution
    noise = features.noise(job.networks, len(real.groups), side, job.protocol.seed)
    for title, made, other in ((REAL, real[mask], real[~mask]), (NOISE, noise, real)):
      column = job.column(title, groups=made.groups, images=made, reference=other)
      measure(title, column, distances)
  if "clip_score" in job.metrics:
    places = {path: i for i, path in enumerate(job.evaluated.images)}
    rows = [places[present(example.image)] for example in job.evaluated.examples]
    real = Images(None, present(present(first.reference).embeddings)[rows], job.groups)
    measure(REAL, job.column(REAL, images=real, captions=first.captions), ["clip_score"])
    column = dataclasses.replace(first, captions=present(first.captions)[shuffled])
    measure(SHUFFLED, column, ["clip_score"])
  if "vqa_score" in job.metrics:
    prompts = [first.lines[i]["prompt"] for i in shuffled]
    compute = functools.partial(_agreements, prompts=prompts)
    found = _in_parts(job, first.name, "agreements_shuffled", compute)
    measure(SHUFFLED, dataclasses.replace(first, agreements=found), ["vqa_score"])
  if job.protocol.task == "text":
    fields: dict[str, Any] = {"lines": [first.lines[i] for i in shuffled]}
    if first.candidates is not None:
      fields["candidates"] = [rng.permutation(row) for row in first.candidates]
    measure(SHUFFLED, dataclasses.replace(first, **fields), job.metrics)
  return result


def others(count: int, rng: np.random.Generator) -> np.ndarray:
  """Returns a random permutation of `count` > 1 indices that moves every index."""
  order, result = rng.permutation(count), np.empty(count, int)
  result[order] = np.roll(order, 1)
  return result

"""Measures a run with a protocol: generates samples, computes metrics and controls."""

# n examples.

from collections.abc import Sequence
import dataclasses
from typing import Any

from etils import epath
import jax
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.clip import huggingface
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.published import files
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import judged
from cm3leon_jax.evaluation.metrics import extractors
from cm3leon_jax.evaluation.protocols import inputs, metrics
from cm3leon_jax.evaluation.protocols import samples as samples_lib
from cm3leon_jax.evaluation.protocols.inputs import Job
from cm3leon_jax.evaluation.protocols.metrics import METRICS, ColumnSamples, measure
from cm3leon_jax.evaluation.protocols.protocol import HELDOUT, Protocol, digest, sampling_of
from cm3leon_jax.evaluation.protocols.results import RESULTS
from cm3leon_jax.files.json_files import plain, write_json
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import slug
from cm3leon_jax.run import initial
from cm3leon_jax.run import run as run_lib
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import table
from cm3leon_jax.version import VERSION

FOLDER = "evaluations"
# Fields of a protocol that do not affect its samples, so other values reuse the samples.
NOT_OF_SAMPLES = ("title", "name", "metrics", "extractor", "resolution", "published")
REAL, NOISE, SHUFFLED = "real images", "noise", "shuffled"  # Names of controls.


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user sets beside a protocol: the flags of `cm3leon evaluate`, and the config's judge.

  `metrics` and `examples` replace those of the protocol, unless they are () and None.
  """

  metrics: Sequence[str] = ()
  examples: int | None = None
  data: str | None = None
  extractor: str | None = None
  clip: str | None = None
  before: bool = False
  out: epath.PathLike | None = None
  allow_outside: bool = False
  judge: judged.Judge | None = None


def completed(protocol: Protocol, options: Options, settings: Settings) -> Protocol:
  """Checks a protocol. Returns it with the metrics and the number of examples of the options.

  Raises:
    UserError: a metric is unknown, does not fit the task or needs more examples; a field of a
      sampler is wrong; or a file is absent.
  """
  count = protocol.data.count if options.examples is None else options.examples
  data = dataclasses.replace(protocol.data, count=count)
  chosen = tuple(options.metrics or protocol.metrics)
  metrics.check(chosen, protocol.task, count)
  for column in protocol.columns:
    sampling_of(column, settings.sampling)
  if data.format != HELDOUT and options.data is not None:  # Report absent files before sampling.
    files.open_examples(data.format, options.data, data.split)
  return dataclasses.replace(protocol, data=data, metrics=chosen)


def run(trained: Run, name: str, protocol: Protocol, options: Options) -> tuple[Job, dict]:
  """Measures a run or bundle with a `completed` protocol, and writes its results.json.

  All processes call this function, with the mesh set. `name` is the name of the protocol. Returns
  (what was measured with, content of results.json).

  Raises:
    UserError: the data or the weights are wrong or absent.
  """
  job, about = _open(trained, name, protocol, options)
  extractor, scorer = (job.networks.get(need) for need in inputs.OF_IMAGES)
  result = {
    **about,
    "title": protocol.title,
    "protocol": dataclasses.asdict(protocol),
    "metrics": protocol.metrics,
    "examples": len(job.groups),
    "seed": protocol.seed,
    "extractor": extractor and {"name": extractor.name, **extractor.identity},
    "scorer": scorer and scorer.identity,
    "version": VERSION,
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    **_measured(job, trained.folder),
  }
  if distributed.is_first():
    write_json(job.folder / RESULTS, result)
  return job, plain(result)


def _open(
  trained: Run, name: str, protocol: Protocol, options: Options
) -> tuple[Job, dict[str, Any]]:
  """Loads the model, the data and the networks. Returns also fields of the result."""
  settings, chosen = trained.settings, protocol.metrics
  needs = {METRICS[metric].need for metric in chosen}
  networks, scorer = {}, None
  if "features" in needs:
    folders = settings.retrieval.clip, trained.stages
    networks["features"] = extractors.load(protocol.extractor, options.extractor, *folders)
  about: dict[str, Any] = {
    "name": name,
    "inputs": run_lib.ids(trained, _stages(settings, protocol, needs, options)),
  }
  if options.before:
    about["parameters"] = "before"
  params, step = _params(trained, options.before)
  own_clip = trained.clip if settings.retrieval.clip or "clip" in about["inputs"] else None
  if "embeddings" in needs:
    scorer = huggingface.HFCLIP.load(options.clip) if options.clip else trained.clip
    networks["embeddings"] = extractors.of_clip(scorer)
  batch_size = settings.evaluation.batch_size
  pipeline = Pipeline.load(trained, params, own_clip, batch_size=batch_size)
  evaluated = samples_lib.open_evaluated(
    protocol, pipeline, trained.folder, options.data, options.allow_outside
  )
  metrics.check(chosen, protocol.task, len(evaluated.examples))
  metrics.check_examples(chosen, evaluated.examples)
  if "verdicts" in needs and not (options.judge and all(evaluated.facts)):
    raise UserError(
      "metric 'judged' needs held-out documents with facts, and a judge: give a --config with "
      "config.evaluation.judge = FILE.py:FUNCTION."
    )
  about["data"] = evaluated.fingerprint()
  fields = dataclasses.asdict(protocol)
  samplings = [sampling_of(column, settings.sampling) for column in protocol.columns]
  of_samples = {
    **about,
    **{field: value for field, value in fields.items() if field not in NOT_OF_SAMPLES},
    "sampling": [dataclasses.asdict(one) for one in samplings],
  }
  root = epath.Path(trained.folder if options.out is None else options.out) / FOLDER
  of_results = digest([of_samples, fields, [network.identity for network in networks.values()]])
  job = Job(
    protocol=protocol,
    pipeline=pipeline,
    params=params,
    evaluated=evaluated,
    folder=root / f"{slug(name)}-{of_results[:8]}",
    samples=root / "samples" / f"{slug(name)}-{digest(of_samples)[:8]}",
    networks=networks,
    scorer=scorer,
    judge=options.judge,
  )
  return job, {**about, "step": step}


def _stages(settings: Settings, protocol: Protocol, needs: set[str], options: Options) -> list[str]:
  """Returns the stages whose files the evaluation reads."""
  read, retrieves = [*table.TOKENIZERS, "train"], any(c.retrieve for c in protocol.columns)
  if retrieves:
    read += ["documents", "neighbors"]
  # The neighbors of held-out pairs are stored. For other examples, CLIP must search.
  needs_clip = retrieves and protocol.data.format != HELDOUT
  needs_clip |= any(column.samples > 1 for column in protocol.columns)
  needs_clip |= "embeddings" in needs and options.clip is None
  needs_clip |= "features" in needs and protocol.extractor == "clip" and options.extractor is None
  return [*read, *(table.own_clip(settings) if needs_clip else [])]


def _params(trained: Run, before: bool) -> tuple[dict, int]:
  """Loads the newest or, if `before`, the first parameters of a run. Returns (parameters, step)."""
  if not before:
    return trained.params(dtype=trained.settings.model.dtype)
  start = initial.recorded(trained.folder)
  if start is None:
    raise UserError(
      f"--before is given, but the run in {trained.folder} began from random parameters."
    )
  return run_lib.load_initial(start, trained.settings), 0


def _measured(job: Job, workdir: epath.Path) -> dict:
  """Generates missing samples and computes all metrics.

  Returns {"columns": {name: {"retrieve", "sampling", "divergence", "metrics": {metric: {"value",
  ...}}}}, "controls": {control: {metric: {"value", ...}}}}.
  """
  tasks = samples_lib.tasks_of(job.protocol, job.evaluated, job.pipeline, workdir)
  samples_lib.generate(job.protocol, job.evaluated, tasks, job.pipeline, job.samples)
  shared: dict[str, Any] = {
    f"real_{need}": inputs.of_real_images(job, need)
    for need in job.needs
    if need in inputs.OF_IMAGES
  }
  if "embeddings" in job.needs:
    shared["captions"] = inputs.of_captions(job)
  result: dict = {"columns": {}, "controls": {}}
  for column in job.protocol.columns:
    found = {need: inputs.of_column(job, need, column.name) for need in job.needs}
    lines = samples_lib.read_lines(job.samples, column.name, len(job.groups))
    samples = _samples(job, lines=lines, examples=job.evaluated.examples, inputs=shared | found)
    apart = [line["divergence"] for line in lines if line["divergence"] is not None]
    result["columns"][column.name] = {
      "retrieve": column.retrieve,
      "sampling": dataclasses.asdict(sampling_of(column, job.pipeline.settings.sampling)),
      "divergence": float(np.mean(apart)) if apart else None,
      "metrics": {name: measure(name, samples) for name in job.protocol.metrics},
    }
    if not result["controls"]:
      result["controls"] = _controls(job, samples, column.name)
  return result


def _samples(job: Job, **fields: Any) -> ColumnSamples:
  num_resamples = job.pipeline.settings.evaluation.num_resamples
  rest = {"groups": job.groups, "seed": job.protocol.seed, "num_resamples": num_resamples}
  return ColumnSamples(**{**rest, **fields})


def _controls(job: Job, first: ColumnSamples, column: str) -> dict[str, dict]:
  """Measures controls: data for which a metric must be good, and data for which it must be bad.

  - Distances: between two halves of the real images, split by groups, which differ only by chance
    (good), and between noise and real images (bad).
  - CLIP scores: real images (good), and samples with the captions of other examples (bad).
  - Texts: the texts of other examples (bad), and candidates in random order (bad).

  `first` has the samples of the first column, named `column`.
  """
  rng = np.random.default_rng(job.protocol.seed)
  shuffled = others(len(job.groups), rng)
  chosen, given = job.protocol.metrics, first.inputs
  result: dict[str, dict] = {}

  def control(title: str, names: Sequence[str], samples: ColumnSamples) -> None:
    for name in names:
      if name in chosen and len(samples.groups) >= METRICS[name].least:
        result.setdefault(title, {})[name] = measure(name, samples)

  if "features" in job.needs:
    distances = [name for name in chosen if METRICS[name].need == "features"]
    groups, real = list(job.evaluated.images.values()), given["real_features"]
    unique = sorted(set(groups))
    half = set(rng.permutation(unique)[: len(unique) // 2])
    mask = np.array([group in half for group in groups])
    halves = {"features": real[mask], "real_features": real[~mask]}
    chosen_groups = [group for group, inside in zip(groups, mask) if inside]
    control(REAL, distances, _samples(job, groups=chosen_groups, inputs=halves))
    noise = {"features": inputs.of_noise(job, len(real)), "real_features": real}
    control(NOISE, distances, _samples(job, groups=groups, inputs=noise))
  if "embeddings" in job.needs:
    places = {path: i for i, path in enumerate(job.evaluated.images)}
    rows = [places[str(example.image)] for example in job.evaluated.examples]
    real = {"embeddings": given["real_embeddings"][rows], "captions": given["captions"]}
    control(REAL, ["clip_score"], _samples(job, inputs=real))
    other = {**given, "captions": given["captions"][shuffled]}
    control(SHUFFLED, ["clip_score"], _samples(job, inputs=other))
  if job.protocol.task == "text":
    orders = {"candidates": [rng.permutation(row) for row in given.get("candidates", ())]}
    lines = [first.lines[i] for i in shuffled]
    control(SHUFFLED, chosen, dataclasses.replace(first, lines=lines, inputs=orders))
  return result


def others(count: int, rng: np.random.Generator) -> np.ndarray:
  """Returns a random permutation of `count` > 1 indices that moves every index."""
  order, result = rng.permutation(count), np.empty(count, int)
  result[order] = np.roll(order, 1)
  return result

"""Runs protocols for `cm3leon evaluate --protocol`."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.commands.file_flags import results_folder
from cm3leon_jax.config import UserError
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.run import table

with epy.lazy_imports():
  from cm3leon_jax import distributed
  from cm3leon_jax.clip import huggingface, model
  from cm3leon_jax.data.published import files
  from cm3leon_jax.evaluation import judged
  from cm3leon_jax.evaluation.metrics import extractors
  from cm3leon_jax.evaluation.protocols import metrics, results, samples
  from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
  from cm3leon_jax.evaluation.protocols import run as run_lib
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.generation import tasks
  from cm3leon_jax.reports import evaluation_page
  from cm3leon_jax.run import initial
  from cm3leon_jax.run import run as trained_run

FOLDER = "evaluations"
# Fields of a protocol that do not affect its samples.
NOT_OF_SAMPLES = (
  "title", "name", "metrics", "extractor", "extractor_tensors", "resolution", "published"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """Values of the flags that override or complete a protocol, and the judge of the config.

  `weights` is the flag --extractor."""

  metrics: Sequence[str] = ()
  examples: int | None = None
  data: str | None = None
  weights: str | None = None
  clip: str | None = None
  before: bool = False
  out: str | None = None
  allow_outside: bool = False
  judge: judged.Judge | None = None


def run_all(settings: Settings, workdir: epath.Path, name: str, options: Options) -> None:
  """Checks all protocols of a file, and then measures a run or bundle with each of them."""
  # The settings of the command: those of `trained` may come from a bundle.
  options = dataclasses.replace(options, judge=judged.judge_of(settings))
  trained = trained_run.Run.open(workdir, settings)
  found = [_checked(protocol, options, trained.settings) for protocol in protocol_lib.load(name)]
  path = epath.Path(name)
  file = path.stem if path.suffix else name.partition("/")[0]
  for protocol in found:
    run(trained, file, protocol, options)


def _checked(
  protocol: protocol_lib.Protocol, options: Options, settings: Settings
) -> protocol_lib.Protocol:
  """Checks a protocol. Returns it with the number of examples that the options set.

  Raises:
    UserError: a metric is unknown, does not fit the task or needs more examples; a field of a
      sampler is wrong; or a file is absent.
  """
  if options.examples is not None:
    data = dataclasses.replace(protocol.data, count=options.examples)
    protocol = dataclasses.replace(protocol, data=data)
  names = options.metrics or protocol.metrics
  metrics.check(names, protocol.task, protocol.data.count)
  for column in protocol.columns:
    protocol_lib.sampling_of(column, settings.sampling)
  if protocol.data.format != protocol_lib.HELDOUT and options.data is not None:
    # Report absent files before sampling.
    files.open_examples(protocol.data.format, options.data, protocol.data.split)
  return protocol


def run(
  trained: trained_run.Run, name: str, protocol: protocol_lib.Protocol, options: Options
) -> tuple[epath.Path, dict]:
  """Measures a run or bundle with a protocol, and writes evaluations/NAME-HASH/.

  `name` is the name of the protocol's file. Returns (folder of the evaluation, content of its
  results.json).

  Raises:
    UserError: the protocol, a metric, the data or the weights are wrong or absent.
  """
  settings = trained.settings
  protocol = _checked(protocol, options, settings)
  names = tuple(options.metrics or protocol.metrics)
  needs = {need for n in names for need in metrics.METRICS[n].needs}
  extractor = None
  if "features" in needs:
    extractor = _extractor(protocol, settings, trained.stages, options.weights)
  read = _stages(settings, protocol, needs, options)
  about = {
    "name": "/".join(filter(None, [name, protocol.name])),
    "inputs": trained_run.ids(trained, read),
  }
  if options.before:
    about["parameters"] = "before"
  with common.use_mesh(settings):
    job, step = _make_run(trained, protocol, names, extractor, options, about)
    result = results.write(job, {**about, "step": step}, run_lib.run(job))
    if distributed.is_first():
      evaluation_page.write(job, result)
  distributed.print_once(results.describe(result))
  distributed.print_once(f"evaluate: results.json and report.html are in {job.folder}")
  return job.folder, result


def _stages(
  settings: Settings, protocol: protocol_lib.Protocol, needs: set[str], options: Options
) -> list[str]:
  read, retrieves = [*table.TOKENIZERS, "train"], any(c.retrieve for c in protocol.columns)
  if retrieves:
    read += ["documents", "neighbors"]
  # The neighbors of held-out pairs are stored. For other examples, CLIP must search.
  needs_clip = retrieves and protocol.data.format != protocol_lib.HELDOUT
  needs_clip |= any(column.samples > 1 for column in protocol.columns)
  needs_clip |= "embeddings" in needs and options.clip is None
  needs_clip |= "features" in needs and protocol.extractor == "clip" and options.weights is None
  return [*read, *(table.own_clip(settings) if needs_clip else [])]


def _params(trained: trained_run.Run, before: bool) -> tuple[dict, int]:
  """Loads the newest or, if `before`, the first parameters of a run. Returns (parameters, step)."""
  if not before:
    return trained.params()
  start = initial.start_of(trained.folder)
  if start is None:
    raise UserError(
      f"--before is given, but the run in {trained.folder} began from random parameters."
    )
  return trained_run.load_start(start, trained.settings), 0


def _scorer(
  names: tuple[str, ...], options: Options, own: model.CLIP | huggingface.HFCLIP | None
) -> model.CLIP | huggingface.HFCLIP | None:
  """Returns the CLIP model of --clip, or else of the run; None if no metric uses CLIP."""
  if not any("embeddings" in metrics.METRICS[name].needs for name in names):
    return None
  return huggingface.HFCLIP.load(options.clip) if options.clip else own


def _make_run(
  trained: trained_run.Run,
  protocol: protocol_lib.Protocol,
  names: tuple[str, ...],
  extractor: extractors.Extractor | None,
  options: Options,
  about: dict[str, Any],
) -> tuple[run_lib.ProtocolRun, int]:
  """Loads models and data for a protocol. Returns a `ProtocolRun` and the parameters' step."""
  settings = trained.settings
  params, step = _params(trained, options.before)
  own_clip = trained.clip if settings.retrieval.clip or "clip" in about["inputs"] else None
  scorer = _scorer(names, options, own_clip)
  pipeline = pipeline_lib.Pipeline.load(
    trained, params, own_clip, batch_size=settings.evaluation.batch_size
  )
  evaluated = samples.open_evaluated(
    protocol, pipeline, trained.folder, options.data, options.allow_outside
  )
  metrics.check(names, protocol.task, len(evaluated.examples))
  judges = options.judge is not None
  metrics.check_examples(names, evaluated.examples, evaluated.facts, judges)
  sampling = [protocol_lib.sampling_of(c, settings.sampling) for c in protocol.columns]
  # Samples do not depend on the metrics. Evaluations with other metrics can reuse the samples.
  of_samples = {
    **about,
    **{n: v for n, v in dataclasses.asdict(protocol).items() if n not in NOT_OF_SAMPLES},
    "sampling": [dataclasses.asdict(one) for one in sampling],
    "data": results.fingerprint(evaluated),
  }
  identity = {
    **of_samples,
    "protocol": dataclasses.asdict(protocol),
    "metrics": names,
    "extractor": extractor and extractor.identity,
    "scorer": scorer and extractors.clip_identity(scorer),
  }
  root, name = results_folder(trained, options.out) / FOLDER, tasks.slug(about["name"])
  job = run_lib.ProtocolRun(
    protocol=protocol,
    metrics=names,
    pipeline=pipeline,
    workdir=trained.folder,
    folder=root / f"{name}-{protocol_lib.digest(identity)[:8]}",
    samples=root / "samples" / f"{name}-{protocol_lib.digest(of_samples)[:8]}",
    evaluated=evaluated,
    extractor=extractor,
    scorer=scorer,
    scorer_identity=identity["scorer"],
    params=params,
    num_resamples=settings.evaluation.num_resamples,
    judge=options.judge,
  )
  return job, step


def _extractor(
  protocol: protocol_lib.Protocol, settings: Settings, workdir: epath.Path, weights: str | None
) -> extractors.Extractor:
  """Loads the feature extractor of a protocol. Raises UserError for absent or wrong weights."""
  network, _, resize = protocol.extractor.partition("_")
  if not network:
    raise UserError(
      "the protocol names no extractor, but distances need one: set its field extractor to clip, "
      "inception_tf1, inception_torch or dinov2."
    )
  if network == "clip":
    found = extractors.load_clip(weights or settings.retrieval.clip, workdir)
  elif weights is None:
    what = "a safetensors file" if network == "inception" else "a Hugging Face folder"
    raise UserError(
      f"the protocol's distances compare features of {network}: name {what} with its weights in "
      "--extractor."
    )
  elif network == "inception":
    # The check of the protocol's field guarantees a valid `resize`.
    found = extractors.load_inception(weights, resize)  # type: ignore[arg-type]
  else:
    found = extractors.load_dinov2(weights)
  tensors = found.identity["tensors"]
  if protocol.extractor_tensors not in ("", tensors):
    raise UserError(
      f"the weights of {weights or found.name} have the SHA-256 {tensors[:12]}..., but the "
      f"protocol requires {protocol.extractor_tensors[:12]}...: give the required weights."
    )
  return found

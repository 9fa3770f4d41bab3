"""Runs protocols for `cm3leon evaluate --protocol`, and compares two evaluations."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from etils import epath

from cm3leon_jax import distributed
from cm3leon_jax.commands import common, out_flag
from cm3leon_jax.config import UserError
from cm3leon_jax.runs import table

if TYPE_CHECKING:
  from cm3leon_jax.clip.huggingface import HFCLIP
  from cm3leon_jax.clip.model import CLIP
  from cm3leon_jax.evaluation.metrics.extractors import Extractor
  from cm3leon_jax.evaluation.protocols.protocol import Protocol
  from cm3leon_jax.evaluation.protocols.run import ProtocolRun
  from cm3leon_jax.settings import Settings
  from cm3leon_jax.trained.run import Run

FOLDER = "evaluations"
# Fields of a protocol that its samples do not depend on.
NOT_OF_SAMPLES = (
  "title", "name", "metrics", "extractor", "extractor_tensors", "resolution", "published"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command line adds to a protocol.

  Attributes:
    metrics: names that replace those of the protocol; none: its own.
    examples: number that replaces that of the protocol, or None.
    data: folder of evaluation files, or None.
    weights: file or folder of the extractor's weights, or None.
    clip: folder of a Hugging Face CLIP for scores, or None for that of the run.
    before: measure the parameters that the run began from.
    out: folder of the results, or None for the default of `out_flag`.
    allow_outside: whether evaluation files may name images that are not in `data`.
  """

  metrics: Sequence[str] = ()
  examples: int | None = None
  data: str | None = None
  weights: str | None = None
  clip: str | None = None
  before: bool = False
  out: str | None = None
  allow_outside: bool = False


def run_all(settings: Settings, workdir: epath.Path, name: str, options: Options) -> None:
  """Measures a run or bundle by all protocols of a file, after all of them were checked."""
  from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
  from cm3leon_jax.trained.run import Run

  trained = Run.open(workdir, settings)
  found = [_checked(protocol, options, trained.settings) for protocol in protocol_lib.load(name)]
  for protocol in found if trained.kind == "bundle" else ():
    _check_bundle(trained, protocol, options)
  path = epath.Path(name)
  file = path.stem if path.suffix else name.partition("/")[0]
  for protocol in found:
    run(trained, file, protocol, options)


def _check_bundle(trained: Run, protocol: Protocol, options: Options) -> None:
  """Raises UserError if a protocol asks for what a run alone has."""
  from cm3leon_jax.evaluation.protocols import protocol as protocol_lib

  name = trained.folder.name
  if protocol.data.format == protocol_lib.HELDOUT:
    raise UserError(
      f"{name} is a bundle, which has no held-out documents, and the protocol reads them: name a "
      "protocol that reads files, with --data=FOLDER, or in --workdir the workdir of a run."
    )
  if options.before:
    raise UserError(f"--before is given, and {name} is a bundle: name the workdir of its run.")
  if trained.bank is None and any(column.retrieve for column in protocol.columns):
    raise UserError(
      f"{name} is a bundle without a bank, and a column of the protocol retrieves documents: set "
      "retrieve to 0 in a copy of the protocol."
    )


def _checked(protocol: Protocol, options: Options, settings: Settings) -> Protocol:
  """Returns the protocol with the number of examples of the options.

  Raises:
    UserError: a metric is unknown or does not fit, its examples are too few, a field of a sampler
      or a published figure is wrong, a file is absent, or an option has no effect.
  """
  from cm3leon_jax.data.published.files import open_examples
  from cm3leon_jax.evaluation.protocols import metrics
  from cm3leon_jax.evaluation.protocols import protocol as protocol_lib

  if options.examples is not None:
    data = dataclasses.replace(protocol.data, count=options.examples)
    protocol = dataclasses.replace(protocol, data=data)
  names = options.metrics or protocol.metrics
  metrics.check(names, protocol.task, protocol.data.count)
  metrics.check_published(protocol.published, [column.name for column in protocol.columns])
  for column in protocol.columns:
    protocol_lib.sampling_of(column, settings.sampling)
  needs = {need for name in names for need in metrics.METRICS[name].needs}
  for flag, value, need in (
    ("extractor", options.weights, "features"),
    ("clip", options.clip, "embeddings"),
  ):
    if value is not None and need not in needs:
      raise UserError(f"--{flag} is given, and no metric of {', '.join(names)} reads it.")
  if protocol.data.format == protocol_lib.HELDOUT:
    if options.data is not None:
      raise UserError("--data is given, and the protocol reads the held-out pairs of the run.")
  elif options.data is not None:  # Absent files are found before anything is generated.
    open_examples(protocol.data.format, options.data, protocol.data.split)
  return protocol


def run(trained: Run, name: str, protocol: Protocol, options: Options) -> tuple[epath.Path, dict]:
  """Measures a run or bundle by a protocol; writes evaluations/NAME-HASH/.

  Args:
    trained: what is measured.
    name: of the file of the protocol, for the folder and the page.
    protocol: what is measured of it.
    options: of the command line.

  Returns:
    (folder of the evaluation, content of its results.json).

  Raises:
    UserError: the protocol, a metric, the data, or weights are wrong or absent.
  """
  from cm3leon_jax.evaluation.protocols import metrics, results
  from cm3leon_jax.evaluation.protocols import run as run_lib
  from cm3leon_jax.reports import evaluation_page
  from cm3leon_jax.trained.run import ids

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
    "inputs": ids(trained, read),
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


def _stages(settings: Settings, protocol: Protocol, needs: set[str], options: Options) -> list[str]:
  """Returns the stages of the run that are read."""
  from cm3leon_jax.evaluation.protocols import protocol as protocol_lib

  read, retrieves = [*table.TOKENIZERS, "train"], any(c.retrieve for c in protocol.columns)
  if retrieves:
    read += ["documents", "neighbors"]
  # Neighbors of held-out pairs are known, others are searched for by CLIP.
  needs_clip = retrieves and protocol.data.format != protocol_lib.HELDOUT
  needs_clip |= any(column.samples > 1 for column in protocol.columns)
  needs_clip |= "embeddings" in needs and options.clip is None
  needs_clip |= "features" in needs and protocol.extractor == "clip" and options.weights is None
  return [*read, *(table.own_clip(settings) if needs_clip else [])]


def _params(trained: Run, before: bool) -> tuple[dict, int]:
  """Loads the parameters of a run and their step, or those that it began from, step 0.

  Raises:
    UserError: it began from random ones.
  """
  from cm3leon_jax.trained import initial

  if not before:
    return trained.params()
  start = initial.start_of(trained.folder)
  if start is None:
    raise UserError(
      f"--before is given, and the run in {trained.folder} began from random parameters."
    )
  return initial.load(start, trained.settings), 0


def _scorer(
  names: tuple[str, ...], options: Options, own: CLIP | HFCLIP | None
) -> CLIP | HFCLIP | None:
  """Returns the CLIP that metrics read, that of --clip or the run's own; None: none reads it."""
  from cm3leon_jax.clip.huggingface import HFCLIP
  from cm3leon_jax.evaluation.protocols.metrics import METRICS

  if not any("embeddings" in METRICS[name].needs for name in names):
    return None
  return HFCLIP.load(options.clip) if options.clip else own


def _make_run(
  trained: Run,
  protocol: Protocol,
  names: tuple[str, ...],
  extractor: Extractor | None,
  options: Options,
  about: dict[str, Any],
) -> tuple[ProtocolRun, int]:
  """Loads what a protocol runs on; returns a `ProtocolRun` and the step of its parameters."""
  from cm3leon_jax.evaluation import world
  from cm3leon_jax.evaluation.metrics import extractors
  from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
  from cm3leon_jax.evaluation.protocols import results, samples
  from cm3leon_jax.evaluation.protocols.metrics import check, check_examples
  from cm3leon_jax.evaluation.protocols.run import ProtocolRun
  from cm3leon_jax.generation.pipeline import Pipeline
  from cm3leon_jax.generation.tasks import slug

  settings = trained.settings
  params, step = _params(trained, options.before)
  own_clip = trained.clip if settings.retrieval.clip or "clip" in about["inputs"] else None
  scorer = _scorer(names, options, own_clip)
  pipeline = Pipeline.load(trained, params, own_clip, batch_size=settings.evaluation.batch_size)
  evaluated = samples.open_evaluated(
    protocol, pipeline, trained.folder, options.data, options.allow_outside
  )
  check(names, protocol.task, len(evaluated.examples))
  check_examples(names, evaluated.examples, evaluated.facts)
  sampling = [protocol_lib.sampling_of(c, settings.sampling) for c in protocol.columns]
  # Samples do not depend on what is measured of them.
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
  root, name = out_flag.results_folder(trained, options.out) / FOLDER, slug(about["name"])
  job = ProtocolRun(
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
    judge=functools.partial(world.of_facts(settings).judge_images, settings=settings),
  )
  return job, step


def _extractor(
  protocol: Protocol, settings: Settings, workdir: epath.Path, weights: str | None
) -> Extractor:
  """Loads the extractor of a protocol.

  Raises:
    UserError: it names none, or the weights are absent, or those of another network.
  """
  from cm3leon_jax.evaluation.metrics import extractors

  network, _, resize = protocol.extractor.partition("_")
  if not network:
    raise UserError(
      "the protocol names no extractor, and distances need one: set its field extractor to clip, "
      "inception_tf1, inception_torch or dinov2."
    )
  if network == "clip":
    found = extractors.load_clip(weights or settings.retrieval.clip, workdir)
  elif weights is None:
    what = "a safetensors file" if network == "inception" else "a Hugging Face folder"
    raise UserError(
      f"distances of the protocol compare features of {network}: name {what} with its weights by "
      "--extractor."
    )
  elif network == "inception":
    found = extractors.load_inception(weights, resize)  # type: ignore[arg-type]  # Of its field.
  else:
    found = extractors.load_dinov2(weights)
  tensors = found.identity["tensors"]
  if protocol.extractor_tensors not in ("", tensors):
    raise UserError(
      f"the weights of {weights or found.name} have the SHA-256 {tensors[:12]}..., and the "
      f"protocol asks for {protocol.extractor_tensors[:12]}...: give the weights that it names."
    )
  return found


def compare(folders: list[str]) -> None:
  """Prints the differences between two evaluations, with paired intervals.

  Raises:
    UserError: there are not two, or they measured different things.
  """
  from cm3leon_jax.evaluation.protocols import compare as compare_lib

  if len(folders) != 2:
    raise UserError(f"--compare={','.join(folders)} must name two folders: --compare=A,B.")
  print(compare_lib.describe(compare_lib.compare(*map(epath.Path, folders))))

"""Runs protocols for `launch.evaluate --protocol`, and compares two evaluations."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import TYPE_CHECKING

from etils import epath

from cm3leon_jax import distributed, stages
from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError

if TYPE_CHECKING:
  from cm3leon_jax.evaluation.extractors import Extractor
  from cm3leon_jax.evaluation.protocols.protocol import Protocol

FOLDER = "evaluations"


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command line adds to a protocol.

  Attributes:
    metrics: names that replace those of the protocol; none: its own.
    examples: number that replaces that of the protocol, or None.
    data: folder of evaluation files, or None.
    weights: file or folder of the extractor's weights, or None.
    clip: folder of a Hugging Face CLIP for scores, or None for that of the run.
  """

  metrics: Sequence[str] = ()
  examples: int | None = None
  data: str | None = None
  weights: str | None = None
  clip: str | None = None


def run_all(settings, workdir, name: str, options: Options) -> None:
  """Measures a run by all protocols of a file, after all of them were checked."""
  from cm3leon_jax.evaluation.protocols import protocol as protocol_lib

  found = [_checked(protocol, options) for protocol in protocol_lib.load(name)]
  for protocol in found:
    run(settings, workdir, epath.Path(name.partition("/")[0]).stem, protocol, options)


def _checked(protocol: Protocol, options: Options) -> Protocol:
  """Returns the protocol with the number of examples of the options.

  Raises:
    UserError: a metric is unknown or does not fit, or its examples are too few.
  """
  from cm3leon_jax.evaluation.protocols import metrics

  if options.examples is not None:
    data = dataclasses.replace(protocol.data, count=options.examples)
    protocol = dataclasses.replace(protocol, data=data)
  metrics.check(options.metrics or protocol.metrics, protocol.task, protocol.data.count)
  return protocol


def run(
  settings, workdir, name: str, protocol: Protocol, options: Options
) -> tuple[epath.Path, dict]:
  """Measures a run by a protocol; writes evaluations/NAME-HASH/.

  Args:
    settings: of the run.
    workdir: of the run.
    name: of the file of the protocol, for the folder and the page.
    protocol: what is measured.
    options: of the command line.

  Returns:
    (folder of the evaluation, content of its results.json).

  Raises:
    UserError: the protocol, a metric, the data, or weights are wrong or absent.
  """
  from cm3leon_jax.evaluation import extractors
  from cm3leon_jax.evaluation.protocols import metrics, results, samples
  from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
  from cm3leon_jax.evaluation.protocols import run as run_lib
  from cm3leon_jax.generation.pipeline import Pipeline
  from cm3leon_jax.generation.tasks import slug
  from cm3leon_jax.reports import evaluation_page
  from cm3leon_jax.retrieval.bank import load_clip
  from cm3leon_jax.training import checkpoint

  protocol = _checked(protocol, options)
  names = tuple(options.metrics or protocol.metrics)
  needs = {need for n in names for need in metrics.METRICS[n].needs}
  extractor = None
  if "features" in needs:
    extractor = _extractor(protocol, settings, workdir, options.weights)
  read = [*stages.TOKENIZERS, "train", *stages.own_clip(settings)]
  if any(column.retrieve for column in protocol.columns):
    read += ["documents", "neighbors"]
  with common.use_mesh(settings):
    params, step = checkpoint.load_params(workdir / "train", settings.model)
    own_clip = load_clip(settings.retrieval.clip, workdir, settings.vocab)
    scorer, scorer_identity = None, None
    if "embeddings" in needs:
      scorer = load_clip(options.clip, workdir, settings.vocab) if options.clip else own_clip
      scorer_identity = extractors.clip_identity(scorer)
    size = settings.evaluation.batch_size
    pipeline = Pipeline.load(settings, workdir, params, own_clip, batch_size=size)
    evaluated = samples.open_evaluated(protocol, pipeline, workdir, options.data)
    about = {
      "name": "/".join(filter(None, [name, protocol.name])),
      "inputs": stages.ids(settings, workdir, dict.fromkeys(read)),
    }
    sampling = [protocol_lib.sampling_of(c, settings.sampling) for c in protocol.columns]
    asked = {"protocol": protocol, "sampling": sampling, "data": results.fingerprint(evaluated)}
    identity = protocol_lib.digest([about, {k: _fields(v) for k, v in asked.items()}])
    folder = epath.Path(workdir) / FOLDER / f"{slug(about['name'])}-{identity[:8]}"
    job = run_lib.Run(
      protocol,
      names,
      pipeline,
      epath.Path(workdir),
      folder,
      evaluated,
      extractor,
      scorer,
      scorer_identity,
      params,
      settings.evaluation.num_resamples,
    )
    measured = run_lib.run(job)
    result = results.write(job, {**about, "step": step}, measured)
    if distributed.is_first():
      evaluation_page.write(job, result)
  distributed.print_once(results.describe(result))
  distributed.print_once(f"evaluate: results.json and report.html are in {folder}")
  return folder, result


def _fields(value):
  """Returns the fields of a dataclass, or of each in a list, as plain values."""
  if isinstance(value, list):
    return [_fields(one) for one in value]
  return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _extractor(protocol: Protocol, settings, workdir, weights) -> Extractor:
  """Loads the extractor of a protocol."""
  from cm3leon_jax.evaluation import extractors

  network, _, resize = protocol.extractor.partition("_")
  if network == "clip":
    return extractors.load_clip(weights or settings.retrieval.clip, workdir)
  if not network:
    raise UserError("the protocol names no extractor, and its distances need one: set extractor.")
  if weights is None:
    raise UserError(
      f"distances of the protocol compare features of {network}: name its weights by --extractor, "
      "a safetensors file of Inception-v3 or a Hugging Face folder of DINOv2."
    )
  if network == "inception":
    return extractors.load_inception(weights, resize)
  return extractors.load_dinov2(weights)


def compare(folders: list[str]) -> None:
  """Prints the differences between two evaluations, with paired intervals.

  Raises:
    UserError: there are not two, or they measured different things.
  """
  from cm3leon_jax.evaluation.protocols import compare as compare_lib

  if len(folders) != 2:
    raise UserError(f"--compare names {len(folders)} folders; it must name two: --compare=A,B.")
  print(compare_lib.describe(compare_lib.compare(*map(epath.Path, folders))))

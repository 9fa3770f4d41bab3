"""Measures held-out pairs in bits per token, and judges generated images.

  cm3leon evaluate --workdir=workdir/scenes

The command writes the bits per image code and per text token, with and without neighbors, to
evaluation/metrics.json. Only the caption retrieves neighbors, as at inference. If the config has a
judge, it also judges images for held-out captions and writes evaluation/judged.*. --last_params
measures the last parameters instead of their average, and writes evaluation_last/.

  cm3leon evaluate --workdir=workdir/scenes --protocol=own.yaml
  cm3leon evaluate --workdir=scenes --protocol=own.yaml --data=FOLDER

A protocol defines what is measured and how. Its results go to results.json and report.html in
evaluations/NAME-HASH/. A protocol can also measure a bundle, given as a folder or the name of an
installed bundle. A bundle has no held-out documents, so the protocol must read files (--data). Its
results go to the current folder, or to --out. Without --config, the settings of the run or bundle
are used, but for their judge. docs/evaluation.md explains the details.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath, epy
from pydantic import NonNegativeInt

from cm3leon_jax.commands import common, flag, shared_flags
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import digest, digest_of_json
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  import jax

  from cm3leon_jax import distributed
  from cm3leon_jax.data.documents import store
  from cm3leon_jax.evaluation import judged
  from cm3leon_jax.evaluation.likelihood import bits
  from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
  from cm3leon_jax.evaluation.protocols import results
  from cm3leon_jax.evaluation.protocols import run as protocols
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.reports import evaluation_page
  from cm3leon_jax.retrieval import neighbors, removed
  from cm3leon_jax.run import run as run_lib
  from cm3leon_jax.run import source as source_lib

# Flags that need --protocol; all but --out are fields of `Options`.
OPTIONS = ("metrics", "examples", "data", "extractor", "clip", "before", "allow_outside")


@dataclasses.dataclass(frozen=True)
class Flags(shared_flags.Files, shared_flags.Sampling, shared_flags.Processes):
  last_params: bool = False
  """Measure the last parameters, not their average (optimizer.ema_decay); writes
  evaluation_last/."""
  protocol: str | None = None
  """Measure with a protocol: its name, or a YAML file (docs/evaluation.md)."""
  metrics: flag.Listed = ()
  """Metrics that replace the protocol's metrics."""
  examples: NonNegativeInt | None = None
  """Number of examples that replaces the protocol's number; 0: all. Only evaluations with the same
  number of examples can be compared."""
  data: str | None = None
  """Folder of the evaluation files and images that the protocol reads."""
  extractor: str | None = None
  """Weights of the network whose features the distances compare: a safetensors file of
  Inception-v3, or a Hugging Face folder of CLIP."""
  clip: str | None = None
  """Folder of a Hugging Face CLIP that scores images; default: the CLIP of the run."""
  before: bool = False
  """Measure the parameters before tuning, which the run started from with --init_from."""


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  for name in (*OPTIONS, "out"):
    if flags.protocol is None and getattr(flags, name) != getattr(Flags, name):
      raise UserError(f"--{name} is given without --protocol: add e.g. --protocol=own.yaml.")
  settings = flags.applied(settings)
  if flags.protocol is not None:
    _measure(settings, workdir, flags.protocol, flags)
    return
  if source_lib.Source.of(workdir).kind == "bundle":
    raise UserError(
      f"{workdir} is a bundle, which has no held-out documents: name a protocol and its examples, "
      "--protocol=FILE --data=FOLDER, or give the workdir of a run in --workdir."
    )
  if jax.distributed.is_initialized():
    raise UserError("cm3leon evaluate runs in several processes only with --protocol: add it.")
  inputs: dict[str, Any] = removed.identity(workdir / "neighbors")
  judge = judged.judge_of(settings) if settings.evaluation.captions else None
  if judge is not None:
    inputs["sampling"] = digest_of_json(dataclasses.asdict(settings.sampling))
    inputs["judge"] = digest(settings.evaluation.judge.rpartition(":")[0])
  elif given := [*flags.sampling]:
    raise UserError(
      f"--{given[0]} is given, but nothing is sampled: add --protocol, or a --config with a judge."
    )
  folder = workdir / ("evaluation_last" if flags.last_params else "evaluation")
  config = stages.run_config(settings, workdir, "evaluation", inputs)
  with stages.once(folder, config) as summary, common.use_mesh(settings):
    if summary is not None:
      run = run_lib.Run(workdir, settings)
      _evaluate(run, folder, summary, judge, not flags.last_params)


def _measure(settings: Settings, workdir: epath.Path, name: str, flags: Flags) -> None:
  """Checks all protocols of a file, and then measures a run or bundle with each of them."""
  trained = run_lib.Run.open(workdir, settings)
  judge = judged.judge_of(settings)  # Settings of the command: others may come from a bundle.
  given = {name: getattr(flags, name) for name in OPTIONS}
  options = protocols.Options(out=flags.results_folder(trained), judge=judge, **given)
  found = {
    name: protocols.completed(protocol, options, trained.settings)
    for name, protocol in protocol_lib.load(name).items()
  }
  with common.use_mesh(trained.settings):
    for name, protocol in found.items():
      job, result = protocols.run(trained, name, protocol, options)
      if distributed.is_first():
        evaluation_page.write(job, result)
      distributed.print_once(results.describe(result))
      distributed.print_once(f"evaluate: results.json and report.html are in {job.folder}")


def _evaluate(
  run: run_lib.Run, folder: epath.Path, summary: dict, judge: judged.Judge | None, average: bool
) -> None:
  """Measures bits per token and, with a judge, judges samples; fills `summary`."""
  settings, workdir = run.settings, run.folder
  config = settings.evaluation
  bits.check_batch(config)
  params, step = run.params(average=average, dtype=settings.model.dtype)
  if judge is not None:  # Prepare the samples first, so that an error ends the command early.
    pipeline = pipeline_lib.Pipeline.load(run, params, None, batch_size=config.batch_size)
    tasks = judged.heldout_captions(pipeline, workdir, config.guidance)
  documents = workdir / "documents"
  bank = store.Bank(documents, settings.vocab)
  heldout = store.DocumentStore(documents / "heldout_pairs", settings.vocab)
  ids = neighbors.load_neighbors(workdir / "neighbors", "heldout_pairs", True, bank=len(bank))
  sections = (settings.vocab, settings.data, config, settings.seed)
  metrics = bits.evaluate(params, settings.model, bank, heldout, ids, *sections)
  summary.update(step=step, **metrics)
  print(f"evaluate: {bits.describe(metrics)}", flush=True)
  if judge is not None:
    summary["judged"] = judged.evaluate(pipeline, tasks, judge, folder)
    print(judged.describe(summary["judged"]))
    print(f"evaluate: samples are in {folder / judged.SHEET}", flush=True)
  write_json(folder / "metrics.json", summary)


if __name__ == "__main__":
  common.run(main, Flags, config=None)

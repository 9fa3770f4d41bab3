"""Measures held-out pairs in bits per token, and judges or exports generated images.

  cm3leon evaluate --workdir=workdir/scenes
  cm3leon evaluate --workdir=workdir/scenes \\
    --export=geneval --prompts=evaluation_metadata.jsonl

The command writes the bits per image code and per text token, with and without neighbors, to
evaluation/metrics.json. Only the caption retrieves neighbors, as at inference. If the config has a
judge, it also judges images for held-out captions and writes evaluation/judged.*. --last_params
measures the last parameters instead of their average, and writes evaluation_last/. --export writes
images to geneval/NAME-HASH/, for the scripts of GenEval and GenEval 2.

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

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common, protocol_flags, sampling_flags
from cm3leon_jax.commands.file_flags import ALLOW_OUTSIDE, OUT
from cm3leon_jax.commands.prompt_flags import PROMPTS, SAMPLES
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import digest, digest_of_json
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.stages import stages, table

with epy.lazy_imports():
  import jax

  from cm3leon_jax.commands import evaluate_protocol
  from cm3leon_jax.data.documents import store
  from cm3leon_jax.evaluation import geneval, judged, strata
  from cm3leon_jax.evaluation.likelihood import bits
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.generation import tasks as tasks_lib
  from cm3leon_jax.retrieval import neighbors, removed
  from cm3leon_jax.run import bundles
  from cm3leon_jax.run import run as run_lib

_EXPORT = flags.DEFINE_enum(
  "export",
  None,
  ["geneval"],
  "Measure nothing; generate images for --prompts (default: held-out captions) in the folder "
  "layout that GenEval reads.",
)
_LAST_PARAMS = flags.DEFINE_bool(
  "last_params",
  False,
  "Measure the last parameters, not their average (optimizer.ema_decay); writes evaluation_last/.",
)
EXPORT_SAMPLES = 4  # The number of samples per prompt that GenEval uses.
# Flags that need --protocol, in the order of the fields of `evaluate_protocol.Options`.
PROTOCOL_OPTIONS = (*protocol_flags.OPTIONS, OUT, ALLOW_OUTSIDE)


def main(settings: Settings, workdir: epath.Path) -> None:
  for flag in (PROMPTS, SAMPLES):
    if _is_given(flag) and _EXPORT.value is None:
      raise UserError(f"--{flag.name} is given without --export: add --export=geneval.")
  for flag in PROTOCOL_OPTIONS:
    if _is_given(flag) and protocol_flags.PROTOCOL.value is None:
      raise UserError(f"--{flag.name} is given without --protocol: add e.g. --protocol=own.yaml.")
  settings = sampling_flags.applied(settings)
  compares, protocol = _is_given(protocol_flags.COMPARE), protocol_flags.PROTOCOL.value
  if compares or protocol is not None:
    if compares:
      evaluate_protocol.compare(protocol_flags.COMPARE.value)
      return
    options = evaluate_protocol.Options(*(flag.value for flag in PROTOCOL_OPTIONS))
    evaluate_protocol.run_all(settings, workdir, protocol, options)
    return

  if bundles.is_bundle(bundles.folder_of(workdir)):
    raise UserError(
      f"{workdir} is a bundle, which has no held-out documents: name a protocol and its examples, "
      "--protocol=FILE --data=FOLDER, or give the workdir of a run in --workdir."
    )
  if jax.distributed.is_initialized():
    raise UserError("cm3leon evaluate runs in several processes only with --protocol: add it.")
  if _EXPORT.value is not None:
    if _LAST_PARAMS.value:
      raise UserError("--export uses the average of the parameters: leave --last_params out.")
    _export(settings, workdir)
    return
  inputs: dict[str, Any] = removed.identity(workdir / "neighbors")
  judge = judged.judge_of(settings) if settings.evaluation.captions else None
  if judge is not None:
    inputs["sampling"] = digest_of_json(dataclasses.asdict(settings.sampling))
    inputs["judge"] = digest(settings.evaluation.judge.rpartition(":")[0])
  elif given := [*sampling_flags.given()]:
    raise UserError(
      f"--{given[0]} is given, but nothing is sampled: add --protocol or --export, or a --config "
      "with a judge."
    )
  folder = workdir / ("evaluation_last" if _LAST_PARAMS.value else "evaluation")
  config = stages.run_config(settings, workdir, "evaluation", inputs)
  with stages.once(folder, config) as summary, common.use_mesh(settings):
    if summary is not None:
      _evaluate(run_lib.Run(workdir, settings), folder, summary, judge)


def _evaluate(
  run: run_lib.Run, folder: epath.Path, summary: dict, judge: judged.Judge | None
) -> None:
  """Measures bits per token and, with a judge, judges samples; fills `summary`."""
  settings, workdir = run.settings, run.folder
  config = settings.evaluation
  bits.check_batch(config)
  params, step = run.params(average=not _LAST_PARAMS.value)
  if judge is not None:  # Prepare the samples first, so that an error ends the command early.
    pipeline = pipeline_lib.Pipeline.load(run, params, None, batch_size=config.batch_size)
    tasks = strata.heldout_captions(pipeline, workdir, config.guidance)
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


def _is_given(flag: flags.FlagHolder) -> bool:
  return not flags.FLAGS[flag.name].using_default_value


def _export(settings: Settings, workdir: epath.Path) -> None:
  """Generates images for prompts or held-out captions, in the folder layout that GenEval reads."""
  run = run_lib.Run(workdir, settings)
  config, path = settings.evaluation, PROMPTS.value
  samples = SAMPLES.value if _is_given(SAMPLES) else EXPORT_SAMPLES
  prompts = geneval.read_prompts(path) if path else []
  identity = _export_identity(settings, workdir, prompts, samples)
  stem = tasks_lib.slug(epath.Path(path).stem) if path else "heldout"
  folder = workdir / "geneval" / f"{stem}-{digest_of_json(identity)[:8]}"
  with stages.once(folder, identity) as summary, common.use_mesh(settings):
    if summary is not None:
      params, step = run.params()
      retrieves = prompts and config.neighbors
      clip = run.clip if retrieves else None
      pipeline = pipeline_lib.Pipeline.load(run, params, clip, batch_size=config.batch_size)
      if prompts:
        tasks = geneval.prompt_tasks(prompts, settings, path)
      else:
        tasks, prompts = _heldout_prompts(settings, workdir, pipeline)
      geneval.export(pipeline, folder, tasks, prompts, samples)
      summary.update(step=step, prompts=len(tasks), samples=samples)
  print(f"evaluate: images for GenEval in {folder}", flush=True)


def _heldout_prompts(
  settings: Settings, workdir: epath.Path, pipeline: pipeline_lib.Pipeline
) -> tuple[list, list[dict]]:
  """Returns the tasks for held-out captions, and the GenEval metadata of each task."""
  tasks = strata.heldout_captions(pipeline, workdir, [settings.sampling.guidance])
  return tasks, [geneval.metadata_of(task.prompt, task.document.facts) for task in tasks]


def _export_identity(
  settings: Settings, workdir: epath.Path, prompts: list[dict], samples: int
) -> dict:
  """Returns all values on which the images of an export depend."""
  config, read = settings.evaluation, [*table.TOKENIZERS, "train"]
  if not prompts or config.neighbors:
    read += ["documents", "neighbors", *table.own_clip(settings)]
  return {
    "inputs": run_lib.ids(run_lib.Run(workdir, settings), read),
    "sampling": dataclasses.asdict(settings.sampling),
    "prompts": digest_of_json(prompts),
    "samples": samples,
    "captions": config.captions,
    "neighbors": config.neighbors,
    "seed": settings.seed,
  }


if __name__ == "__main__":
  common.run(main, several_processes=True, config=None)

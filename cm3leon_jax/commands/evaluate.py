"""Measures held-out pairs in bits per token, and judges or exports generated images.

  cm3leon evaluate --workdir=workdir/scenes
  cm3leon evaluate --workdir=workdir/scenes \\
    --export=geneval --prompts=evaluation_metadata.jsonl

The command writes the bits per image code and per text token, with and without neighbors, to
evaluation/metrics.json. Only the caption retrieves neighbors, as at inference. For `scenes` it also
judges images for held-out captions and writes evaluation/scenes.*; the contact sheet compares them
with images of the bundled model, which has the same held-out scenes. --last_params measures the
last parameters instead of their average, and writes evaluation_last/. --export writes images to
geneval/NAME-HASH/, for the scripts of GenEval and GenEval 2.

  cm3leon evaluate --workdir=workdir/scenes --protocol=scenes
  cm3leon evaluate --workdir=scenes --protocol=own.yaml --data=FOLDER

A protocol defines what is measured and how. Its results go to results.json and report.html in
evaluations/NAME-HASH/. A protocol can also measure a bundle, given as a folder or the name of an
installed bundle. A bundle has no held-out documents, so the protocol must read files (--data). Its
results go to the current folder, or to --out. Without --config, the settings of the run or bundle
are used. docs/evaluation.md and docs/protocols.md explain the details.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common, protocol_flags
from cm3leon_jax.commands.file_flags import ALLOW_OUTSIDE, OUT
from cm3leon_jax.commands.prompt_flags import PROMPTS, SAMPLES
from cm3leon_jax.config import UserError
from cm3leon_jax.files.digests import digest, digest_of_json
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.runs import stages, table
from cm3leon_jax.settings import Settings

with epy.lazy_imports():
  import jax

  from cm3leon_jax import api
  from cm3leon_jax.commands import evaluate_protocol
  from cm3leon_jax.data.documents import store
  from cm3leon_jax.evaluation import geneval, strata
  from cm3leon_jax.evaluation import world as world_lib
  from cm3leon_jax.evaluation.likelihood import bits
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.generation import tasks as tasks_lib
  from cm3leon_jax.planning import programs
  from cm3leon_jax.retrieval import neighbors
  from cm3leon_jax.trained import bundles
  from cm3leon_jax.trained import run as run_lib

_EXPORT = flags.DEFINE_enum(
  "export",
  None,
  ["geneval"],
  "Measure nothing; generate images for --prompts (default: held-out scenes) in the folder layout "
  "that GenEval reads.",
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
      raise UserError(f"--{flag.name} is given without --protocol: add e.g. --protocol=scenes.")
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
    _export(settings, workdir)
    return
  inputs: dict[str, Any] = {}
  if settings.evaluation.scenes:
    inputs = {"sampling": digest_of_json(dataclasses.asdict(settings.sampling))}
    if world := world_lib.of_source(settings):
      inputs["bundled"] = digest(bundles.folder_of(world.bundled) / bundles.FILE)
  folder = workdir / ("evaluation_last" if _LAST_PARAMS.value else "evaluation")
  config = stages.run_config(settings, workdir, "evaluation", inputs)
  with stages.once(folder, config) as summary, common.use_mesh(settings):
    if summary is not None:
      _evaluate(run_lib.Run(workdir, settings), folder, summary)


def _evaluate(run: run_lib.Run, folder: epath.Path, summary: dict) -> None:
  """Measures bits per token and, if the config requests it, judges samples; fills `summary`."""
  settings, workdir = run.settings, run.folder
  config = settings.evaluation
  bits.check_batch(config)
  params, step = run.params(average=not _LAST_PARAMS.value)
  if config.scenes:  # Prepare the samples first, so that an error ends the command early.
    world = world_lib.of_facts(settings)
    world.check_installed()
    pipeline = pipeline_lib.Pipeline.load(run, params, None, batch_size=config.batch_size)
    tasks = strata.heldout_captions(pipeline, workdir, config.scene_guidance)
  documents = workdir / "documents"
  bank = store.Bank(documents, settings.vocab)
  heldout = store.DocumentStore(documents / "heldout_pairs", settings.vocab)
  ids = neighbors.load_neighbors(workdir / "neighbors", "heldout_pairs", True, bank=len(bank))
  sections = (settings.vocab, settings.data, config, settings.seed)
  metrics = bits.evaluate(params, settings.model, bank, heldout, ids, *sections)
  summary.update(step=step, **metrics)
  print(f"evaluate: {bits.describe(metrics)}", flush=True)
  if config.scenes:
    bundled = _load_bundled(settings)
    generate = functools.partial(_images_of, bundled, settings.seed) if bundled else None
    overview, text = world.evaluate(pipeline, tasks, workdir, folder, generate)
    summary[world.name] = overview
    if bundled:
      summary[world.name]["bundled"] |= _about(bundled, world)
    print(text)
    print(f"evaluate: samples are in {folder / f'{world.name}.png'}", flush=True)
  write_json(folder / "metrics.json", summary)


def _load_bundled(settings: Settings) -> api.CM3Leon | None:
  """Loads the bundled model of the run's world, or returns None if the data is not from a world.

  Whether a scene is held out depends only on the names in the scene, not on the run. The bundled
  model therefore never trained on the held-out scenes of this run.
  """
  world = world_lib.of_source(settings)
  return None if world is None else api.CM3Leon.load(world.bundled, batch_size=world.sheet_size)


def _images_of(model: api.CM3Leon, seed: int, captions: list[str]) -> list:
  """Generates an image for each caption, with the guidance and neighbors of the model's run."""
  return [sample.segments[0] for [sample] in model.generate(captions, seed=seed)]


def _about(model: api.CM3Leon, world: world_lib.World) -> dict:
  """Describes a bundled model: its sampling settings, its size and the cost of its training."""
  settings = model.pipeline.settings
  return {
    "guidance": settings.sampling.guidance,
    "neighbors": model.pipeline.usual_retrieve,
    "step": model.step,
    "parameters": programs.count_params(settings, model.mesh),
    **world.about(settings),
    **bundles.about(model.workdir),
  }


def _is_given(flag: flags.FlagHolder) -> bool:
  return not flags.FLAGS[flag.name].using_default_value


def _export(settings: Settings, workdir: epath.Path) -> None:
  """Generates images for prompts or held-out scenes, in the folder layout that GenEval reads."""
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
      retrieves = prompts and config.scene_neighbors
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
  world = world_lib.of_facts(settings)
  world.check_installed()
  tasks = strata.heldout_captions(pipeline, workdir, [settings.sampling.guidance])
  return tasks, [world.geneval_metadata(task) for task in tasks]


def _export_identity(
  settings: Settings, workdir: epath.Path, prompts: list[dict], samples: int
) -> dict:
  """Returns all values on which the images of an export depend."""
  config, read = settings.evaluation, [*table.TOKENIZERS, "train"]
  if not prompts or config.scene_neighbors:
    read += ["documents", "neighbors", *table.own_clip(settings)]
  return {
    "inputs": stages.ids(settings, workdir, read),
    "sampling": dataclasses.asdict(settings.sampling),
    "prompts": digest_of_json(prompts),
    "samples": samples,
    "scenes": config.scenes,
    "neighbors": config.scene_neighbors,
    "seed": settings.seed,
  }


if __name__ == "__main__":
  common.run(main, several_processes=True, config=None)

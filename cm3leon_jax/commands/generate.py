"""Generates images and texts for your prompts and images, or for held-out captions of a run.

  cm3leon generate --workdir=scenes --prompt="a red bell"
  cm3leon generate --workdir=scenes-instruct --task=caption --image=bell.png
  cm3leon generate --workdir=workdir/scenes --prompts=my.jsonl --samples=8 --rank
  cm3leon generate --config=examples/scenes/config.py --workdir=workdir/scenes \\
    --prompt="a green bell" --config.sampling.temperature=0.8

--workdir is the workdir of a run, the folder of a bundle, or the name of an installed bundle.
Without --config, the command uses the settings that are stored there. Results for prompts go to
prompts/NAME-HASH/, and results for held-out captions to samples/. Each folder contains a PNG file
for each image, contact_sheet.png and results.jsonl. The folders are in the workdir of a run, in the
current folder for a bundle, or in --out. docs/generating.md shows every task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import itertools

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common, program_cache, sampling_flags
from cm3leon_jax.commands.bank_flag import BANK, bank_of
from cm3leon_jax.commands.file_flags import ALLOW_OUTSIDE, OUT, results_folder
from cm3leon_jax.commands.prompt_flags import PROMPTS, SAMPLES
from cm3leon_jax.commands.retrieve_flag import RETRIEVE
from cm3leon_jax.config.settings import Settings, decoding_mesh
from cm3leon_jax.errors import UserError, printable
from cm3leon_jax.files.digests import digest_of_json
from cm3leon_jax.mesh import MeshConfig
from cm3leon_jax.stages import stages, table

with epy.lazy_imports():
  import jax

  from cm3leon_jax.config import sampling as sampling_lib
  from cm3leon_jax.generation import document_effects, explanation, lookalikes, prompt_file
  from cm3leon_jax.generation import heldout as heldout_lib
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.generation import tasks as tasks_lib
  from cm3leon_jax.generation import writer as writer_lib
  from cm3leon_jax.reports import summary as summary_lib
  from cm3leon_jax.retrieval import lexical, removed
  from cm3leon_jax.run import run


MOST_CAPTIONS = 16  # Default of --captions; fewer if fewer pairs are held out.
# These are literals, because the flags are checked before JAX is imported.
DTYPES = ("compute", "int8")
TASKS = {  # With the inputs that they need.
  "text_to_image": ("prompt",),
  "infill_image": ("image",),
  "edit": ("image", "prompt"),
  "instruct": ("prompt",),
  "unconditional": (),
  "caption": ("image",),
  "question": ("prompt", "image"),
  "infill_text": ("prompt",),
  "interleaved": (),
}
_TASK = flags.DEFINE_enum(
  "task",
  "text_to_image",
  [*TASKS],
  "What to do with a prompt or an image, e.g. caption or edit; docs/generating.md lists all tasks.",
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Prompt text; may be given several times.")
_IMAGE = flags.DEFINE_multi_string(
  "image", [], "Image file: one for each --prompt, or one for all prompts."
)
_BOX = flags.DEFINE_list(
  "box", None, "Box of infill_image: left,top,right,bottom in pixels of the model's resolution."
)
_LENGTH = flags.DEFINE_integer(
  "length", 0, "Largest number of tokens in a text (default: 64) or an interleaved document."
)
_CAPTIONS = flags.DEFINE_integer(
  "captions",
  None,
  "Number of held-out captions, if no prompt or image is given (default: 16, or all if fewer).",
  lower_bound=1,
)
_RANK = flags.DEFINE_bool(
  "rank", False, "Order the samples of each prompt by CLIP score, best first."
)
_GUIDANCE = flags.DEFINE_list(
  "guidance",
  None,
  "Guidance weights, e.g. 1,3,5 (default: 1 and the config's weight; with --prompt only the "
  "config's weight).",
)
_KEEP = flags.DEFINE_bool(
  "keep_neighbors", False, "Keep the retrieved documents in the unconditional stream of guidance."
)
_EXPLAIN = flags.DEFINE_bool(
  "explain", False, "Write images of what each retrieved document made more likely."
)
_WITHOUT = flags.DEFINE_multi_string(
  "without", [], "Key of a document not to retrieve; the command prints which samples change."
)
_SEED = flags.DEFINE_integer(
  "seed",
  None,
  "Seed of the first prompt; each further prompt adds 1.",
  0,
  2**31,
  allow_override=True,
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16, "Number of samples that are generated together.", lower_bound=1
)
_WEIGHT_DTYPE = flags.DEFINE_enum(
  "weight_dtype", "compute", DTYPES, "Dtype of the model's matrices."
)
_CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", "compute", DTYPES, "Dtype of the cache entries.")

MOST_TEXTS = 16  # Number of texts that are printed; results.jsonl has all texts.


def _numbers(
  flag: flags.FlagHolder, default: list, kind: Callable[[str], float], least: float
) -> list:
  """Returns the distinct values of a list flag. Raises UserError for a wrong value."""
  try:
    values = default if flag.value is None else [kind(v) for v in flag.value]
  except ValueError as error:
    raise UserError(
      f"--{flag.name} is '{','.join(flag.value)}'; it must be numbers, like {default[0]} or 1,3."
    ) from error
  if not values or any(not least <= v < float("inf") for v in values):
    raise UserError(
      f"--{flag.name} is {values}; it must be one or more finite numbers of at least {least}."
    )
  return list(dict.fromkeys(values))


def _check_flags() -> None:
  """Checks the flags whose values need no model, before the slow imports."""
  _numbers(_GUIDANCE, [1.0], float, 0)
  _numbers(RETRIEVE, [0], int, 0)
  sampling_flags.given()
  name = _TASK.value
  for needed in TASKS[name] if PROMPTS.value is None and name != "text_to_image" else ():
    if not flags.FLAGS[needed].value:
      raise UserError(f"task {name} needs --{needed}, but it is not given.")


def _check_settings(cls: type[tasks_lib.Task], tasks: Sequence[tasks_lib.Task]) -> None:
  """Raises UserError if a flag sets a field of config.sampling that the tasks do not use."""
  unread = {field for task in tasks for field in task.unread_settings()}
  for name in [*sampling_flags.given(), *["guidance"] * (_GUIDANCE.value is not None)]:
    if name not in cls.settings or name in unread:
      raise UserError(
        f"--{name} is given, but task {cls.name} does not use it here; it can use "
        f"{', '.join(field for field in cls.settings if field not in unread)}."
      )


def _columns(settings: Settings, guidance: list, retrieve: list) -> list[tuple]:
  """Returns (number of retrieved documents, sampling settings) for each combination of values."""
  guidances = _numbers(_GUIDANCE, guidance, float, 0)
  retrieves = _numbers(RETRIEVE, retrieve, int, 0)
  return [
    (n, dataclasses.replace(settings.sampling, guidance=g))
    for n, g in itertools.product(retrieves, guidances)
  ]


def _own_tasks(trained: run.Run, seed: int) -> list[tasks_lib.Task]:
  """Returns the tasks that flags describe, or [] for held-out captions. Checks these flags."""
  settings = trained.settings
  fields = {name: flags.FLAGS[name].value for name in ("prompt", "image", "box", "length")}
  given = [name for name, value in fields.items() if value]
  name, path = _TASK.value, PROMPTS.value
  if path is None and not given and name == "text_to_image":
    return []
  cls = prompt_file.task_class(name)
  has_bank = trained.bank or BANK.value
  neighbors = settings.data.num_neighbors if has_bank else 0
  retrieve = min(cls.retrieve, neighbors)
  columns = _columns(settings, [settings.sampling.guidance], [retrieve])
  if len(columns) > 1 and (path is not None or name != "text_to_image"):
    raise UserError(
      "--guidance or --retrieve has several values: only a --prompt of text_to_image, and held-out "
      "captions, accept several values."
    )
  retrieve, sampling = columns[0]
  common_fields = {"length": _LENGTH.value, "keep_neighbors": _KEEP.value}
  if path is not None:
    if set(given) - {"length"}:
      raise UserError(
        f"--prompts and --{given[0]} are given: define tasks in the file or on the command line."
      )
    common_fields |= {"retrieve": retrieve} if RETRIEVE.value else {}
    allowed = ALLOW_OUTSIDE.value
    return prompt_file.read(path, name, seed, sampling, allowed, neighbors, **common_fields)
  try:
    common_fields["box"] = tuple(int(x) for x in _BOX.value or ())
  except ValueError as error:
    raise UserError(
      f"--box is '{','.join(_BOX.value)}'; it must be four whole numbers: left,top,right,bottom."
    ) from error
  pairs = prompt_file.pair(_PROMPT.value, _IMAGE.value)
  tasks = [
    prompt_file.make_task(
      name, {**common_fields, **pair, "retrieve": n}, seed=seed + row, row=row, sampling=sampling
    )
    for n, sampling in columns
    for row, pair in enumerate(pairs)
  ]
  _check_settings(cls, tasks)
  return tasks


def _needs_clip(tasks: Sequence[tasks_lib.Task]) -> bool:
  return not tasks or any(task.retrieve or task.is_scored for task in tasks)


def _identity(
  trained: run.Run,
  source: run.Run | None,
  tasks: Sequence[tasks_lib.Task],
  columns: Sequence[tuple[int, sampling_lib.SamplingConfig]],
  seed: int,
) -> dict:
  """Returns all values on which the samples depend. Checks that required stages are finished."""
  settings = trained.settings
  retrieves = not tasks or any(task.retrieve for task in tasks)
  read = [*table.TOKENIZERS, "train"]
  read += table.own_clip(settings) if _needs_clip(tasks) else ()
  inputs = run.ids(trained, read)
  if retrieves:
    inputs |= run.ids(source or trained, ["documents", "neighbors"])
  same = ("samples", "rank", "keep_neighbors", "weight_dtype", "cache_dtype")
  config = {"inputs": inputs, **table.identity(settings, "samples")}
  config |= {name: flags.FLAGS[name].value for name in same}
  config |= {flag.name: flag.value for flag in (_EXPLAIN, _WITHOUT) if flag.value}
  if tasks:
    return {**config, "tasks": [task.identity() for task in tasks]}
  return {
    **config,
    "sampling": dataclasses.asdict(settings.sampling),
    "captions": _CAPTIONS.value or MOST_CAPTIONS,
    "seed": seed,
    "guidance": list(dict.fromkeys(sampling.guidance for _, sampling in columns)),
    "retrieve": list(dict.fromkeys(retrieve for retrieve, _ in columns)),
  }


def _folder(root: epath.Path, tasks: Sequence[tasks_lib.Task], config: dict) -> epath.Path:
  """Returns the folder of the samples. Each set of prompts and settings has a separate folder."""
  if not tasks:
    return root / "samples"
  digest = digest_of_json(config)[:8]
  for folder in sorted((root / "prompts").glob(f"*-{digest}")):
    return folder  # The folder keeps its name if the prompt file is renamed.
  name = epath.Path(PROMPTS.value).stem if PROMPTS.value else tasks[0].prompt or tasks[0].name
  return root / "prompts" / f"{tasks_lib.slug(name)}-{digest}"


def _print_results(records: Sequence[dict], scores: Sequence[dict]) -> None:
  texts = [record for record in records if record.get("text")]
  for record in texts[:MOST_TEXTS]:
    # Generated texts and prompts may contain control characters.
    asked = [record["image"], record["prompt"]] if record["image"] else [record["prompt"]]
    shown = [text for text in asked if text] or [record["task"]]
    print(": ".join(" ".join(printable(text).split()) for text in [*shown, record["text"]]))
  if len(texts) > MOST_TEXTS:
    print(f"generate: results.jsonl has {len(texts) - MOST_TEXTS} more texts.")
  # Held-out documents have keys, and their captions are concepts. Prompts of users have no keys.
  noun = "concept" if records[0]["key"] else "prompt"
  for row in scores:
    print(summary_lib.describe_clip_score(row, noun))


def _check_heldout(trained: run.Run, tasks: Sequence[tasks_lib.Task]) -> None:
  if trained.kind == "bundle" and not tasks:
    raise UserError(
      f"{trained.folder.name} is a bundle, which has no held-out captions: give a prompt, "
      '--prompt="a red bell", or the workdir of a run in --workdir.'
    )


def _check_documents(tasks: Sequence, columns: Sequence, bank: epath.Path | None) -> None:
  """Raises UserError if --explain or --without does not fit the tasks or the bank."""
  retrieves = any([task.retrieve for task in tasks] or [count for count, _ in columns])
  if _EXPLAIN.value and not (retrieves and all(task.name == "text_to_image" for task in tasks)):
    raise UserError(f"--explain is given, but {explanation.REFUSED}")
  if _WITHOUT.value and not (tasks and bank and retrieves):
    raise UserError("--without is given, but no prompt retrieves documents: set --retrieve.")
  if _WITHOUT.value and bank:
    removed.rows(bank / "neighbors", _WITHOUT.value)


def _warn_of_unknown_words(trained: run.Run, tasks: Sequence[tasks_lib.Task]) -> None:
  """Prints the prompts for images without any word that a caption of the run has, if it counted."""
  folder, config = trained.stages / "neighbors", trained.settings.retrieval
  if not (folder / lexical.FILE).exists():
    return
  counted = lexical.load(folder, config.lexical_weight, config.lexical_width)
  captions = [task.prompt for task in tasks if task.is_scored and task.prompt]
  if unknown := [prompt for prompt in captions if not counted.knows(prompt)]:
    shown = "; ".join(printable(prompt) for prompt in dict.fromkeys(unknown))
    print(f"warning: no caption that the model learned has any word of: {shown}.", flush=True)


def _digests(given: dict) -> dict[str, str]:
  """Maps "path, crop" of each input image to the SHA-256 of its pixels."""
  return {
    f"{image}, crop {crop}": hashlib.sha256(pixels.tobytes()).hexdigest()
    for (image, crop), pixels in given.items()
  }


def main(settings: Settings, workdir: epath.Path) -> None:
  seed = settings.seed if _SEED.value is None else _SEED.value
  trained = run.Run.open(workdir, sampling_flags.applied(settings))
  settings = trained.settings
  tasks = _own_tasks(trained, seed)
  _check_heldout(trained, tasks)
  usual = [1.0, settings.sampling.guidance], [0, settings.data.num_neighbors]
  columns = [] if tasks else _columns(settings, *usual)
  source = bank_of(trained)
  config = _identity(trained, source, tasks, columns, seed)
  bank = source.bank if source else None
  _check_documents(tasks, columns, bank)
  layout = tasks_lib.PromptLayout.of(trained)
  given = pipeline_lib.check_tasks(layout, tasks, bank)
  if given:
    config["images"] = _digests(given)
  folder = _folder(results_folder(trained, OUT.value), tasks, config)
  if settings.mesh == MeshConfig():
    chosen = decoding_mesh(settings.model, jax.devices())
    settings = dataclasses.replace(settings, mesh=chosen)
  _warn_of_unknown_words(trained, tasks)
  with program_cache.kept(), stages.once(folder, config) as summary, common.use_mesh(settings):
    if summary is not None:
      clip = trained.clip if _needs_clip(tasks) else None
      params, step = trained.params()
      names = ("batch_size", "weight_dtype", "cache_dtype")
      options = {name: flags.FLAGS[name].value for name in names}
      pipeline = pipeline_lib.Pipeline.load(trained, params, clip, bank, **options)
      tasks = tasks or [*heldout_lib.heldout_tasks(
        layout, trained.folder, _CAPTIONS.value or MOST_CAPTIONS, seed, columns, _KEEP.value,
        pipeline.image_tokenizer,
      )]  # fmt: skip
      writer = writer_lib.Writer(folder, SAMPLES.value)
      drawing = pipeline.without(_WITHOUT.value) if _WITHOUT.value else pipeline
      samples = drawing.generate(
        tasks, SAMPLES.value, _RANK.value, given, writer.save_images, show_progress=True
      )
      records = writer.finish(samples)
      scores = summary_lib.clip_scores(
        [record for record in records if record["task"] == "text_to_image"]
      )
      alike = lookalikes.count([*itertools.chain(*samples)], settings.vocab)
      summary.update(step=step, samples=len(records), clip_score=scores, lookalikes=alike)
      _print_results(records, scores)
      if len(records) > 1 and alike:
        print(f"generate: {lookalikes.describe(alike)}")
      if apart := [r["divergence"] for r in records if r["divergence"] is not None]:
        summary["divergence"] = sum(apart) / len(apart)
      if _EXPLAIN.value:
        document_effects.explain(writer, samples)
      if _WITHOUT.value:
        summary["changed"] = document_effects.compare(pipeline, _WITHOUT.value, tasks, samples)
  print(f"generate: results in {folder}, overview in {folder / 'contact_sheet.png'}.", flush=True)


if __name__ == "__main__":
  common.run(main, config=None, check=_check_flags)

"""Draws samples for generate and explain: common flags, tasks, results, and what is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
from typing import Annotated, Any

from etils import epy
from pydantic import Field, PositiveInt

from cm3leon_jax.commands import common, flag, shared_flags
from cm3leon_jax.config.settings import Settings, decoding_mesh
from cm3leon_jax.errors import UserError, printable
from cm3leon_jax.mesh import MeshConfig
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  import jax

  from cm3leon_jax.files import programs
  from cm3leon_jax.generation import lookalikes, prompt_file
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.generation import sample as sample_lib
  from cm3leon_jax.generation import tasks as tasks_lib
  from cm3leon_jax.generation import writer as writer_lib
  from cm3leon_jax.reports import summary as summary_lib
  from cm3leon_jax.retrieval import lexical
  from cm3leon_jax.run import run

MOST_TEXTS = 16  # Number of texts that are printed; results.jsonl has all texts.


@dataclasses.dataclass(frozen=True)
class Flags(
  shared_flags.Files, shared_flags.Retrieve, shared_flags.Sampling, shared_flags.Programs
):
  prompt: flag.Several = ()
  """Prompt text; may be given several times."""
  prompts: str | None = None
  """JSONL file with one prompt per line, see docs/generating.md."""
  samples: PositiveInt = 1
  """Samples per prompt."""
  bank: str | None = None
  """Another workdir, or a bundle, with the same tokenizers and CLIP, from which a --prompt
  retrieves documents."""
  guidance: flag.Listed | None = None
  """Guidance weights, e.g. 1,3,5 (default: 1 and the config's weight; with --prompt only the
  config's weight)."""
  keep_neighbors: bool = False
  """Keep the retrieved documents in the unconditional stream of guidance."""
  seed: Annotated[int, Field(ge=0, le=2**31)] | None = None
  """Seed of the first prompt; each further prompt adds 1."""
  batch_size: PositiveInt = 16
  """Number of samples that are generated together."""

  def check(self) -> None:
    """Checks the flags whose values need no model."""
    self.numbers("guidance", [1.0], 0)
    self.numbers("retrieve", [0], 0)
    self.check_sampling()

  def numbers(self, name: str, default: list, least: float) -> list:
    """Returns the distinct values of a list flag. Raises UserError for a wrong value."""
    given = getattr(self, name)
    try:
      values = default if given is None else [type(default[0])(value) for value in given]
    except ValueError as error:
      raise UserError(
        f"--{name} is '{','.join(given)}'; it must be numbers, like {default[0]} or 1,3."
      ) from error
    if not values or any(not least <= value < float("inf") for value in values):
      raise UserError(
        f"--{name} is {values}; it must be one or more finite numbers of at least {least}."
      )
    return list(dict.fromkeys(values))

  def columns(self, settings: Settings, guidance: list[float], retrieve: list[int]) -> list[tuple]:
    """Returns (number of retrieved documents, sampling settings) for each combination of values."""
    guidances = self.numbers("guidance", guidance, 0)
    retrieves = self.numbers("retrieve", retrieve, 0)
    return [
      (n, dataclasses.replace(settings.sampling, guidance=g))
      for n, g in itertools.product(retrieves, guidances)
    ]


def asked_tasks(
  trained: run.Run, flags: Flags, seed: int, name: str = "text_to_image", **fields: Any
) -> list[tasks_lib.Task]:
  """Returns the tasks that flags describe, or [] for held-out captions. Checks these flags.

  `fields` are the other flags of the task, `image` (a path for each prompt), `box` and `length`.
  """
  settings, path = trained.settings, flags.prompts
  given = [field for field, value in {"prompt": flags.prompt, **fields}.items() if value]
  if path is None and not given and name == "text_to_image":
    return []
  cls = prompt_file.task_class(name)
  neighbors = settings.data.num_neighbors if trained.bank or flags.bank else 0
  columns = flags.columns(settings, [settings.sampling.guidance], [min(cls.retrieve, neighbors)])
  if len(columns) > 1 and (path is not None or name != "text_to_image"):
    raise UserError(
      "--guidance or --retrieve has several values: only a --prompt of text_to_image, and held-out "
      "captions, accept several values."
    )
  more = {"length": fields.get("length", 0), "keep_neighbors": flags.keep_neighbors}
  if path is not None:
    if set(given) - {"length"}:
      raise UserError(
        f"--prompts and --{given[0]} are given: define tasks in the file or on the command line."
      )
    retrieve, sampling = columns[0]
    more |= {"retrieve": retrieve} if flags.retrieve else {}
    return prompt_file.read(path, name, seed, sampling, flags.allow_outside, neighbors, **more)
  try:
    more["box"] = tuple(int(x) for x in fields.get("box") or ())
  except ValueError as error:
    raise UserError(
      f"--box is '{','.join(fields['box'])}'; it must be four whole numbers: left,top,right,bottom."
    ) from error
  tasks = [
    prompt_file.make_task(
      name, {**more, **pair, "retrieve": n}, seed=seed + row, row=row, sampling=sampling
    )
    for n, sampling in columns
    for row, pair in enumerate(prompt_file.pair(flags.prompt, fields.get("image", ())))
  ]
  _check_settings(flags, tasks)
  return tasks


def _check_settings(flags: Flags, tasks: Sequence[tasks_lib.Task]) -> None:
  """Raises UserError if a flag sets a field of config.sampling that the tasks do not use."""
  unread, used = {field for task in tasks for field in task.unread_settings()}, tasks[0].settings
  for name in [*flags.sampling, *["guidance"] * (flags.guidance is not None)]:
    if name not in used or name in unread:
      raise UserError(
        f"--{name} is given, but task {tasks[0].name} does not use it here; it can use "
        f"{', '.join(field for field in used if field not in unread)}."
      )


def draw(
  trained: run.Run,
  flags: Flags,
  tasks: Sequence[tasks_lib.Task],
  source: run.Run | None,
  identity: Mapping[str, Any],
  make_tasks: Callable[..., Sequence[tasks_lib.Task]] = lambda *_: (),
  after: Callable[..., dict] = lambda *_: {},
  command: str = "generate",
) -> None:
  """Draws samples of tasks into their folder, unless it has them already, and prints results.

  Args:
    source: the run whose documents are retrieved, see `retrieved.bank_of`.
    identity: values on which the samples depend, beside those of `flags` and `tasks`.
    make_tasks: called as `make_tasks(layout, pipeline)` if there are no `tasks`.
    after: called as `after(pipeline, tasks, writer, samples)`; returns more for the summary.
    command: its name, for what is printed.
  """
  settings, bank = trained.settings, source.bank if source else None
  names = ("samples", "keep_neighbors", "weight_dtype", "cache_dtype")
  values = {name: getattr(flags, name) for name in names} | {"rank": False, **identity}
  values = writer_lib.identity(trained, source, tasks, values)
  layout = tasks_lib.PromptLayout.of(trained)
  if given := pipeline_lib.check_tasks(layout, tasks, bank):
    values["images"] = writer_lib.digests(given)
  folder = writer_lib.folder_of(flags.results_folder(trained), tasks, values, flags.prompts)
  if settings.mesh == MeshConfig():
    chosen = decoding_mesh(settings.model, jax.devices())
    settings = dataclasses.replace(settings, mesh=chosen)
  _warn_of_unknown_words(trained, tasks)
  with (
    programs.kept(flags.cache_dir),
    stages.once(folder, values) as summary,
    common.use_mesh(settings),
  ):
    if summary is not None:
      clip = trained.clip if writer_lib.needs_clip(trained, tasks) else None
      params, step = trained.params(dtype=settings.model.dtype)
      options = {name: getattr(flags, name) for name in ("batch_size", *names[2:])}
      pipeline = pipeline_lib.Pipeline.load(trained, params, clip, bank, **options)
      del params  # The pipeline has a copy for decoding.
      tasks = tasks or make_tasks(layout, pipeline)
      writer = writer_lib.Writer(folder, flags.samples)
      drawing = pipeline.without(values["without"]) if values.get("without") else pipeline
      samples = drawing.generate(
        tasks, flags.samples, values["rank"], given, writer.save_images, show_progress=True
      )
      summary.update(step=step, **_finish(writer, samples, settings))
      summary.update(after(pipeline, tasks, writer, samples))
  print(f"{command}: results in {folder}, overview in {folder / 'contact_sheet.png'}.", flush=True)


def _finish(
  writer: writer_lib.Writer, samples: Sequence[Sequence[sample_lib.Sample]], settings: Settings
) -> dict[str, Any]:
  """Writes and prints the results. Returns their numbers."""
  records = writer.finish(samples)
  scored = [r for r in records if r["task"] == "text_to_image" and r["clip_score"] is not None]
  scores = summary_lib.clip_scores(scored)
  alike = lookalikes.count([*itertools.chain(*samples)], settings.vocab)
  numbers = {"samples": len(records), "clip_score": scores, "lookalikes": alike}
  _print_results(records, scores)
  if len(records) > 1 and alike:
    print(f"generate: {lookalikes.describe(alike)}")
  if apart := [r["divergence"] for r in records if r["divergence"] is not None]:
    numbers["divergence"] = sum(apart) / len(apart)
  return numbers


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

"""Grades answers to held-out instructions exactly, by facts of scenes, before and after tuning.

  python -m examples.scenes.grade --config=examples/scenes/instruct.py \\
    --workdir=workdir/scenes_instruct

"Before" is the model that the training started from; it answers the same instructions. Both are
compared with baselines that need no model: the most frequent answer, the given image unchanged, and
the tokenizer's reconstruction of the true image. With `--redrawn`, the model also answers the same
instructions about input images that the image tokenizer has reconstructed, as if it had drawn them.
For tasks in other formats, use protocols (cm3leon evaluate --protocol).
"""

from __future__ import annotations

from collections.abc import Callable

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.run.run import load_initial
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  from cm3leon_jax.data.instructions import records as records_lib
  from cm3leon_jax.data.instructions import task_files
  from cm3leon_jax.data.instructions import tasks as tasks_lib
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.run import initial
  from cm3leon_jax.run import run as run_lib
  from examples.scenes import headlines
  from examples.scenes.judge import grade_files, grades

RECORDS = flags.DEFINE_integer("records", 100, "Held-out records per task.", lower_bound=2)
REDRAWN = flags.DEFINE_bool("redrawn", False, "Also answer about reconstructed input images.")


def _models(run: run_lib.Run) -> dict[str, Callable[[], dict]]:
  """Maps each column title of the table to a function that loads the column's parameters."""
  start = initial.recorded(run.folder)
  return {
    **({} if start is None else {"before": lambda: load_initial(start, run.settings)}),
    "after": lambda: run.params()[0],
  }


def _grade(run: run_lib.Run, count: int, redrawn: bool) -> dict[str, dict[str, list]]:
  """Returns the graded answers by task name and column title.

  With `redrawn`, the model after tuning also answers about reconstructed input images.
  """
  settings = run.settings
  tasks = task_files.load_tasks(settings.instructions)
  records = {task.name: grades.heldout_records(task, settings, count) for task in tasks}
  retrieve = settings.evaluation.neighbors if (run.folder / "neighbors").exists() else 0
  clip = run.clip if retrieve else None
  answers: dict[str, dict[str, list]] = {name: {} for name in records}

  def ask(title: str, task: tasks_lib.InstructionTask, asked: list[records_lib.Record]) -> None:
    result = grades.answer_all(pipeline, task, asked, retrieve)
    answers[task.name][title] = result
    right = sum(answer.right for answer in result)
    print(f"{title}: {task.name} {right} of {len(result)} correct", flush=True)

  for title, load in _models(run).items():
    pipeline = pipeline_lib.Pipeline.load(
      run, load(), clip, batch_size=settings.evaluation.batch_size
    )
    for task in tasks:
      ask(title, task, records[task.name])
  for task in tasks if redrawn else ():  # By the last model, the one after tuning.
    if again := grades.redrawn(task, records[task.name], pipeline.image_tokenizer):
      ask("redrawn", task, again)
  for task in tasks:
    some = grades.without_model(task, records[task.name], pipeline.image_tokenizer)
    answers[task.name] |= some
  return answers


def figures_of(result: dict) -> list[dict]:
  """Returns the headline figures of graded answers, see `headlines.figure`."""
  tasks, means = result["tasks"], result["means"]
  found = [
    (f"{task}: correct", tasks[task]["after"]["right"], target)
    for task, target in (("exists", 0.85), ("describe", 0.65))
    if task in tasks
  ]
  for kind, target in (("questions", 0.8), ("edits", 0.5), ("edits, kept", 0.8)):
    if kind in means:
      found.append((f"mean of {kind}: correct", {"share": means[kind]["after"]}, target))
  if "draw" in result["gains"]:
    title = "Images for captions wholly correct, after less before"
    found.append((title, result["gains"]["draw"], -0.03))
  return [headlines.figure(*one) for one in found]


def main(settings: Settings, workdir: epath.Path, count: int, redrawn: bool = False) -> None:
  inputs = stages.ids(settings, workdir, ("instructions", "train"))
  config = {"inputs": inputs, "records": count, "redrawn": redrawn, "seed": settings.seed}
  with stages.once(workdir / "grades", config) as summary, common.use_mesh(settings):
    if summary is None:
      return
    answers = _grade(run_lib.Run(workdir, settings), count, redrawn)
    result = grade_files.write(workdir / "grades", answers, settings)
    summary.update(result)
    print(grade_files.describe(result))
    headlines.write(workdir, figures_of(result))


if __name__ == "__main__":
  common.run(lambda settings, workdir: main(settings, workdir, RECORDS.value, REDRAWN.value))

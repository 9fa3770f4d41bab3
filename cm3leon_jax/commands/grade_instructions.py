"""Grades answers to held-out instructions exactly, by facts of scenes, before and after tuning.

  cm3leon grade_instructions --config=scenes_instruct \\
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
from cm3leon_jax.config import UserError
from cm3leon_jax.runs import stages
from cm3leon_jax.settings import Settings

with epy.lazy_imports():
  from cm3leon_jax.data.instructions import records as records_lib
  from cm3leon_jax.data.instructions import task_files
  from cm3leon_jax.data.instructions import tasks as tasks_lib
  from cm3leon_jax.evaluation import world as world_lib
  from cm3leon_jax.evaluation.grades import answers as grades
  from cm3leon_jax.evaluation.grades import files
  from cm3leon_jax.generation import pipeline as pipeline_lib
  from cm3leon_jax.trained import initial
  from cm3leon_jax.trained import run as run_lib

RECORDS = flags.DEFINE_integer("records", 100, "Held-out records per task.", lower_bound=2)
REDRAWN = flags.DEFINE_bool("redrawn", False, "Also answer about reconstructed input images.")


def _models(run: run_lib.Run) -> dict[str, Callable[[], dict]]:
  """Maps each column title of the table to a function that loads the column's parameters."""
  start = initial.start_of(run.folder)
  return {
    **({} if start is None else {"before": lambda: initial.load(start, run.settings)}),
    "after": lambda: run.params()[0],
  }


def _judged_tasks(settings: Settings) -> list[tuple[tasks_lib.InstructionTask, world_lib.World]]:
  """Returns the tasks whose answers a world judges exactly. Raises UserError if there are none."""
  tasks = task_files.load_tasks(settings.instructions)
  judged = [(task, world) for task in tasks if (world := world_lib.of_answers(task))]
  if not judged:
    raise UserError(
      "no task of config.instructions has answers that can be judged exactly (only tasks of the "
      "formats scenes/... have): evaluate the run with a protocol, "
      "`cm3leon evaluate --protocol=cm3leon_table2`."
    )
  return judged


def _grade(
  run: run_lib.Run,
  judged: list[tuple[tasks_lib.InstructionTask, world_lib.World]],
  count: int,
  redrawn: bool,
) -> dict[str, dict[str, list[world_lib.Answer]]]:
  """Returns the graded answers by task name and column title.

  With `redrawn`, the model after tuning also answers about reconstructed input images.
  """
  settings = run.settings
  records = {task.name: grades.heldout_records(task, settings, count) for task, _ in judged}
  retrieve = settings.evaluation.scene_neighbors if (run.folder / "neighbors").exists() else 0
  clip = run.clip if retrieve else None
  answers: dict[str, dict[str, list[world_lib.Answer]]] = {name: {} for name in records}

  def ask(
    title: str,
    task: tasks_lib.InstructionTask,
    world: world_lib.World,
    asked: list[records_lib.Record],
  ) -> None:
    found = grades.answer_all(world, pipeline, task, asked, retrieve)
    answers[task.name][title] = found
    right = sum(answer.right for answer in found)
    print(f"{title}: {task.name} {right} of {len(found)} correct", flush=True)

  for title, load in _models(run).items():
    pipeline = pipeline_lib.Pipeline.load(
      run, load(), clip, batch_size=settings.evaluation.batch_size
    )
    for task, world in judged:
      ask(title, task, world, records[task.name])
  for task, world in judged if redrawn else ():  # By the last model, the one after tuning.
    if again := grades.redrawn(task, records[task.name], pipeline.image_tokenizer):
      ask("redrawn", task, world, again)
  for task, world in judged:
    answers[task.name] |= grades.without_model(
      world, task, records[task.name], pipeline.image_tokenizer, settings
    )
  return answers


def main(settings: Settings, workdir: epath.Path, count: int, redrawn: bool = False) -> None:
  more = {"records": str(count), **({"redrawn": "yes"} if redrawn else {})}
  with stages.stage(workdir, "grades", settings, more) as summary, common.use_mesh(settings):
    if summary is None:
      return
    judged = _judged_tasks(settings)
    answers = _grade(run_lib.Run(workdir, settings), judged, count, redrawn)
    kinds = {kind: of for _, world in judged for kind, of in world.kinds.items()}
    result = files.write(workdir / "grades", answers, settings, kinds)
    summary.update(result)
    print(files.describe(result))


if __name__ == "__main__":
  common.run(lambda settings, workdir: main(settings, workdir, RECORDS.value, REDRAWN.value))

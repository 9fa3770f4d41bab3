"""Names what a model cannot have learned of a task: its images or texts will be noise."""

from collections.abc import Sequence
import re

from cm3leon_jax.config import UserError, short
from cm3leon_jax.data.instructions.config import InstructionsConfig
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.generation.image_tasks import EDIT, Edit, Instruct, TextToImage
from cm3leon_jax.generation.tasks import PromptLayout, Task
from cm3leon_jax.generation.text_tasks import InfillText, Question
from cm3leon_jax.settings import Settings

MARKS = re.compile(r"<(?:mask|image|break)>")
SHOWN = 10_000  # Characters of a prompt whose tokens are looked at.
READ_MARKS = (InfillText, Instruct)  # Tasks whose prompts have them.


def doubts(
  tasks: Sequence[Task],
  layout: PromptLayout,
  settings: Settings,
  unseen: frozenset[int] | None,
) -> list[str]:
  """Returns a sentence for each thing that the model was never shown.

  Args:
    tasks: of the user.
    layout: of the run.
    settings: of the run that trained the model: its tasks and its number of neighbors are read.
    unseen: ids that were not met in training, see `unseen_tokens.find`; None: not known.
  """
  found = []
  if any(isinstance(task, Edit) for task in tasks) and not _learned_edits(settings.instructions):
    found.append(
      "this model never learned to edit images by an instruction, so the result will hardly follow "
      "it: take one that was tuned on edits, e.g. scenes-instruct."
    )
  if any(isinstance(task, Question) for task in tasks) and not settings.instructions.any:
    found.append(
      "this model was not tuned on instructions, so its answers to questions will hardly be right: "
      "take one that was, e.g. scenes-instruct."
    )
  most, learned = max((task.retrieve for task in tasks), default=0), settings.data.num_neighbors
  if most > max(learned, TextToImage.retrieve):
    found.append(
      f"retrieve is {most}, and samples of training had at most {learned} retrieved documents: "
      "more are likely to make results worse."
    )
  for task in tasks:
    marks = () if isinstance(task, READ_MARKS) else MARKS.findall(task.prompt)
    if marks:
      found.append(
        f"the prompt {short(task.prompt)} has {marks[0]}, which task {task.name} reads as letters: "
        "leave it out, or choose task instruct or infill_text."
      )
  for prompt in dict.fromkeys(task.prompt for task in tasks) if unseen else ():
    ids = [int(i) for i in layout.encode(MARKS.sub(" ", prompt[:SHOWN]))]
    ids = [i for i in ids if layout.decode([i]).strip()]  # A space says nothing.
    if unseen and ids and unseen.issuperset(ids):
      found.append(
        f"no token of the prompt {short(prompt)} was seen in training, so it says nothing to this "
        "model: write it in the language and the letters of its training texts."
      )
  return found


def _learned_edits(config: InstructionsConfig) -> bool:
  """Returns whether a task of the training edits images, or the file of its tasks is gone."""
  try:
    tasks = load_tasks(config)
  except UserError:
    return True
  return any(template.startswith(EDIT) for task in tasks for template in task.templates)

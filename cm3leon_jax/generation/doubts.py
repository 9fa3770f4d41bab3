"""Warns about tasks for which a model was not trained."""

from collections.abc import Sequence
import re

from cm3leon_jax.config import UserError, short
from cm3leon_jax.data.instructions.config import InstructionsConfig, is_edit
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.generation.image_tasks import Edit, Instruct, TextToImage
from cm3leon_jax.generation.tasks import PromptLayout, Task
from cm3leon_jax.generation.text_tasks import InfillText, Question
from cm3leon_jax.settings import Settings

MARKS = re.compile(r"<(?:mask|image|break)>")
SHOWN = 10_000  # Number of characters at the start of a prompt that are checked.
READ_MARKS = (InfillText, Instruct)  # Tasks that interpret <mask>, <image> or <break> in prompts.


def doubts(
  tasks: Sequence[Task],
  layout: PromptLayout,
  settings: Settings,
  unseen: frozenset[int] | None,
) -> list[str]:
  """Returns a warning for each property of the tasks that training did not cover.

  Args:
    settings: settings of the run that trained the model, for its instruction tasks and its number
      of neighbors.
    unseen: token ids that did not occur in training (see `unseen_tokens.find`); None if unknown.
  """
  found = []
  if any(isinstance(task, Edit) for task in tasks) and not _learned_edits(settings.instructions):
    found.append(
      "this model was not trained to edit images by instructions, so the result will probably not "
      "follow the instruction: use a model that was tuned on edits, e.g. scenes-instruct."
    )
  if any(isinstance(task, Question) for task in tasks) and not settings.instructions.any:
    found.append(
      "this model was not tuned on instructions, so its answers to questions will probably be "
      "wrong: use a model that was tuned on instructions, e.g. scenes-instruct."
    )
  most, learned = max((task.retrieve for task in tasks), default=0), settings.data.num_neighbors
  if most > max(learned, TextToImage.retrieve):
    found.append(
      f"retrieve is {most}, but training samples had at most {learned} retrieved documents: more "
      "documents will probably make results worse."
    )
  for task in tasks:
    marks = () if isinstance(task, READ_MARKS) else MARKS.findall(task.prompt)
    if marks:
      found.append(
        f"the prompt {short(task.prompt)} has {marks[0]}, which task {task.name} reads as plain "
        "text: remove it, or choose task instruct or infill_text."
      )
  for prompt in dict.fromkeys(task.prompt for task in tasks) if unseen else ():
    ids = [int(i) for i in layout.encode(MARKS.sub(" ", prompt[:SHOWN]))]
    ids = [i for i in ids if layout.decode([i]).strip()]  # Ignore spaces.
    if unseen and ids and unseen.issuperset(ids):
      found.append(
        f"no token of the prompt {short(prompt)} occurred in training, so the prompt has no "
        "meaning for this model: write it in the language and script of the training texts."
      )
  return found


def _learned_edits(config: InstructionsConfig) -> bool:
  """Returns whether any training task edits images; True if the task file no longer exists."""
  try:
    tasks = load_tasks(config)
  except UserError:
    return True
  return any(is_edit(template) for task in tasks for template in task.templates)

"""Makes tasks from records of instruction data, with the wording of the training templates."""

from typing import Any

from cm3leon_jax.config.instructions import InstructionTask, is_edit, split_template
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.tasks import choose_template
from cm3leon_jax.generation.image_tasks import Edit, Instruct, TextToImage
from cm3leon_jax.generation.tasks import BREAK, IMAGE, MASK, Task
from cm3leon_jax.generation.text_tasks import InfillText

LONGEST_TEXT = 40  # Maximum number of tokens in an answer.


def prompt_of(task: InstructionTask, record: Record, **common: Any) -> Task:
  """Returns a task whose correct answer is the target of a record.

    Template "Question: {question} Answer: {answer}. <break> {image}", target "answer" ->
    InfillText("Question: Is there a cat? Answer: <mask>. <break> <image>", image)

  `common` may contain `seed` and `sampling`, and `retrieve`, which only `TextToImage` uses.
  """
  retrieve = common.pop("retrieve", 0)
  segments: list[str] = []
  given: Any = ""
  template = choose_template(task, record.key)
  for segment in split_template(template):
    if segment == f"{{{task.target}}}" and task.target in record.images:
      break
    for field, text in record.texts.items():
      segment = segment.replace(f"{{{field}}}", MASK if field == task.target else text)
    for field, image in record.images.items():
      if segment == f"{{{field}}}":
        segment, given = IMAGE, image
    segments.append(segment)
  prompt = f" {BREAK} ".join(segments)
  if task.target in record.texts:
    return InfillText(prompt=prompt, image=given, length=LONGEST_TEXT, **common)
  if IMAGE not in segments and len(segments) == 1:
    return TextToImage(prompt=prompt, retrieve=retrieve, **common)
  if is_edit(template):
    [*_, instruction] = [segment for segment in segments if segment != IMAGE]
    return Edit(prompt=instruction, image=given, **common)
  return Instruct(prompt=prompt, image=given, **common)

"""Prints the page instruction_tasks.md: the fields of a task, and the shipped tasks with examples.

python -m tools.tasks_page > docs/instruction_tasks.md
"""

# T tokens of a sample.

import importlib.resources
import itertools

import numpy as np

from cm3leon_jax.config.instructions import InstructionTask, fields_of
from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.data.instructions import samples
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.task_files import read_tasks, shipped
from cm3leon_jax.data.instructions.tasks import choose_template, join_record
from cm3leon_jax.vocab import VocabLayout
from tools import config_page

HEADER = """# Instruction tasks
The fields of a task of [instruction tuning](tuning.md#on-instructions), and the shipped tables of
tasks. A table's examples are training samples as the model reads them, with nothing dropped and in
the order of the templates (without `instruction_first`).
"""
# Vocabulary of the examples: one id per character, and one image code.
VOCAB = VocabLayout(num_special=8, text_size=8 + 256, image_size=1)
IMAGE = "[image]"
# Format -> texts of an example. For tasks of the general format jsonl: name of the task -> texts.
TEXTS = {
  "instruct_pix2pix": {"instruction": "make it snow"},
  "ocr": {"ocr_content": "OPEN ALL NIGHT"},
  "coco_objects": {
    "caption": "a cup by a pen",
    "objects": "cup at location (9, 80) -> (60, 131), pen at location (99, 130) -> (190, 142)",
  },
  "coco_2014": {"caption": "a red bus in a street"},
  "coco_karpathy": {"caption": "a man with an umbrella"},
  "flickr30k": {"caption": "Two children play in a fountain."},
  "vg_paragraphs": {"caption": "A man walks on a street. His coat is wet."},
  "localized_narratives": {"caption": "In this image I can see a man on a street."},
  "vqa_v2": {"question": "What is the man holding?", "answer": "an umbrella"},
  "vizwiz": {"question": "What does the label say?", "answer": "unanswerable"},
  "ok_vqa": {"question": "What season is it?", "answer": "autumn"},
  "textvqa": {"question": "What does the sign say?", "answer": "stop"},
  "scienceqa": {
    "question": "Which material is harder?",
    "context": "The picture shows a pillow and a brick.",
    "options": "(A) feathers (B) clay",
    "answer": "(B)",
    "reasoning": "Bricks are of clay. So the answer is (B)",
  },
  "text_to_image": {"instruction": "Generate an image of a lighthouse at night"},
  "image_to_text": {
    "instruction": "Describe this image in detail:",
    "answer": "A lighthouse on a rock, with a bright beam over the sea.",
  },
  "image_and_text_to_text": {
    "instruction": "How many people are in this image?",
    "answer": "Three",
  },
  "image_to_image": {"instruction": "Make this image look like a watercolor"},
}


def example(task: InstructionTask) -> Record:
  """Returns a record of a shipped task. Its key selects the first template of the task."""
  numbers = map(str, itertools.count())
  key = next(x for x in numbers if choose_template(task, x) == task.templates[0])
  texts = TEXTS[task.name if task.format == "jsonl" else task.format]
  named = [field for field in fields_of(task.templates[0]) if field not in texts]
  return Record(key, key, texts, {field: f"{field}.png" for field in named})


def sample_of(task: InstructionTask, record: Record) -> str:
  """Returns the training sample of a record as the model reads it, without dropped segments.

  "</s> Question: Who? Answer: <mask:0>. <break> [image] </s> <mask:0> a man <eoss>"
  """
  code = VOCAB.image_ids([0])
  one = join_record(task, record, _encode, dict.fromkeys(record.images, code))
  lengths = [len(segment.tokens) for segment in one.segments]
  is_image = [segment.is_image for segment in one.segments]
  rng = np.random.default_rng(0)
  span = (one.start, one.stop)
  plan = samples.plan_instruction(lengths, is_image, span, rng, samples.Drops(), VOCAB)
  document = Document(record.key, one.segments, "", "", "")
  tokens, _ = samples.build_instruction(document, plan, VOCAB, "all")
  return show(tokens)


def _encode(text: str) -> np.ndarray:
  """Encodes a text as the text tokenizer does: adds a leading space, unless the text is empty."""
  return np.array([VOCAB.num_special + ord(c) for c in (f" {text}" if text else "")], np.int32)


def show(tokens: np.ndarray) -> str:
  """Formats [T] tokens as text, with names for special tokens and IMAGE for an image code."""
  names, shown = VOCAB.special_tokens(), ""
  for token in tokens.tolist():
    if VOCAB.num_special <= token < VOCAB.text_size:
      shown += chr(token - VOCAB.num_special)
    else:
      space = " " if shown and not shown[-1].isspace() else ""
      shown += space + (IMAGE if token >= VOCAB.text_size else names[token])
  return shown


def page() -> str:
  """Returns the page as Markdown."""
  parts = [HEADER, "\n## The fields of a task\n", config_page.table(InstructionTask)]
  for name in shipped():
    path = importlib.resources.files("cm3leon_jax") / "data" / "tasks" / f"{name}.yaml"
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().split("\n"))
    text = "\n".join(line.removeprefix("# ") for line in lines)
    parts.append(f"\n## Table `{name}`\n{text}\n")
    parts += [_describe(task) for task in read_tasks(name)]
  return "".join(parts)


def _describe(task: InstructionTask) -> str:
  """Returns a line about a task, and its example."""
  line = f"**`{task.name}`** predicts `{task.target}`; `{task.format}`, `{task.train}`"
  if task.heldout:
    line += f", held out `{task.heldout}`"
  line += "".join(f"; map `{field}`: `{kind}`" for field, kind in task.maps.items())
  if len(task.templates) > 1:
    line += f"; {len(task.templates)} templates"
  return f"\n{line}\n```\n{sample_of(task, example(task))}\n```\n"


if __name__ == "__main__":
  print(page(), end="")

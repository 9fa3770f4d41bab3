"""Tests that a task template's prompt has the same tokens as training samples up to the answer."""

import dataclasses
import pathlib
import re
import shlex

import numpy as np
import pytest

from cm3leon_jax.config.instructions import is_edit
from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.data.instructions import samples
from cm3leon_jax.data.instructions.task_files import read_tasks, shipped
from cm3leon_jax.data.instructions.tasks import choose_template, join_record
from cm3leon_jax.generation.image_tasks import Edit, Instruct, TextToImage
from cm3leon_jax.generation.prompt_file import make_task
from cm3leon_jax.generation.record_prompts import prompt_of
from cm3leon_jax.generation.text_tasks import InfillText
from examples.scenes.instructions import record
from examples.scenes.options import ScenesConfig
from tests.data.stores import VOCAB
from tests.examples.scenes.records import TASKS as SCENES
from tools.tasks_page import example

CODES = np.arange(16, dtype=np.int32)
PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
CASES = [
  pytest.param(task, template, first, id=f"{name}-{task.name}-{i}{'-first' * first}")
  for name in shipped()
  for task in read_tasks(name)
  for i, template in enumerate(task.templates)
  for first in ((False, True) if is_edit(template) else (False,))
]


def sample_of(task, record, encode, first):
  """Returns the training sample of a record, with the codes CODES for each image."""
  codes = dict.fromkeys(record.images, VOCAB.image_ids(CODES))
  one = join_record(task, record, encode, codes, first)
  lengths = [len(segment.tokens) for segment in one.segments]
  is_image = [segment.is_image for segment in one.segments]
  rng, target = np.random.default_rng(0), (one.start, one.stop)
  plan = samples.plan_instruction(lengths, is_image, target, rng, samples.Drops(), VOCAB)
  document = Document(record.key, one.segments, "", "", "")
  return samples.build_instruction(document, plan, VOCAB, "all")[0]


@pytest.mark.parametrize(("task", "template", "first"), CASES)
def test_the_prompt_of_every_shipped_template_is_the_beginning_of_its_sample(
  layout, task, template, first
):
  record = example(task)
  task = dataclasses.replace(task, templates=(template,))
  assert choose_template(task, record.key) == template
  sample = sample_of(task, record, layout.encode, first)
  layout = dataclasses.replace(layout, positions=4_096, instruction_first=first)
  # Users include a line with an optional text, or omit the line.
  asked = dataclasses.replace(task, templates=(template.replace("?}", "}"),))
  request = prompt_of(asked, record).to_request(layout, CODES)
  prompt = request.streams[0]
  np.testing.assert_array_equal(sample[: len(prompt)], prompt)
  answer = sample[len(prompt) :]
  if task.target in record.texts:
    texts = " ".join(record.texts[task.target].split())
    np.testing.assert_array_equal(answer, [*layout.encode(texts), VOCAB.eoss])
  else:
    np.testing.assert_array_equal(answer, [*VOCAB.image_ids(CODES), VOCAB.eos])


@pytest.fixture(scope="module")
def records():
  """Returns task name -> first held-out record, for each task over scenes."""
  return {name: record(ScenesConfig(), name, "heldout", 0) for name in SCENES}


def ask(records, name, **fields):
  return prompt_of(SCENES[name], records[name], **fields)


def test_a_model_is_asked_in_the_words_of_its_task(records):
  asked = ask(records, "count", seed=3)
  question = records["count"].texts["question"]
  assert isinstance(asked, InfillText)
  assert asked.prompt == f"Question: {question} Answer: <mask>. <break> <image>"
  assert (asked.image == records["count"].images["image"]).all()
  assert asked.seed == 3
  asked = ask(records, "describe")
  assert asked.prompt == "Describe the given picture. <mask> <break> <image>"
  asked = ask(records, "draw", retrieve=1)
  assert isinstance(asked, TextToImage)
  assert (asked.prompt, asked.retrieve) == (records["draw"].texts["caption"], 1)
  asked = ask(records, "recolor")
  assert isinstance(asked, Edit)
  assert asked.prompt == records["recolor"].texts["instruction"]
  assert (asked.image == records["recolor"].images["before"]).all()
  asked = ask(records, "edges")
  assert isinstance(asked, Instruct)
  caption = records["edges"].texts["caption"]
  start = "Make high quality image from canny edge features <break> <image> <break> "
  assert asked.prompt == start + caption
  assert (asked.image == records["edges"].images["edges"]).all()


def commands_of_the_page():
  """Returns the arguments of each `$G` line on the page, split as in bash."""
  lines = re.findall(r"^\$G (.*)$", PAGE, re.MULTILINE)
  for line in lines:
    line = re.sub(r"\$'(.*?)'", lambda m: shlex.quote(m[1].replace("\\n", "\n")), line)
    yield dict(flag.removeprefix("--").split("=", 1) for flag in shlex.split(line, comments=True))


def test_prompts_of_the_page_are_right(layout):
  layout = dataclasses.replace(layout, positions=4_096)
  names = []
  for fields in commands_of_the_page():
    names.append(fields.pop("task"))
    fields.pop("guidance", None)
    numbers = {name: int(fields.pop(name)) for name in ("length", "retrieve") if name in fields}
    make_task(names[-1], {**fields, **numbers}).to_request(layout, CODES)
  assert sorted(set(names)) == ["edit", "infill_text", "instruct", "question", "text_to_image"]
  assert len(names) == 9

"""Tests that types of keyword arguments match the fields, and that mypy finds wrong keywords."""

import pathlib
import subprocess
import sys
import typing

import pytest

from cm3leon_jax import keywords
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.generator import GeneratorConfig
from cm3leon_jax.generation import prompt_file

ROOT = pathlib.Path(__file__).parents[1]
FILES = ("__init__.py", "api.py", "keywords.py", "config.py", "decoding/config.py")
TYPED = {
  "text_to_image": keywords.ImageSampling,
  "infill_image": keywords.ImageSampling,
  "edit": keywords.EditSampling,
  "interleaved": keywords.DocumentSampling,
  "caption": keywords.TextSampling,
  "question": keywords.TextSampling,
}
RIGHT = """
from cm3leon_jax import CM3Leon

model = CM3Leon.load("scenes", dtype="float32", batch_size=4)
model.generate("a bell", guidance=1.5, method="top_p", num_samples=2, rank=True)
model.generate(["a bell"], seed=1)
model.edit("a.png", "make it blue", edit_guidance=2)
model.infill("a.png", (0, 0, 6, 6), guidance=1.5)
model.interleave("a bell", text_top_k=1)
text: str = model.caption("a.png", length=8, text_top_p=0.5)
answer: str = model.answer("a.png", "what?", retrieve=1)
"""
WRONG = {
  'model.generate("a bell", guidance_scale=1.5)': "guidance_scale",
  'model.generate("a bell", method="best")': "generate",
  'model.edit("a.png", "b", guidance=2.0)': "guidance",
  'model.infill("a.png", (0, 0, 6, 6), temprature=1.0)': "temprature",
  'model.interleave("a bell", text_top_k=1.5)': "text_top_k",
  'model.caption("a.png", length="8")': "caption",
  'model.answer("a.png", "what?", top_k=3)': "top_k",
  'CM3Leon.load("scenes", device="cpu")': "device",
}


@pytest.mark.parametrize("name", TYPED)
def test_the_keywords_of_a_call_are_what_its_task_reads(name):
  assert set(TYPED[name].__annotations__) == set(prompt_file.task_class(name).settings)


def test_the_types_are_those_of_the_config():
  values, config = SamplingConfig(), SamplingConfig.__dataclass_fields__
  for typed in set(TYPED.values()):
    for field, kind in typed.__annotations__.items():
      literal = typing.get_args(kind)
      assert isinstance(getattr(values, field), kind if not literal else str)
      assert not literal or literal == typing.get_args(config[field].type)
  assert set(keywords.LoadOptions.__annotations__) < set(GeneratorConfig.__dataclass_fields__)


@pytest.mark.slow
def test_mypy_finds_a_wrong_keyword_and_no_right_one(tmp_path):
  snippet = tmp_path / "snippet.py"
  snippet.write_text(RIGHT + "\n".join(WRONG) + "\n")
  files = [str(ROOT / "cm3leon_jax" / name) for name in FILES]
  flags = ["--follow-imports=skip", "--no-error-summary", "--no-pretty", "--hide-error-context"]
  flags += ["--ignore-missing-imports", "--no-incremental", "--config-file="]
  command = [sys.executable, "-m", "mypy", *flags, *files, str(snippet)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  found: dict[int, str] = {}
  for line in done.stdout.splitlines():
    path, number, *rest = line.split(":", 3)
    if path == str(snippet) and rest[0] == " error":
      found[int(number)] = found.get(int(number), "") + rest[1]
  first = RIGHT.count("\n") + 1
  assert set(found) == set(range(first, first + len(WRONG))), done.stdout + done.stderr
  for number, name in enumerate(WRONG.values(), first):
    assert name in found[number]

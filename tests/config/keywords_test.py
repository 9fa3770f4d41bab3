"""Tests that types of keyword arguments match the fields of the config and of the tasks."""

import typing

import pytest

from cm3leon_jax.config import sampling
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding.generator import GeneratorConfig, LoadOptions
from cm3leon_jax.generation import prompt_file

TYPED = {
  "text_to_image": sampling.ImageSampling,
  "infill_image": sampling.ImageSampling,
  "edit": sampling.EditSampling,
  "interleaved": sampling.DocumentSampling,
  "caption": sampling.TextSampling,
  "question": sampling.TextSampling,
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
  assert set(LoadOptions.__annotations__) < set(GeneratorConfig.__dataclass_fields__)

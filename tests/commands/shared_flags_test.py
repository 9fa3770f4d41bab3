import dataclasses
from unittest import mock

from etils import epath
import pytest

from cm3leon_jax.commands import evaluate, generate
from cm3leon_jax.config.sampling import SamplingConfig
from tests.generation.run import SETTINGS

NAMES = [field.name for field in dataclasses.fields(SamplingConfig) if field.name != "guidance"]
OTHERS = {"method": "mixture", "guidance_schedule": "cosine"}


def changed(**fields):
  return dataclasses.replace(SETTINGS, sampling=dataclasses.replace(SETTINGS.sampling, **fields))


@pytest.mark.parametrize("name", NAMES)
def test_each_flag_sets_its_field(name):
  default = getattr(SETTINGS.sampling, name)
  given = {name: OTHERS.get(name, 7 if isinstance(default, int) else 0.625)}
  assert generate.Flags(sampling=given).applied(SETTINGS) == changed(**given) != SETTINGS


class Sampled(Exception):
  """Ends a command before it reads a model."""


@pytest.mark.parametrize(
  ("command", "others"), [(generate, {}), (evaluate, {"protocol": "own.yaml"})]
)
def test_a_command_samples_with_the_flags(command, others, tmp_path):
  flags = command.Flags(sampling={"temperature": 0.5}, **others)
  with (
    mock.patch("cm3leon_jax.run.run.Run.open", side_effect=Sampled) as reached,
    pytest.raises(Sampled),
  ):
    command.main(SETTINGS, epath.Path(tmp_path), flags)
  assert changed(temperature=0.5) in reached.call_args.args

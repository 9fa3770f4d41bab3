import dataclasses

import numpy as np
import pytest

from cm3leon_jax.config.build import build
from cm3leon_jax.config.training import ReinforceConfig
from cm3leon_jax.errors import FieldError, UserError
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.reinforcement import rewards
from cm3leon_jax.reinforcement.own_rewards import OwnReward
from tests.refusals import refused
from tests.reinforcement.conftest import settings_of

BLUE = """
import numpy as np

def blue(prompts, images, records):
  assert len(prompts) == len(images) == len(records)
  is_blue = (images[..., 2] > 128) & (images[..., :2] < 128).all(-1)
  return is_blue.mean((1, 2))

def named(prompts, images, records):
  return [len(prompt) + record.facts["n"] for prompt, record in zip(prompts, records)]

def one_score(prompts, images, records):
  return 1.0

def no_number(prompts, images, records):
  return np.where(np.arange(len(images)) == 1, np.nan, 0)

"""


@dataclasses.dataclass(frozen=True)
class Sample:
  """Fake `Sample` with the fields that `OwnReward` reads."""

  task: TextToImage
  segments: tuple


@dataclasses.dataclass(frozen=True)
class Record:
  """Fake `Record`."""

  facts: dict


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(BLUE)
  return path


def score(name, images, texts=("a bell", "two keys")):
  samples = [Sample(TextToImage(prompt=x), (image,)) for x, image in zip(texts, images)]
  return OwnReward.load(name)([Record({"n": i}) for i in range(len(samples))], samples)


def test_a_function_scores_images_prompts_and_records(file):
  images = np.zeros((2, 4, 4, 3), np.uint8)
  images[0, :2, ..., 2] = 255
  assert score(f"{file}:blue", images).tolist() == [0.5, 0]
  assert score(f"{file}:named", images).tolist() == [len("a bell"), len("two keys") + 1]
  assert score(f"{file}:named", images).dtype == np.float32


def test_the_config_names_the_function(file):
  settings = settings_of(reward=f"{file}:blue")
  found = rewards.reward_of(settings)
  assert isinstance(found, OwnReward)
  assert found.function.__name__ == "blue"


@pytest.mark.parametrize("name", ["one_score", "no_number"])
def test_a_wrong_result_is_refused(file, name):
  with refused(UserError, "config.reinforce.reward", name, "shape (2,)"):
    score(f"{file}:{name}", np.zeros((2, 4, 4, 3), np.uint8))


@pytest.mark.parametrize("name", ["judgge", "own.py:1"])
def test_another_name_of_a_reward_is_refused(name):
  with refused(FieldError, name, path=()):
    build(ReinforceConfig, {"reward": name}, "reinforce")

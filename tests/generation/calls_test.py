import os

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.generation import calls
from tests.refusals import refused

FOREIGN = [
  ("text_to_image", "guidance_scale"),
  ("edit", "guidance_scale"),
  ("caption", "guidance_scale"),
  ("text_to_image", "generator"),
  ("text_to_image", "num_images_per_prompt"),
  ("caption", "max_new_tokens"),
  ("text_to_image", "num_inference_steps"),
  ("text_to_image", "dtype"),
  ("text_to_image", "device"),
]


def test_paths_in_the_home_folder_become_absolute():
  assert calls.folder("workdir", "~/a") == calls.image("~/a") == os.path.expanduser("~/a") != "~/a"


@pytest.mark.parametrize(("task", "keyword"), FOREIGN)
def test_a_keyword_of_another_library_is_answered_with_the_right_one(task, keyword):
  with refused(UserError) as caught:
    calls.sampling(task, SamplingConfig(), {keyword: 1})
  assert str(caught.value).count("\n") == 0

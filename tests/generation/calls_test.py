"""Keywords of diffusers and transformers, each answered with what this package has in its place."""

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.generation import calls

FOREIGN = [
  ("text_to_image", "guidance_scale", "it is guidance here."),
  ("edit", "guidance_scale", "it is image_guidance and edit_guidance here."),
  ("caption", "guidance_scale", "texts have none: leave it out."),
  ("text_to_image", "generator", "it is seed here"),
  ("text_to_image", "num_images_per_prompt", "it is num_samples here"),
  ("caption", "max_new_tokens", "it is length here"),
  ("text_to_image", "num_inference_steps", "a step for each of its codes: leave it out."),
  ("text_to_image", "dtype", "give it to load"),
  ("text_to_image", "device", "it is devices here, of load"),
]


@pytest.mark.parametrize(("task", "keyword", "sentence"), FOREIGN)
def test_a_keyword_of_another_library_is_answered_with_the_right_one(task, keyword, sentence):
  with pytest.raises(UserError, match=f"task {task} reads no setting '{keyword}': ") as caught:
    calls.sampling(task, SamplingConfig(), {keyword: 1})
  assert sentence in str(caught.value)
  assert str(caught.value).count("\n") == 0

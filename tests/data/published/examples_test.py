import collections

import pytest

from cm3leon_jax.data.published.examples import Example, caption_prompts, choose
from cm3leon_jax.errors import UserError
from tests.refusals import refused

# There are 30 images; image i has 1 + i % 5 examples.
EXAMPLES = [Example(f"{i}/{j}", str(i)) for i in range(30) for j in range(1 + i % 5)]


def keys(examples):
  return [e.key for e in examples]


def test_each_caption_is_a_prompt():
  example = Example("42", "42", "42.jpg", references=("a cat ", "\n", "two cats"))
  assert list(caption_prompts([example])) == [
    Example("42/0", "42", "42.jpg", prompt="a cat", references=("a cat ",)),
    Example("42/2", "42", "42.jpg", prompt="two cats", references=("two cats",)),
  ]


def test_a_choice_of_three():
  examples = [Example(key, key[0]) for key in ("a/0", "a/1", "a/2", "b/0")]
  assert keys(choose(examples, 3)) == ["b/0", "a/2", "a/1"]


def test_every_image_is_chosen_once_before_one_is_chosen_twice():
  for count in range(1, len(EXAMPLES) + 1):
    chosen = choose(EXAMPLES, count)
    assert len(set(keys(chosen))) == count
    used = collections.Counter(e.group for e in chosen)
    for group, examples in collections.Counter(e.group for e in EXAMPLES).items():
      assert used[group] == examples or used[group] >= max(used.values()) - 1
    assert len(used) == min(count, 30)


def test_a_choice_depends_on_seed_and_names_alone():
  chosen = keys(choose(EXAMPLES, 40, seed=1))
  assert keys(choose(iter(EXAMPLES[::-1]), 40, seed=1)) == chosen
  assert keys(choose(EXAMPLES, 20, seed=1)) == chosen[:20]
  other = keys(choose(EXAMPLES, 40, seed=2))
  assert set(other[:10]) != set(chosen[:10])
  # The chosen example of an image is not always the first.
  assert {key.split("/")[1] for key in chosen[:30]} >= {"0", "1", "2"}


def test_images_with_many_examples_are_not_chosen_more_often():
  """Draws 6 of 30 images 400 times: 80 draws per image are expected; 5 sigma are 40."""
  used = collections.Counter(e.group for seed in range(400) for e in choose(EXAMPLES, 6, seed=seed))
  assert all(40 <= used[str(i)] <= 120 for i in range(30))


@pytest.mark.parametrize("count", [91, -1])
def test_other_numbers_are_refused(count):
  assert choose(EXAMPLES, 0) == []
  with refused(UserError, str(count), "0 to 90"):
    choose(EXAMPLES, count)

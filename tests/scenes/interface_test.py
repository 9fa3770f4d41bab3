import numpy as np

from cm3leon_jax.scenes.config import ScenesConfig
from cm3leon_jax.scenes.instructions import record
from cm3leon_jax.scenes.interface import WORLD
from tests.generation.run import SETTINGS


def records_of(task, count):
  return [record(ScenesConfig(), task, "heldout", i) for i in range(count)]


def test_an_edit_is_right_only_as_the_true_image():
  records = records_of("recolor", 4)
  for name, right in (("after", True), ("before", False)):
    answers = WORLD.judge_answer_images(records, [one.images[name] for one in records], SETTINGS)
    assert [answer.right for answer in answers] == [right] * 4
    assert [answer.kept for answer in answers] == [True] * 4
    for one, answer in zip(records, answers):
      np.testing.assert_array_equal(answer.true, one.images["after"])


def test_a_wrong_text_has_the_right_one_as_its_reason():
  [one] = records_of("count", 1)
  [answer] = WORLD.judge_answer_texts([one], ["none"])
  assert (answer.right, answer.reason) == (False, f"correct: {one.texts['answer']}")
  assert answer.true is None


def test_only_questions_are_guessed_by_one_answer_and_by_what_is_shown():
  records = records_of("count", 8)
  found = WORLD.guesses(records)
  assert len(set(found["majority"])) == 1
  assert len(found["majority"]) == len(found["any object"]) == 8
  assert len(set(found["any object"])) > 1
  assert WORLD.guesses(records_of("describe", 2)) == {}

import dataclasses

import pytest

from cm3leon_jax.data.instructions.config import InstructionsConfig
from cm3leon_jax.generation.doubts import doubts
from cm3leon_jax.generation.image_tasks import Edit, TextToImage
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.generation.text_tasks import Caption, InfillText, Question
from cm3leon_jax.trained.run import Run, unseen_in

NEVER = "this model was not trained to edit"
SAID = "no token of the prompt"
EDIT = Edit(image="a.png", prompt="make the bell blue")


def doubts_of(name, tasks):
  trained = Run.open(name)
  layout = PromptLayout.of(trained)
  return doubts(tasks, layout, trained.settings, unseen_in(trained))


def test_edits_of_the_bundled_models():
  [sentence] = doubts_of("scenes", [EDIT, EDIT])
  assert sentence.startswith(NEVER)
  assert doubts_of("scenes-instruct", [EDIT]) == []
  assert doubts_of("scenes", [Caption(image="a.png")]) == []


@pytest.mark.parametrize("name", ["scenes", "scenes-instruct"])
def test_a_prompt_that_the_bundled_models_cannot_read(name):
  known = ["a red bell", "a dog", "two keys", "красный bell", "a"]
  assert doubts_of(name, [TextToImage(prompt=prompt) for prompt in known]) == []
  unknown = ["красный колокол", "赤い鐘"]
  found = doubts_of(name, [TextToImage(prompt=prompt) for prompt in unknown])
  assert [sentence.partition(" occurred")[0] for sentence in found] == [
    f"{SAID} {p!r}" for p in unknown
  ]


def test_marks_that_a_task_does_not_read():
  [sentence] = doubts_of("scenes", [TextToImage(prompt="a red bell <break>")])
  assert "has <break>, which task text_to_image reads as plain text" in sentence
  assert doubts_of("scenes", [InfillText(prompt="a <mask> bell <break> a dog")]) == []


def test_a_model_of_which_nothing_is_known_is_silent():
  trained = Run.open("scenes")
  layout = PromptLayout.of(trained)
  tasks = [TextToImage(prompt="красный колокол")]
  assert doubts(tasks, layout, trained.settings, None) == []


@pytest.mark.parametrize(
  ("instructions", "count"),
  [({"tasks": "/nowhere"}, 0), ({"tasks": "scenes", "only": ("count",)}, 1)],
)
def test_edits_are_judged_by_the_tasks_of_the_tuning(instructions, count):
  trained = Run.open("scenes")
  layout = PromptLayout.of(trained)
  config = InstructionsConfig(**instructions)
  settings = dataclasses.replace(trained.settings, instructions=config)
  assert len(doubts([EDIT], layout, settings, None)) == count


def test_questions_and_documents_that_training_never_had():
  [sentence] = doubts_of("scenes", [Question(image="a.png", prompt="What color is the bell?")])
  assert sentence.startswith("this model was not tuned on instructions")
  assert doubts_of("scenes-instruct", [Question(image="a.png", prompt="What color is it?")]) == []
  assert doubts_of("scenes", [TextToImage(prompt="a bell", retrieve=1)]) == []
  [sentence] = doubts_of("scenes", [TextToImage(prompt="a bell", retrieve=20)])
  assert sentence.startswith("retrieve is 20, but training samples had at most 1 retrieved")

"""What a model never learned is said in a sentence: edits, and prompts of unknown tokens."""

import pytest

from cm3leon_jax.data.instruction_config import InstructionsConfig
from cm3leon_jax.export.trained import open_trained
from cm3leon_jax.generation.doubts import doubts
from cm3leon_jax.generation.image_tasks import Edit, TextToImage
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.generation.text_tasks import Caption, InfillText

NEVER = "this model never learned to edit"
SAID = "no token of the prompt"
EDIT = Edit(image="a.png", prompt="make the bell blue")


def doubts_of(name, tasks):
  trained = open_trained(name)
  layout = PromptLayout.load(trained.settings, trained.stages)
  return doubts(tasks, layout, trained.settings.instructions, trained.unseen_tokens())


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
  assert [sentence.partition(" was")[0] for sentence in found] == [f"{SAID} {p!r}" for p in unknown]


def test_marks_that_a_task_does_not_read():
  [sentence] = doubts_of("scenes", [TextToImage(prompt="a red bell <break>")])
  assert "has <break>, which task text_to_image reads as letters" in sentence
  assert doubts_of("scenes", [InfillText(prompt="a <mask> bell <break> a dog")]) == []


def test_a_model_of_which_nothing_is_known_is_silent():
  trained = open_trained("scenes")
  layout = PromptLayout.load(trained.settings, trained.stages)
  tasks = [TextToImage(prompt="красный колокол")]
  assert doubts(tasks, layout, trained.settings.instructions, None) == []
  gone = InstructionsConfig(tasks="/nowhere/tasks.yaml")
  assert doubts([EDIT], layout, gone, None) == []
  questions = InstructionsConfig(tasks="scenes", only=("count",))
  assert len(doubts([EDIT], layout, questions, None)) == 1
